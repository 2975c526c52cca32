"""Short runs of every method in every precision, without a wait in an update, on all cards."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grao_lightning import DPOModule, GRAOModule, GRPOModule, PPOModule, RewardModule, SFTModule
from grao_lightning.language_model.sharing import shares_prompts
from tests.runs import fit, largest_difference, stages, weights

pytestmark = pytest.mark.gpu

METHODS = {
    "grao": (GRAOModule, {}),
    "grao with adapters": (GRAOModule, {"lora": {"rank": 4}}),
    "grpo": (GRPOModule, {"kl_weight": 0.05, "updates_per_rollout": 2}),
    "grpo by sequence": (GRPOModule, {"ratio": "sequence", "updates_per_rollout": 2}),
    "ppo": (PPOModule, {"kl_weight": 0.05, "kl_target": 0.5, "updates_per_rollout": 2}),
    "dpo": (DPOModule, {}),
    "sft": (SFTModule, {}),
    "reward": (RewardModule, {}),
}
every_method = pytest.mark.parametrize("method", METHODS)


def made(method: str, kind=None, **options):
    own, settings = METHODS[method]
    source = own.source_setting.rpartition(".")[2]
    base = {source: "embedded:keywords-weak", "learning_rate": 1e-3}
    return (kind or own)(**{**base, **settings, **options})


def on(device: torch.device) -> dict:
    """Return where a run goes."""
    return {"accelerator": "gpu" if device.type == "cuda" else device.type, "devices": 1}


@every_method
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_a_run_moves_the_weights_in_every_precision(tmp_path, device, method, precision):
    if precision == "16-mixed" and device.type == "cpu":
        pytest.skip("Lightning has 16-mixed for accelerators alone")
    options = {"precision": precision, "max_steps": 2, **on(device)}
    before = weights(fit(tmp_path, module=made(method), **{**options, "max_steps": 0}))
    module = fit(tmp_path, module=made(method, learning_rate=1e-2), **options)
    after = weights(module)
    assert math.isfinite(module.step_values["grad_norm"])
    assert largest_difference(before, after) > 1e-4
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_adapters_on_4_bit_weights_are_trained(tmp_path, device, precision):
    pytest.importorskip("bitsandbytes")
    lora = {"rank": 4, "quantize": "nf4"}
    module = made("grao", learning_rate=1e-2, lora=lora)
    module = fit(tmp_path, module=module, precision=precision, max_steps=2, **on(device))
    assert math.isfinite(module.step_values["grad_norm"])
    # The second half of an adapter starts at 0.
    moved = [p for name, p in module.policy.named_parameters() if "lora_B" in name]
    assert moved and all(p.isfinite().all() for p in moved) and any(p.any() for p in moved)


def test_activations_that_wait_on_the_host_change_nothing(tmp_path, device):
    if device.type != "cuda":
        pytest.skip("activations are in the host's memory as it is")
    without, within = (
        fit(tmp_path, module=made("grao", activation_offload=moved), max_steps=2, **on(device))
        for moved in (False, True)
    )
    assert largest_difference(weights(without), weights(within)) < 1e-5


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_4bit"])
def test_moments_in_fewer_bits_move_the_weights(tmp_path, device, optimizer, monkeypatch):
    pytest.importorskip("torchao")
    if device.type == "cpu":  # compiling their step takes minutes there
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    options = {"optimizer": optimizer, "stochastic_rounding": True}
    module = made("grao", learning_rate=1e-2, **options)
    module = fit(tmp_path, module=module, precision="bf16-true", max_steps=2, **on(device))
    before = weights(fit(tmp_path, module=made("grao"), precision="bf16-true", max_steps=0))
    after = {name: value.cpu() for name, value in weights(module).items()}
    assert largest_difference({name: value.cpu() for name, value in before.items()}, after) > 1e-4
    assert all(value.isfinite().all() for value in after.values())


@every_method
def test_a_run_in_float64_is_that_of_the_cpu(tmp_path, device, method):
    """Its tokens too: they are drawn with the same numbers."""
    options = {"precision": "64-true", "max_steps": 2}
    found, expected = (
        fit(tmp_path, module=made(method), **options, **on(place))
        for place in (device, torch.device("cpu"))
    )
    for name in ("loss", "grad_norm"):
        assert found.step_values[name] == pytest.approx(expected.step_values[name], rel=1e-4)
    ours = {name: value.cpu() for name, value in weights(found).items()}
    theirs = {name: value.cpu() for name, value in weights(expected).items()}
    assert largest_difference(ours, theirs) < 2e-5


def without_waits(kind):
    """Return a kind of module that fails where its update, from the third step on, waits.

    The first steps compile and try out. What a step reads at its end stays out: the norm,
    statistics, PPO's drift, DPO's cache.
    """

    def strict(value: bool) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error" if value else "default")

    class Strict(kind):
        checked = 0

        def training_step(self, batch, batch_idx):
            assert shares_prompts(self.trained_model), "padded rows wait in transformers' own mask"
            strict(self.trainer.global_step >= 2)
            try:
                super().training_step(batch, batch_idx)
            finally:
                strict(False)

        def update(self):
            strict(False)
            super().update()
            strict(self.trainer.global_step >= 2)

        def finish_step(self, batch):
            strict(False)
            type(self).checked += self.trainer.global_step >= 2
            super().finish_step(batch)

        def _adapt(self, batch, rollout):
            strict(False)
            super()._adapt(batch, rollout)

        def _keep(self, batch, frozen):
            strict(False)
            super()._keep(batch, frozen)

    return Strict


@every_method
@pytest.mark.parametrize("outward_mask", [False, True], ids=["plain", "outward mask"])
def test_no_update_waits_for_its_device(tmp_path, device, method, outward_mask):
    if outward_mask and not method.startswith("grao"):
        pytest.skip("GRAO alone heeds the outward mask")
    kind = without_waits(METHODS[method][0])
    fit(
        tmp_path,
        module=made(method, kind, micro_batch_tokens=200),
        callbacks=stages(clipping={"outward_mask": outward_mask}),
        max_steps=5,
        **on(device),
    )
    assert kind.checked == 3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", ["GRAOModule", "PPOModule"])
def test_all_cards_together_take_the_steps_of_one(tmp_path, device, strategy, method):
    """On CPU two processes stand in for cards. A single card runs under both too."""
    cards = torch.cuda.device_count() if device.type == "cuda" else 2
    alone = {"method": method, "device": device.type, "strategy": "auto", "cards": 1}
    together = {**alone, "strategy": strategy, "cards": cards}
    expected, found = (steps(tmp_path / run["strategy"], run) for run in (alone, together))
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)


def steps(folder: Path, run: dict) -> dict:
    """Return the norms and the loss of `tests.gpu.cards`."""
    folder.mkdir()
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, root / "tests/gpu/cards.py", folder, json.dumps(run)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads((folder / "steps.json").read_text())
