"""``grao memory`` against what runs hold."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from grao_lightning import GRAOModule
from grao_lightning.__main__ import main
from grao_lightning.batch import TokenRow
from grao_lightning.command.memory import given_settings, memory_table, planned
from grao_lightning.embedded.base import base_folder
from grao_lightning.faults import UserError
from grao_lightning.language_model import footprint, recomputed
from grao_lightning.language_model.measuring import empty_model, size_of
from grao_lightning.language_model.recomputed import is_recomputed
from grao_lightning.language_model.sharing import share_prompts
from grao_lightning.language_model.states import answer_states, decoder_reader
from tests.conftest import VOCABULARY, tiny_model
from tests.language_model.test_architectures import ROWS
from tests.mixtures import mixture
from tests.runs import fit, stages


class Held(Callback):
    """Counts the bytes that a step holds: weights, gradients, moments and masters."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        self.gradients = sum(p.grad.nbytes for p in trained)
        self.weights = sum(p.nbytes for p in pl_module.policy.parameters())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (optimizer,) = trainer.optimizers
        state = optimizer.state_dict()
        parts = [part[name] for part in state["state"].values() for name in part if name != "step"]
        parts += state.get("master_weights", [])
        self.optimizer = sum(part.nbytes for part in parts)


RUNS = {
    "float32": ({}, {}),
    "bf16": ({}, {"precision": "bf16-true"}),
    "masters": ({"master_weights": True}, {"precision": "bf16-true"}),
    "adapters": ({"lora": {"rank": 4}}, {"precision": "bf16-true"}),
}


@pytest.mark.parametrize("family", ["embedded", "deepseek_v3"])
@pytest.mark.parametrize("name", RUNS)
def test_weights_gradients_and_moments_are_those_of_a_run_to_the_byte(tmp_path, name, family):
    model, trainer = RUNS[name]
    source = str(base_folder("keywords-weak"))
    if family != "embedded":
        source = str(tmp_path / "model")
        for part in mixture(family).values():
            part.save_pretrained(source)
    held = Held()
    module = GRAOModule(policy=source, learning_rate=1e-3, **model)
    fit(tmp_path, module=module, callbacks=[*stages(), held], max_steps=1, **trainer)
    plan = planned({"model": {"init_args": {"policy": source, **model}}, "trainer": trainer})
    parts, _ = footprint.device(plan.size, plan.run, plan.reference_model)
    assert parts["weights"] == held.weights
    assert parts["gradients"] == held.gradients
    assert parts["optimiser"] == held.optimizer
    frozen = module.reference_model.model
    whole = sum(p.nbytes for p in frozen.parameters())
    assert parts["reference model"] == (0 if "lora" in model else whole)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma"])
def test_what_layers_keep_of_a_token_is_what_a_pack_keeps(tmp_path, monkeypatch, family):
    monkeypatch.setattr(recomputed, "_LEAST_BYTES", 0)  # the pack is a small one
    model = tiny_model(family).train()
    model.save_pretrained(tmp_path / "model")
    size = size_of(empty_model("", str(tmp_path / "model")))
    assert share_prompts(model)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    found: dict[int, Any] = {}

    def keep(values: torch.Tensor) -> torch.Tensor:
        if values.untyped_storage().data_ptr() not in own and not is_recomputed(values):
            found[values.untyped_storage().data_ptr()] = values.untyped_storage()
        return values

    rows = [
        TokenRow(
            [token % VOCABULARY for token in row.prompt_ids],
            [token % VOCABULARY for token in row.answer_ids],
        )
        for row in ROWS
    ]
    tokens = sum(map(len, {tuple(row.prompt_ids) for row in rows}))
    tokens += sum(len(row.answer_ids) - 1 for row in rows)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values):
        states = answer_states(model, rows, "packed", decoder_reader(model.get_decoder()))
    assert states.requires_grad
    kept = sum(storage.nbytes() for storage in found.values()) / tokens
    assert size.kept_float32 == pytest.approx(kept, rel=0.1)


def test_parts_are_dealt_out_and_the_reference_model_and_sampling_count():
    source = str(base_folder("keywords"))
    settings = {"model": {"init_args": {"policy": source}}, "trainer": {"devices": 4}}
    whole = planned(settings)
    dealt = planned({**settings, "trainer": {"devices": 4, "strategy": "fsdp2"}})
    alone, _ = footprint.device(whole.size, whole.run, whole.reference_model)
    parts, most = footprint.device(dealt.size, dealt.run, dealt.reference_model)
    for name in ("weights", "gradients", "optimiser", "reference model"):
        assert parts[name] == alone[name] / 4
    assert parts["gathered to sample"] == alone["weights"]
    assert whole.host == 4 * 2 * alone["weights"] and dealt.host == 2 * alone["weights"]
    assert most >= parts["weights"] * 2 + parts["optimiser"]
    on_cpu = {**settings, "trainer": {"devices": 1, "accelerator": "cpu"}}
    packed = footprint.device((plan := planned(on_cpu)).size, plan.run, None)[0]["packed to sample"]
    assert parts["packed to sample"] == 0 and 0.3 * alone["weights"] < packed <= alone["weights"]
    offloaded = {"class_path": "ShardedStrategy", "init_args": {"cpu_offload": True}}
    waiting = planned({**settings, "trainer": {"devices": 4, "strategy": offloaded}})
    assert footprint.device(waiting.size, waiting.run, None)[0]["optimiser"] == 0
    assert waiting.host > dealt.host


def test_the_command_reads_configs_and_overrides(capsys, monkeypatch, repository, tmp_path):
    config = str(repository / "configs" / "quickstart.yaml")
    found = given_settings(["--config", config, "--model.lora.rank", "4", "--trainer.devices=2"])
    assert found["model"]["init_args"]["lora"] == {"rank": 4}
    assert found["trainer"]["devices"] == 2
    assert "2 device(s), ddp" in memory_table(found)
    monkeypatch.setattr("sys.argv", ["grao", "memory", "--config", config])
    assert main() == 0
    shown = capsys.readouterr().out
    for part in ("weights", "optimiser", "most on a device", "checkpoint on disk", "Not counted"):
        assert part in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.policy", "/nowhere"], "model.policy: no configuration of '/nowhere'"),
        (["--trainer.precision", "8"], "trainer.precision"),
        (["--model.polcy", "x"], "model.polcy is no setting of GRAOModule"),
        (["--trainer.devices", "auto"], "trainer.devices must be a number here; got 'auto'"),
        (["--model", "GRAMModule"], "GRAMModule"),
        (["memory"], "'memory' is no setting"),
        (["--config", "/nowhere.yaml"], "cannot read /nowhere.yaml"),
    ],
)
def test_what_cannot_be_computed_is_told(arguments, message):
    with pytest.raises(UserError, match=message):
        memory_table(given_settings(arguments))


def test_the_page_of_memory_is_what_its_command_writes():
    from tests.command.memory_page import PAGE, page

    assert PAGE.read_text() == page()
