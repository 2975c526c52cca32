"""AdamW on master weights against torch's AdamW on float32 weights."""

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from grao_lightning.modules.optimizer import MasterWeights

OPTIONS = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.9), "fused": True}


def parameters(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Return the same two weights in any precision: what bfloat16 holds of random ones."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in [(3, 4), (5,)]]
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in [(3, 4), (5,)]]


def run(optimizer, steps: range) -> None:
    for step in steps:
        own = optimizer.param_groups[0]["params"]
        for parameter, gradient in zip(own, gradients(step), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def masters(optimizer: MasterWeights) -> list[torch.Tensor]:
    return optimizer.state_dict()["master_weights"]


def same(left, right) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("at_once", [1, 16])
def test_weights_are_those_of_adamw_in_float32_rounded_at_every_rate_of_a_schedule(
    at_once, monkeypatch
):
    monkeypatch.setattr("grao_lightning.modules.optimizer.AT_ONCE", at_once)
    rounded, whole = parameters(), parameters(torch.float32)
    optimizers = [MasterWeights(rounded, **OPTIONS), AdamW(whole, **OPTIONS)]
    schedules = [LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in optimizers]
    for step in range(5):
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            run(optimizer, range(step, step + 1))
            schedule.step()
        assert same(masters(optimizers[0]), whole)
        assert same(rounded, [value.bfloat16() for value in whole])
    assert not same(rounded, parameters())


def test_steps_too_small_for_bfloat16_add_up():
    """With a gradient of 1 a step is the learning rate; bfloat16 knows nothing in (1 - 1/256, 1).

    40 steps of 1e-4 lead to 0.996, which rounds to 1 - 1/256; each alone rounds back to 1.
    """
    ends = []
    for kind in (MasterWeights, AdamW):
        weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        optimizer = kind([weight], lr=1e-4, weight_decay=0.0)
        for _ in range(40):
            weight.grad = torch.ones(1, dtype=torch.bfloat16)
            optimizer.step()
        ends.append(weight.item())
    assert ends == [1 - 1 / 256, 1.0]


def test_a_restored_optimizer_goes_on_as_if_it_had_never_stopped(tmp_path):
    whole = parameters()
    uninterrupted = MasterWeights(whole, **OPTIONS)
    run(uninterrupted, range(3))
    uninterrupted.param_groups[0]["lr"] = 2e-3  # as a schedule does behind a step
    torch.save((uninterrupted.state_dict(), whole), tmp_path / "state.pt")
    run(uninterrupted, range(3, 6))
    state, resumed = torch.load(tmp_path / "state.pt", weights_only=True)
    restored = MasterWeights(resumed, **{**OPTIONS, "lr": 1.0})
    restored.load_state_dict(state)
    run(restored, range(3, 6))
    assert same(whole, resumed) and same(masters(uninterrupted), masters(restored))


@pytest.mark.parametrize("kinds", [(AdamW, MasterWeights), (MasterWeights, AdamW)])
def test_either_optimizer_goes_on_from_the_others_checkpoint(kinds):
    weights = parameters()
    first = kinds[0](weights, **OPTIONS)
    run(first, range(3))
    second = kinds[1](weights, **{**OPTIONS, "lr": 1.0})
    if kinds[1] is MasterWeights:
        second._masters[0].zero_()  # restoring must not rely on what was there when it was made
    second.load_state_dict(first.state_dict())
    before = [weight.detach().clone() for weight in weights]
    run(second, range(3, 4))
    steps = [(weight - old).abs().max() for weight, old in zip(weights, before, strict=True)]
    assert 0 < max(steps) < 0.05, "lr 1e-3 and a rounding; lr 1 would be seen"
    assert second.param_groups[0]["lr"] == 1e-3


def test_gradients_count_as_the_closure_leaves_them_and_those_it_removes_change_nothing():
    weights = parameters()
    optimizer = MasterWeights(weights, **OPTIONS)
    run(optimizer, range(1))
    before = [value.clone() for value in masters(optimizer)]
    for weight, gradient in zip(weights, gradients(1), strict=True):
        weight.grad = gradient

    def closure() -> str:
        assert torch.is_grad_enabled()
        weights[0].grad = None
        return "loss"

    assert optimizer.step(closure) == "loss"
    assert torch.equal(masters(optimizer)[0], before[0])
    assert not torch.equal(masters(optimizer)[1], before[1])


def test_frozen_parameters_have_no_master():
    weights = parameters()
    weights[0].requires_grad_(False)
    optimizer = MasterWeights(weights, **OPTIONS)
    assert [len(value) for value in masters(optimizer)] == [5]
