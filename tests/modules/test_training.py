"""What a training run must not depend on, and what it must."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from grao_lightning import GRAOModule, SFTModule
from tests.runs import fit, largest_difference, stages, weights


class Norms(Callback):
    """Keeps the gradient norm of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.values.append(pl_module.step_values["grad_norm"])


def grao(**options) -> GRAOModule:
    return GRAOModule(**{"policy": "embedded:keywords-weak", "learning_rate": 1e-3, **options})


def run(folder: Path, module=None, stage_options=None, **options):
    norms = Norms()
    module = fit(
        folder, module=module, callbacks=[*stages(**(stage_options or {})), norms], **options
    )
    return weights(module), norms.values


def test_the_same_seed_gives_the_same_weights_bit_for_bit_and_another_seed_others(tmp_path):
    first, _ = run(tmp_path, seed=1)
    again, _ = run(tmp_path, seed=1)
    other, _ = run(tmp_path, seed=2)
    assert largest_difference(first, again) == 0.0
    assert largest_difference(first, other) > 1e-4


# AdamW divides a gradient by its own size: where that is rounding noise (embeddings of words that
# did not occur), float32 weights wander by up to the learning rate. Float64 leaves only the norms
# of Hugging Face models, which compute in float32 whatever they are given.
EXACT = {"precision": "64-true"}


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_the_split_into_micro_batches_changes_neither_gradient_norm_nor_weights(
    tmp_path, gate, precision
):
    options = {"gate": gate, "learning_rate": 1e-4 if precision == "64-true" else 1e-5}
    whole, whole_norms = run(
        tmp_path, grao(micro_batch_tokens=10**6, **options), precision=precision
    )
    # A budget below any row's length: every row is a micro-batch of its own.
    single, single_norms = run(tmp_path, grao(micro_batch_tokens=1, **options), precision=precision)
    assert single_norms == pytest.approx(whole_norms, abs=1e-6)
    assert largest_difference(whole, single) < 1e-6


def test_shared_prompts_give_the_same_steps_as_padded_rows(tmp_path):
    shared, norms = run(tmp_path, grao(learning_rate=1e-5), precision="64-true")
    padded, padded_norms = run(
        tmp_path, grao(learning_rate=1e-5, share_prompts=False), precision="64-true"
    )
    assert norms == pytest.approx(padded_norms, rel=1e-5)
    assert largest_difference(shared, padded) < 1e-6


def test_two_processes_equal_one_with_different_completion_lengths_on_the_ranks(tmp_path):
    alone, norms = run(tmp_path, **EXACT)
    script = Path(__file__).with_name("two_ranks.py")
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "norms.json").read_text())
    assert found["longest_of_ranks"][0] != found["longest_of_ranks"][1], "lengths must differ"
    assert found["norms"] == pytest.approx(norms, abs=1e-6)
    assert largest_difference(alone, torch.load(tmp_path / "weights.pt")) < 1e-6


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, _ = run(tmp_path, max_steps=6)
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, filename="three")
    fit(
        tmp_path,
        module=grao(),
        callbacks=[*stages(), saver],
        max_steps=3,
        enable_checkpointing=True,
    )
    resumed, _ = run(tmp_path, grao(), max_steps=6, ckpt_path=str(tmp_path / "saved/three.ckpt"))
    assert largest_difference(whole, resumed) == 0.0


