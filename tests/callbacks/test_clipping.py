"""What the clipping stage does to a step: the cap, the drift, the guard against non-finite ones."""

import pytest
import torch
from lightning.pytorch import Callback

from grao_lightning import GRAOModule
from grao_lightning.batch import OutwardLimits
from tests.runs import fit, largest_difference, stages, weights


class Record(Callback):
    """Keeps each step's gradient norm after clipping, its values and the weights it led to.

    Args:
        broken: Steps whose gradient is made NaN before it is clipped.
    """

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken
        self.norms: list[float] = []
        self.values: list[dict[str, float]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.limits: list[OutwardLimits | None] = []
        self.batch = None

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step in self.broken:
            next(pl_module.policy.parameters()).grad[0] = torch.nan

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        gradients = [p.grad for p in pl_module.policy.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(pl_module.step_values)
        self.weights.append(weights(pl_module))
        self.limits.append(batch.outward_limits)
        self.batch = batch


def recorded(folder, clipping, *, broken=(), max_steps=3, **module_options) -> tuple:
    record = Record(broken)
    options = {"learning_rate": 1e-3, **module_options}
    module = GRAOModule(policy="embedded:keywords-weak", **options)
    fit(folder, module=module, callbacks=[*stages(clipping=clipping), record], max_steps=max_steps)
    return module, record


def test_the_gradient_is_cut_to_the_cap_and_its_norm_before_that_is_logged(tmp_path):
    _, capped = recorded(tmp_path, {"max_norm": 0.01}, max_steps=1)
    _, free = recorded(tmp_path, {"max_norm": 1e9}, max_steps=1)
    assert capped.norms == pytest.approx([0.01], rel=1e-4)
    assert free.norms[0] > 0.1, "the cap must bite"
    for record in (capped, free):
        assert record.values[0]["grad_norm"] == pytest.approx(free.norms[0], rel=1e-4)
    assert capped.values[0]["clip_ratio/grad_norm"] == 1.0
    assert free.values[0]["clip_ratio/grad_norm"] == 0.0


def test_a_drift_beyond_its_target_lowers_the_cap_of_that_step_in_proportion(tmp_path):
    target = 1e-6
    _, record = recorded(tmp_path, {"max_norm": 0.01, "drift_target": target})
    drifts = [values["kl"] for values in record.values]
    assert drifts[0] < target < min(drifts[1:]), "the policy starts as the reference model"
    expected = [0.01, *(0.01 * target / drift for drift in drifts[1:])]
    assert record.norms == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def naive_logprobs(model, prompt_ids, answer_ids, temperature) -> torch.Tensor:
    ids = torch.tensor([prompt_ids + answer_ids])
    logprobs = (model(ids).logits[0, :-1] / temperature).log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[len(prompt_ids) - 1 :, 0]


def test_the_logged_drift_is_the_mean_k3_over_the_sampled_tokens_of_the_models_themselves(tmp_path):
    options = {"learning_rate": 0.0, "logprob_temperature": 0.7, "micro_batch_tokens": 40}
    module, record = recorded(
        tmp_path, {}, max_steps=1, reference_model="embedded:keywords", **options
    )
    batch, drifts = record.batch, []
    for number, ids in enumerate(batch.completions.ids):
        prompt = batch.prompt_ids[number // 4]
        own = naive_logprobs(module.policy.eval(), prompt, ids, 0.7)
        frozen = naive_logprobs(module.reference_model.model, prompt, ids, 0.7)
        drifts.append((frozen - own).exp() - (frozen - own) - 1)
    expected = torch.cat(drifts).mean().item()
    assert expected > 0.05, "the models must differ"
    assert record.values[0]["kl"] == pytest.approx(expected, rel=1e-4)


def test_drift_is_measured_every_so_many_steps(tmp_path):
    _, record = recorded(tmp_path, {"drift_every": 2}, max_steps=4)
    assert ["kl" in values for values in record.values] == [True, False, True, False]
    _, never = recorded(tmp_path, {"drift_every": 0}, max_steps=1)
    assert "kl" not in never.values[0]


def test_the_outward_mask_gets_the_bounds_around_one(tmp_path):
    _, record = recorded(tmp_path, {"outward_mask": True, "eps_low": 0.3, "eps_high": 2.0})
    assert record.limits == [OutwardLimits(1 - 0.3, 3.0)] * 3
    _, off = recorded(tmp_path, {"eps_low": 0.3}, max_steps=1)
    assert off.limits == [None]


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(tmp_path):
    with pytest.warns(UserWarning, match="step 1: the gradient norm is nan; this step changes"):
        _, record = recorded(tmp_path, {}, broken=(1,))
    first, second, third = record.weights
    assert largest_difference(first, second) == 0.0
    assert largest_difference(second, third) > 1e-5
    assert all(value.isfinite().all() for value in third.values())


@pytest.mark.filterwarnings("ignore:step .* the gradient norm is nan")
def test_ten_such_steps_in_a_row_end_the_run_and_a_good_one_starts_the_count_anew(tmp_path):
    recorded(tmp_path, {}, broken=(*range(9), *range(10, 19)), max_steps=19)
    with pytest.raises(FloatingPointError, match="nan in 10 steps in a row, the last one 9"):
        recorded(tmp_path, {}, broken=tuple(range(10)), max_steps=19)
