"""The algebra of equation 3 (arXiv 2508.07750) against its code, in float64."""

import pytest
import torch

from grao_lightning.objectives.advantages import group_advantages
from grao_lightning.objectives.grao import (
    GRAOTerms,
    GRAOWeights,
    grao_coefficients,
    grao_objective,
    grao_terms_per_prompt,
)

B, G = 16, 8
LITERAL = GRAOWeights(gate=False)
GATED = GRAOWeights()
CLOSE = {"atol": 1e-12, "rtol": 0}


def groups(statistics: str = "inside") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(B, G + 1, generator=generator, dtype=torch.double)
    rewards[: B // 2, -1] += 2  # half of the reference answers lead, half trail
    rewards[B // 2 :, -1] -= 2
    mean_logprobs = -torch.rand(B, G + 1, generator=generator, dtype=torch.double) * 5
    return mean_logprobs, group_advantages(rewards, statistics=statistics)  # type: ignore[arg-type]


def slow_objective(
    mean_logprobs: torch.Tensor, advantages: torch.Tensor, weights: GRAOWeights
) -> float:
    """Equation 3 summed one completion at a time, as it stands in the paper."""
    total = 0.0
    for logprobs, of_group in zip(mean_logprobs.tolist(), advantages.tolist(), strict=True):
        *of_completions, of_answer = of_group
        *completions, answer = logprobs
        pull = -sum(of_completions) / G
        if weights.gate:
            of_answer, pull = max(of_answer, 0.0), max(pull, 0.0)
        for advantage, logprob in zip(of_completions, completions, strict=True):
            total += weights.exploration * advantage * logprob / G
            total += weights.regularizer * advantage * logprob / G
        total += weights.imitation * of_answer * answer
        total += weights.regularizer * pull * answer
    return total / len(mean_logprobs)


@pytest.mark.parametrize("statistics", ["inside", "outside", "split"])
@pytest.mark.parametrize("weights", [LITERAL, GATED, GRAOWeights(0.7, 0.2, 1.3, gate=True)])
def test_objective_equals_the_sum_of_equation_3_term_by_term(statistics, weights):
    mean_logprobs, advantages = groups(statistics)
    total = grao_objective(mean_logprobs, advantages, weights).total
    expected = slow_objective(mean_logprobs, advantages, weights)
    torch.testing.assert_close(total.item(), expected, **CLOSE)


@pytest.mark.parametrize("weights", [LITERAL, GATED, GRAOWeights(0.7, 0.2, 1.3, gate=True)])
@pytest.mark.parametrize("statistics", ["inside", "outside", "split"])
def test_coefficients_are_the_gradient_of_the_objective(statistics, weights):
    mean_logprobs, advantages = groups(statistics)
    mean_logprobs.requires_grad_()
    grao_objective(mean_logprobs, advantages, weights).total.backward()
    coefficients = grao_coefficients(advantages, weights) / B
    torch.testing.assert_close(mean_logprobs.grad, coefficients, **CLOSE)


def test_derivatives_are_those_stated_in_closed_form():
    """dJ/dl(o_i) = (1 + lambda) A_oi / G and dJ/dl(y) = (beta + lambda / G) A_y."""
    _, advantages = groups()
    coefficients = grao_coefficients(advantages, LITERAL)
    torch.testing.assert_close(coefficients[:, :-1], 1.6 * advantages[:, :-1] / G, **CLOSE)
    torch.testing.assert_close(coefficients[:, -1], (0.5 + 0.6 / G) * advantages[:, -1], **CLOSE)
    gated = grao_coefficients(advantages, GATED)[:, -1]
    expected = (0.5 + 0.6 / G) * advantages[:, -1].clamp(min=0)
    torch.testing.assert_close(gated, expected, **CLOSE)


def test_the_gate_leaves_completions_alone_and_never_pushes_the_reference_answer_down():
    _, advantages = groups()
    gated, literal = grao_coefficients(advantages, GATED), grao_coefficients(advantages, LITERAL)
    assert torch.equal(gated[:, :-1], literal[:, :-1])
    assert (gated[:, -1] >= 0).all()
    assert (literal[:, -1] < 0).any(), "the case the gate is for must be in the data"
    leads = advantages[:, -1] > 0
    assert torch.equal(gated[leads], literal[leads])


def test_inside_the_regularizer_only_rescales_exploration_and_imitation():
    """J = (1 + lambda) mean_i A_oi l(o_i) + (beta + lambda / G) A_y l(y)."""
    mean_logprobs, advantages = groups()
    exploration = (advantages[:, :-1] * mean_logprobs[:, :-1]).mean(dim=1)
    imitation = advantages[:, -1] * mean_logprobs[:, -1]
    expected = 1.6 * exploration + (0.5 + 0.6 / G) * imitation
    total = grao_terms_per_prompt(mean_logprobs, advantages, LITERAL).total
    torch.testing.assert_close(total, expected, **CLOSE)


def test_outside_the_regularizer_says_nothing_about_the_reference_answer():
    mean_logprobs, advantages = groups("outside")
    moved = mean_logprobs.clone()
    moved[:, -1] -= 3.0
    before = grao_terms_per_prompt(mean_logprobs, advantages, LITERAL).regularizer
    after = grao_terms_per_prompt(moved, advantages, LITERAL).regularizer
    torch.testing.assert_close(before, after, **CLOSE)


def test_gradcheck():
    mean_logprobs, advantages = groups()
    mean_logprobs.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda values: grao_objective(values, advantages, GATED).total, mean_logprobs
    )


def test_advantages_receive_no_gradient():
    mean_logprobs, advantages = groups()
    advantages.requires_grad_()
    mean_logprobs.requires_grad_()
    grao_objective(mean_logprobs, advantages, GATED).total.backward()
    assert advantages.grad is None


def test_zero_advantages_give_a_zero_objective_and_terms_without_size():
    mean_logprobs, _ = groups()
    terms = grao_objective(mean_logprobs, torch.zeros(B, G + 1, dtype=torch.double), GATED)
    assert terms.total.item() == 0.0
    assert all(size.item() == 0.0 for size in terms.sizes().values())


def test_shares_tend_to_625_0_375_when_the_reference_answer_has_no_advantage():
    """Exploration 1 against regularizer .6 of the same sum: 1/1.6, 0, .6/1.6."""
    mean_logprobs = -torch.rand(B, G + 1, dtype=torch.double)
    rewards = torch.tensor([[1.0] * 4 + [-1.0] * 4 + [0.0]], dtype=torch.double).expand(B, -1)
    terms = grao_terms_per_prompt(mean_logprobs, group_advantages(rewards), GATED)
    sizes = torch.stack(list(terms.sizes().values()))
    assert (sizes / sizes.sum()).tolist() == pytest.approx([0.625, 0.0, 0.375], abs=1e-12)


def test_order_inside_a_group_and_order_of_prompts_leave_the_objective_unchanged():
    mean_logprobs, advantages = groups()
    order = [*torch.randperm(G, generator=torch.Generator().manual_seed(1)).tolist(), G]
    prompts = torch.randperm(B, generator=torch.Generator().manual_seed(2))
    total = grao_objective(mean_logprobs, advantages, GATED).total
    shuffled = grao_objective(
        mean_logprobs[prompts][:, order], advantages[prompts][:, order], GATED
    ).total
    torch.testing.assert_close(total, shuffled, **CLOSE)


def test_shares_are_of_magnitudes_so_that_prompts_of_opposite_sign_do_not_cancel():
    terms = GRAOTerms(
        exploration=torch.tensor([3.0, -3.0], dtype=torch.double),
        imitation=torch.tensor([1.0, 1.0], dtype=torch.double),
        regularizer=torch.tensor([0.0, 0.0], dtype=torch.double),
    )
    assert [size.item() for size in terms.sizes().values()] == [6.0, 2.0, 0.0]