def test_a_checkpoint_holds_the_policy_and_not_the_reference_model(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="three")
    module = fit(tmp_path, module=grao(), callbacks=[*stages(), saver], enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "three.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"policy"}
    assert checkpoint["num_sampled_tokens"] == module.num_sampled_tokens > 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", [GRAOModule, SFTModule])
def test_a_step_is_taken_in_every_precision(tmp_path, precision, method):
    module = method(policy="embedded:keywords-weak", learning_rate=1e-2)
    before = weights(fit(tmp_path, module=method(policy="embedded:keywords-weak"), max_steps=0))
    fit(tmp_path, module=module, precision=precision, limit_val_batches=1, val_check_interval=3)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert all(p.dtype == dtype for p in module.policy.parameters())
    after = {name: value.float() for name, value in weights(module).items()}
    assert largest_difference(before, after) > 1e-3
    assert all(value.isfinite().all() for value in after.values())
    assert 0 <= module.estimates["ras"].value <= 1


def test_the_reference_model_never_changes_and_the_policy_does(tmp_path):
    module = grao()
    before = weights(fit(tmp_path, module=grao(), max_steps=0))
    fit(tmp_path, module=module)
    frozen = module.reference_model.state_dict()
    assert largest_difference(before, frozen) == 0.0
    assert largest_difference(before, weights(module)) > 1e-4


def test_a_step_without_signal_leaves_the_policy_where_weight_decay_alone_would(tmp_path):
    options = {"scoring": {"rewards": stages()[1].rewards, "tie_tolerance": 10.0}}
    with pytest.warns(UserWarning, match="no group carries a signal"):
        module = fit(tmp_path, module=grao(weight_decay=0.0), callbacks=stages(**options))
    before = weights(fit(tmp_path, module=grao(), max_steps=0))
    assert largest_difference(before, weights(module)) == 0.0


def test_masked_truncated_completions_carry_no_gradient(tmp_path):
    """At a limit of one token every completion is cut: only the reference answers pull."""
    short = {"sampling": {"max_new_tokens": 1}}
    with pytest.warns(UserWarning, match="100% of the completions were cut off"):
        masked, _ = run(tmp_path, grao(mask_truncated_completions=True), short, max_steps=1)
    unmasked, _ = run(tmp_path, grao(), short, max_steps=1)
    only_imitation = {"exploration_weight": 0.0, "regularizer_weight": 0.0}
    # With lambda = 0 the reference answers' coefficient is beta A_y; lambda adds lambda / G.
    imitation, _ = run(
        tmp_path, grao(imitation_weight=0.5 + 0.6 / 4, **only_imitation), short, max_steps=1
    )
    assert largest_difference(masked, imitation) < 1e-6
    assert largest_difference(masked, unmasked) > 1e-5


def test_outward_mask_drops_tokens_and_changes_the_step(tmp_path):
    # Ratios are 1 in the first step; afterwards almost any movement is outward.
    tight = {"clipping": {"outward_mask": True, "eps_low": 1e-4, "eps_high": 1e-4}}
    masked, _ = run(tmp_path, grao(), tight)
    free, _ = run(tmp_path, grao())
    assert largest_difference(masked, free) > 1e-5


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(tmp_path, schedule):
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            rates.append(pl_module.step_values["learning_rate"])

    fit(
        tmp_path,
        module=grao(warmup_steps=2, schedule=schedule),
        callbacks=[*stages(), Rates()],
        max_steps=6,
    )
    expected = {
        "constant": [0.5, 1, 1, 1, 1, 1],
        "linear": [0.5, 1, 1, 0.75, 0.5, 0.25],
        # (1 + cos(pi * done)) / 2 at done = 0, 1/4, 1/2, 3/4
        "cosine": [0.5, 1, 1, 0.8535534, 0.5, 0.1464466],
    }[schedule]
    assert rates == pytest.approx([1e-3 * factor for factor in expected], rel=1e-5)


def test_sft_takes_the_gradient_of_the_mean_cross_entropy_of_all_answer_tokens(tmp_path):
    """Against labels given to the Hugging Face model itself."""
    grabbed = {}

    class Grab(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            grabbed["batch"] = batch
            grabbed["before"] = weights(pl_module)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            named = pl_module.policy.named_parameters()
            grabbed["gradients"] = {name: p.grad.clone() for name, p in named}

    callbacks = [*stages(clipping={"max_norm": 1e9}), Grab()]
    module = SFTModule(policy="embedded:keywords-weak", micro_batch_tokens=40)
    fit(tmp_path, module=module, callbacks=callbacks, max_steps=1)

    model = module.policy
    model.load_state_dict(grabbed["before"])
    model.zero_grad()
    rows = grabbed["batch"].reference_answer_rows()
    width = max(len(row) for row in rows)
    ids = [row.prompt_ids + row.answer_ids + [0] * (width - len(row)) for row in rows]
    labels = [
        [-100] * len(row.prompt_ids) + row.answer_ids + [-100] * (width - len(row)) for row in rows
    ]
    model(input_ids=torch.tensor(ids), labels=torch.tensor(labels)).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            grabbed["gradients"][name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name
        )
