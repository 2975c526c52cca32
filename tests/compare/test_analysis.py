"""Intervals hold what they promise, on data whose truth is known."""

import numpy as np
import pytest

from grao_lightning.compare.analysis import crossed_mean, first_crossing, holm


def simulated(random, prompts=100, seeds=5, prompt_sd=0.3, seed_sd=0.05, mean=0.5):
    """Return wins [S, P] whose chance has an effect of the prompt and one of the seed."""
    chance = (
        mean
        + prompt_sd * random.standard_normal(prompts)
        + seed_sd * random.standard_normal((seeds, 1))
    )
    return (random.random((seeds, prompts)) < chance.clip(0, 1)).astype(float)


@pytest.mark.parametrize("seed_sd", [0.0, 0.05, 0.15])
def test_intervals_cover_the_truth_of_new_prompts_and_seeds(seed_sd):
    random = np.random.default_rng(0)
    truth = np.mean([simulated(random, seed_sd=seed_sd).mean() for _ in range(4000)])
    found = [crossed_mean(simulated(random, seed_sd=seed_sd), (0.0, 1.0)) for _ in range(600)]
    covered = np.mean([one.low <= truth <= one.high for one in found])
    assert 0.925 <= covered <= 0.99  # 95 % nominal; its own standard error is below 1 %


def test_seeds_that_differ_widen_an_interval_that_prompts_alone_would_make_too_narrow():
    random = np.random.default_rng(1)
    values = simulated(random, seed_sd=0.2, seeds=3)
    both, prompts_alone = crossed_mean(values), crossed_mean(values.mean(axis=0)[None])
    assert both.high - both.low > 3 * (prompts_alone.high - prompts_alone.low)
    assert both.value == pytest.approx(prompts_alone.value)


def test_seeds_that_are_copies_give_the_interval_of_one_seed():
    one = simulated(np.random.default_rng(2), seeds=1)
    thrice = crossed_mean(np.repeat(one, 3, axis=0), (0.0, 1.0))
    alone = crossed_mean(one, (0.0, 1.0))
    assert thrice[:3] == pytest.approx(alone[:3], abs=2e-3)


def test_p_values_are_uniform_where_there_is_no_difference():
    random = np.random.default_rng(3)
    p_values = np.array([crossed_mean(simulated(random) - simulated(random)).p for _ in range(600)])
    assert (p_values < 0.05).mean() < 0.07
    assert 0.4 < p_values.mean() < 0.6


def test_a_clear_difference_has_a_small_p():
    random = np.random.default_rng(4)
    found = crossed_mean(simulated(random, mean=0.8) - simulated(random, mean=0.4))
    assert found.p < 0.01 and found.low > 0.2


def test_without_any_spread_the_interval_is_the_rule_of_three():
    assert crossed_mean(np.ones((3, 60)), (0.0, 1.0))[:3] == (1.0, 0.95, 1.0)


def test_a_prompt_without_a_verdict_is_left_out_for_every_seed():
    values = simulated(np.random.default_rng(5))
    holed = values.copy()
    holed[2, 7] = np.nan
    assert crossed_mean(holed) == crossed_mean(np.delete(values, 7, axis=1))
    assert np.isnan(crossed_mean(np.full((2, 3), np.nan)).value)


def test_holm_by_hand():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert found == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9})


@pytest.mark.parametrize(
    ("level", "position"), [(0.5, 15.0), (0.2, 0.0), (0.6, 20.0), (0.95, None), (0.75, 35.0)]
)
def test_a_level_is_first_reached_on_the_straight_line_between_points(level, position):
    positions, values = [0, 10, 20, 30, 40], [0.2, 0.4, 0.6, 0.5, 1.0 - 0.1]
    found = first_crossing(positions, values, level)
    if level == 0.75:
        position = 30 + 10 * (0.75 - 0.5) / (0.9 - 0.5)
    assert found == (None if position is None else pytest.approx(position))
