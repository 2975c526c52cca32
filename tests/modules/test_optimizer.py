"""AdamW on master weights against torch's on float32 weights; moments of 8 and 4 bits."""

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from grao_lightning.modules.optimizer import MasterWeights, make_optimizer, optimizer_fault

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


def test_each_parameter_is_walked_once_a_step(monkeypatch):
    walked = []
    step = AdamW.step

    def counted(self, closure=None):
        walked.extend(map(id, self.param_groups[0]["params"]))
        return step(self, closure)

    monkeypatch.setattr("grao_lightning.modules.optimizer.AT_ONCE", 3)
    monkeypatch.setattr(AdamW, "step", counted)
    weights = [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(10)]
    optimizer = MasterWeights(weights, **OPTIONS)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert len(walked) == len(set(walked)) == 10


@pytest.fixture
def eager(monkeypatch):
    """torchao compiles its step, for a minute and a half on a CPU; the same code runs without."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def low_bit(weights, name="adamw_8bit", **options):
    settings = {"master_weights": False, "stochastic_rounding": False, "fused": False, **options}
    settings = {"betas": (0.8, 0.9), **settings}
    return make_optimizer(name, weights, lr=1e-3, weight_decay=0.1, **settings)


def large_weights(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Return weights whose moments are quantised, and one that is too small for it."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in [(64, 128), (96, 64), (5,)]]
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


def step_large(optimizer, weights, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(1 + step)
        for weight in weights:
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            weight.grad = drawn.to(weight.dtype)
        optimizer.step()


KINDS = [
    {"name": "adamw_8bit"},
    {"name": "adamw_4bit"},
    {"name": "adamw", "stochastic_rounding": True},
    {"name": "adamw_8bit", "stochastic_rounding": True},
    {"name": "adamw_8bit", "master_weights": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind)[5:] + kind["name"])
def test_a_restored_low_bit_optimizer_goes_on_bit_for_bit(kind, eager, tmp_path):
    torch.manual_seed(3)
    whole = large_weights()
    uninterrupted = low_bit(whole, **kind)
    schedule = LambdaLR(uninterrupted, lambda step: 1 / (1 + step))
    step_large(uninterrupted, whole, range(3))
    schedule.step()
    torch.save((uninterrupted.state_dict(), whole), tmp_path / "state.pt")
    step_large(uninterrupted, whole, range(3, 6))
    torch.manual_seed(17)  # what was drawn before is not what is drawn from
    state, resumed = torch.load(tmp_path / "state.pt", weights_only=True)
    restored = low_bit(resumed, **kind)
    restored.load_state_dict(state)
    assert float(restored.param_groups[0]["lr"]) == pytest.approx(5e-4)
    step_large(restored, resumed, range(3, 6))
    assert same(whole, resumed)
    if kind.get("master_weights"):
        assert same(masters(uninterrupted), masters(restored))


@pytest.mark.parametrize(("name", "bits"), [("adamw_8bit", 8), ("adamw_4bit", 4)])
def test_moments_take_as_many_bits_as_the_name_says_and_steps_are_nearly_those_of_adamw(
    name, bits, eager
):
    plain, small = large_weights(torch.float32), large_weights(torch.float32)
    start = large_weights(torch.float32)[0].detach()
    pairs = [(AdamW(plain, lr=1e-3, weight_decay=0.1, betas=(0.8, 0.9)), plain)]
    pairs.append((low_bit(small, name), small))
    for optimizer, weights in pairs:
        step_large(optimizer, weights, range(3))
    way, other = plain[0].detach() - start, small[0].detach() - start
    assert 0 < (way - other).norm() < 0.5 * way.norm()
    moment = pairs[1][0].state[small[0]]["exp_avg"]
    assert moment.codes.numel() * moment.codes.element_size() * 8 == small[0].numel() * bits


def test_stochastic_rounding_moves_weights_in_the_mean_that_stay_where_they_are_otherwise(eager):
    """A step of 1e-4 from 1 is 1/39 of bfloat16's next number below, 1 - 1/256."""
    ends = []
    for rounding in (False, True):
        weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = make_optimizer(
            "adamw_8bit",
            [weight],
            master_weights=False,
            stochastic_rounding=rounding,
            fused=False,
            lr=1e-4,
            weight_decay=0.0,
            betas=(0.9, 0.999),
        )
        for _ in range(10):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        ends.append(weight.detach().double().mean().item())
    assert ends[0] == 1.0
    assert ends[1] == pytest.approx(1 - 10 * 1e-4, abs=2e-4)


def test_what_is_rounded_by_is_the_same_on_every_rank_and_leaves_other_draws_alone(eager):
    ends, draws = [], []
    for rank in (0, 1):
        weights = large_weights()
        torch.manual_seed(rank)  # as ranks that sampled different numbers of tokens
        expected = torch.rand(1)
        torch.manual_seed(rank)
        step_large(low_bit(weights, stochastic_rounding=True), weights, range(2))
        draws.append(torch.equal(torch.rand(1), expected))
        ends.append(weights)
    assert same(*ends) and all(draws)


def test_an_optimizer_that_cannot_be_had_is_told_with_its_fix():
    fault = optimizer_fault("adamw_8bit", False, False, package="no_such_package")
    assert "model.optimizer=adamw_8bit needs no_such_package" in fault and "[low-bit]" in fault
    assert optimizer_fault("adamw", False, False, package="no_such_package") is None
    assert "stochastic_rounding=true needs" in optimizer_fault(
        "adamw", False, True, package="no_such_package"
    )
    assert "must be false with model.master_weights" in optimizer_fault("adamw", True, True)


def test_steps_and_scales_are_float32_where_bfloat16_is_the_default(eager):
    """A bfloat16 counts to 256, and 1 - 0.999 is 0 in it: the first step would be NaN."""
    ends = []
    for default in (torch.float32, torch.bfloat16):
        weights = large_weights()
        optimizer = low_bit(weights, betas=(0.9, 0.999))
        torch.set_default_dtype(default)
        try:
            step_large(optimizer, weights, range(2))
        finally:
            torch.set_default_dtype(torch.float32)
        state = optimizer.state[weights[0]]
        assert state["step"].dtype == state["exp_avg"].scale.dtype == torch.float32
        ends.append(weights)
    assert all(weight.isfinite().all() for weight in ends[1]) and same(*ends)
