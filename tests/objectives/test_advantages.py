"""Laws of group_advantages, from the algebra of arXiv 2508.07750, equation 4."""

import math

import pytest
import torch

from grao_lightning.objectives.advantages import group_advantages

NAN = math.nan


def random_rewards(num_prompts: int = 64, group_size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_prompts, group_size + 1, generator=generator, dtype=torch.double)


@pytest.mark.parametrize(
    ("outcomes", "of_reference_answer", "of_completions"),
    [
        # mean -8/9, population std sqrt(8)/9 * ... : (0 + 8/9) / (sqrt(8)/9) = sqrt(8)
        ([-1.0] * 8, math.sqrt(8), {-1.0: -1 / math.sqrt(8)}),
        ([1.0] * 8, -math.sqrt(8), {1.0: 1 / math.sqrt(8)}),
        ([0.0] * 8, 0.0, {0.0: 0.0}),
        # mean -6/9, E[x^2] 8/9, std sqrt(8/9 - 4/9) = 2/3: (0 + 2/3)/(2/3), (1 + 2/3)/(2/3), ...
        ([1.0] + [-1.0] * 7, 1.0, {1.0: 2.5, -1.0: -0.5}),
        # mean 0, std sqrt(8/9)
        ([1.0] * 4 + [-1.0] * 4, 0.0, {1.0: math.sqrt(9 / 8), -1.0: -math.sqrt(9 / 8)}),
    ],
)
def test_ternary_outcomes_give_the_advantages_worked_out_by_hand(
    outcomes, of_reference_answer, of_completions
):
    rewards = torch.tensor([[*outcomes, 0.0]], dtype=torch.double)
    advantages = group_advantages(rewards)
    expected = [*(of_completions[outcome] for outcome in outcomes), of_reference_answer]
    torch.testing.assert_close(
        advantages, torch.tensor([expected], dtype=torch.double), atol=1e-12, rtol=0
    )


def test_inside_advantages_of_a_group_sum_to_zero_and_their_squares_to_its_size():
    advantages = group_advantages(random_rewards())
    zeros = torch.zeros(64, dtype=torch.double)
    torch.testing.assert_close(advantages.sum(dim=1), zeros, atol=1e-12, rtol=0)
    torch.testing.assert_close(advantages.square().sum(dim=1), zeros + 9, atol=1e-12, rtol=0)


def test_outside_completions_sum_to_zero_without_the_reference_answer():
    rewards = random_rewards()
    advantages = group_advantages(rewards, statistics="outside")
    zeros = torch.zeros(64, dtype=torch.double)
    torch.testing.assert_close(advantages[:, :-1].sum(dim=1), zeros, atol=1e-12, rtol=0)
    # The reference answer is measured on the completions' scale.
    mean, std = rewards[:, :-1].mean(dim=1), rewards[:, :-1].std(dim=1, correction=0)
    expected = (rewards[:, -1] - mean) / std
    torch.testing.assert_close(advantages[:, -1], expected, atol=1e-12, rtol=1e-12)


def test_split_takes_completions_from_outside_and_the_reference_answer_from_inside():
    rewards = random_rewards()
    split = group_advantages(rewards, statistics="split")
    outside = group_advantages(rewards, statistics="outside")
    inside = group_advantages(rewards, statistics="inside")
    assert torch.equal(split[:, :-1], outside[:, :-1])
    assert torch.equal(split[:, -1], inside[:, -1])


@pytest.mark.parametrize("statistics", ["inside", "outside", "split"])
def test_equal_rewards_give_zero_advantages_even_with_rounding_noise(statistics):
    rewards = 0.1 + 1e-8 * random_rewards()  # spread below the tolerance of 1e-6
    assert torch.equal(
        group_advantages(rewards, statistics=statistics)[:, :-1],
        torch.zeros(64, 8, dtype=torch.double),
    )


def test_a_spread_above_the_tolerance_counts():
    rewards = torch.tensor([[0.0, 0.0, 3e-6]], dtype=torch.double)
    assert group_advantages(rewards).abs().min() > 0.5
    assert torch.equal(group_advantages(rewards, tolerance=1e-5), torch.zeros_like(rewards))


@pytest.mark.parametrize("statistics", ["inside", "outside", "split"])
def test_missing_rewards_are_left_out_of_the_statistics(statistics):
    rewards = random_rewards(group_size=5)
    with_gap = torch.cat([rewards[:, :2], torch.full((64, 1), NAN), rewards[:, 2:]], dim=1)
    advantages = group_advantages(with_gap, statistics=statistics)
    assert torch.equal(advantages[:, 2], torch.zeros(64, dtype=torch.double))
    without_gap = group_advantages(rewards, statistics=statistics)
    kept = torch.cat([advantages[:, :2], advantages[:, 3:]], dim=1)
    torch.testing.assert_close(kept, without_gap, atol=1e-12, rtol=0)


def test_a_missing_reference_answer_gets_zero_and_leaves_the_completions_their_own_statistics():
    rewards = random_rewards()
    rewards[:, -1] = NAN
    expected = group_advantages(random_rewards(), statistics="outside")[:, :-1]
    advantages = group_advantages(rewards)
    torch.testing.assert_close(advantages[:, :-1], expected, atol=1e-12, rtol=0)
    assert torch.equal(advantages[:, -1], torch.zeros(64, dtype=torch.double))


def test_a_group_without_rewards_gets_zeros():
    assert torch.equal(group_advantages(torch.full((1, 4), NAN)), torch.zeros(1, 4))


def test_advantages_do_not_change_with_the_unit_or_the_origin_of_the_rewards():
    rewards = random_rewards()
    moved = group_advantages(1000.0 * rewards - 7.0)
    torch.testing.assert_close(moved, group_advantages(rewards), atol=1e-9, rtol=0)


def test_the_order_of_completions_in_a_group_moves_their_advantages_along():
    rewards = random_rewards()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = torch.cat([rewards[:, :-1][:, order], rewards[:, -1:]], dim=1)
    advantages = group_advantages(rewards)
    expected = torch.cat([advantages[:, :-1][:, order], advantages[:, -1:]], dim=1)
    torch.testing.assert_close(group_advantages(shuffled), expected, atol=1e-12, rtol=0)


def test_an_unknown_choice_of_statistics_lists_the_valid_ones():
    with pytest.raises(ValueError, match="inside, outside, split; got 'median'"):
        group_advantages(random_rewards(), statistics="median")  # type: ignore[arg-type]


def test_rewards_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(9,\)"):
        group_advantages(torch.zeros(9))
