"""Figures of a judge check by hand, and against scikit-learn and scipy."""

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from grao_lightning.judge_check.analysis import agreement, figures_of, length_correlation
from grao_lightning.metrics.outcomes import wilson_interval

NAN = math.nan
#      chosen longer: 2 wins, 1 tie, 1 loss, 1 missing | shorter: 1 win, 2 losses | equal: win, tie
DIFFERENCES = np.array([0.5, 2.0, 0.0, -1.0, NAN, 3.0, -0.1, -4.0, 1.0, 0.0])
LONGER_BY = np.array([10, 20, 5, 7, 300, -1, -2, -9, 0, 0])


def test_every_figure_by_hand():
    one = figures_of(DIFFERENCES, LONGER_BY)
    assert (one.pairs, one.judged) == (10, 9)
    assert one.missing == wilson_interval(1, 10)
    # 4 wins of 9, 2 ties at half
    assert one.accuracy == wilson_interval(5, 9)
    assert one.ties == wilson_interval(2, 9)
    # 4 judged pairs have the longer answer chosen, of which 2 are won and 1 is tied
    assert one.num_chosen_longer == 4
    assert one.accuracy_chosen_longer == wilson_interval(2.5, 4)
    assert one.num_chosen_shorter == 3
    assert one.accuracy_chosen_shorter == wilson_interval(1, 3)
    # the longer answer is preferred where it is chosen and wins, or is rejected and wins
    assert one.prefers_longer == wilson_interval(2.5 + 2, 7)
    assert one.people_prefer_longer == wilson_interval(4, 7)


def random_pairs(seed: int, number: int = 400) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    differences = random.normal(0.3, 1, number).round(1)  # rounded: some ties
    differences[random.random(number) < 0.1] = NAN
    return differences, random.integers(-30, 31, number)


@pytest.mark.parametrize("unit", [0.001, 1000.0])
def test_the_scorers_unit_changes_no_figure(unit):
    differences, longer_by = random_pairs(0)
    assert figures_of(unit * differences, longer_by) == figures_of(differences, longer_by)


def test_a_missing_pair_counts_as_missing_and_nowhere_else():
    differences, longer_by = random_pairs(1)
    present = ~np.isnan(differences)
    whole = vars(figures_of(differences, longer_by))
    without = vars(figures_of(differences[present], longer_by[present]))
    assert whole.pop("pairs") - without.pop("pairs") == (~present).sum()
    assert whole.pop("missing").value > without.pop("missing").value == 0
    assert whole == without


def test_a_scorer_that_goes_by_length_shows_as_one():
    longer_by = np.array([3, 8, -2, 9, -7, 4])
    longest = figures_of(longer_by.astype(float), longer_by)
    assert longest.prefers_longer.value == 1 and longest.length_correlation == pytest.approx(1)
    assert longest.accuracy_chosen_longer.value == 1
    assert longest.accuracy_chosen_shorter.value == 0
    assert longest.accuracy == longest.people_prefer_longer == wilson_interval(4, 6)


def test_one_that_is_always_right_prefers_the_longer_answer_as_often_as_people_do():
    longer_by = np.array([3, 8, -2, 9, -7, 4])
    right = figures_of(np.ones(6), longer_by)
    assert right.prefers_longer == right.people_prefer_longer
    assert right.accuracy_chosen_longer.value == right.accuracy_chosen_shorter.value == 1


def test_taste_in_length_does_not_depend_on_what_people_preferred():
    differences, longer_by = random_pairs(2)
    turned = np.where(np.random.default_rng(3).random(len(differences)) < 0.5, -1, 1)
    before, after = (
        figures_of(sign * differences, sign * longer_by) for sign in (np.ones_like(turned), turned)
    )
    assert after.prefers_longer == before.prefers_longer
    assert after.length_correlation == pytest.approx(before.length_correlation)
    assert after.accuracy != before.accuracy


def test_correlation_is_scipys_of_all_pairs_both_ways_round():
    differences, longer_by = random_pairs(4)
    present = ~np.isnan(differences)
    both_ways = [
        (sign * difference, sign * longer)
        for difference, longer in zip(differences[present], longer_by[present], strict=True)
        for sign in (1, -1)
    ]
    expected = spearmanr(*zip(*both_ways, strict=True)).statistic
    found = figures_of(differences, longer_by).length_correlation
    assert found == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
def test_without_differences_there_is_no_correlation():
    assert math.isnan(length_correlation(np.zeros(3), np.array([1, 2, 3])))
    assert math.isnan(length_correlation(np.ones(3), np.zeros(3)))
    assert math.isnan(length_correlation(np.empty(0), np.empty(0)))


def test_a_scorer_that_judged_nothing_has_no_shares():
    one = figures_of(np.full(3, NAN), np.array([1, -1, 0]))
    assert one.judged == 0 and one.missing == wilson_interval(3, 3)
    assert math.isnan(one.accuracy.value) and math.isnan(one.length_correlation)


def test_agreement_by_hand_over_the_pairs_that_both_decide():
    left = np.array([1.0, 2.0, -1.0, 3.0, -5.0, 0.0, 1.0, NAN, 1.0])
    right = np.array([0.1, -1.0, -2.0, 4.0, 6.0, 1.0, 0.0, 1.0, NAN])
    found = agreement(left, right)
    # the first five; both prefer the same answer in the first, third and fourth
    assert (found.pairs, found.share) == (5, wilson_interval(3, 5))
    # each prefers the chosen answer in 3 of 5: chance 0.36 + 0.16
    assert found.kappa == pytest.approx((0.6 - 0.52) / (1 - 0.52))


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_scikit_learns(seed):
    left, right = random_pairs(seed)[0], random_pairs(seed + 50)[0] + 0.5
    right[:150] = left[:150]
    decided = [
        (a > 0, b > 0)
        for a, b in zip(left, right, strict=True)
        if not (math.isnan(a) or math.isnan(b) or a == 0 or b == 0)
    ]
    found = agreement(left, right)
    assert found.pairs == len(decided)
    assert found.kappa == pytest.approx(cohen_kappa_score(*zip(*decided, strict=True)))
    turned = agreement(right, left)
    assert turned[:2] == found[:2] and turned.kappa == pytest.approx(found.kappa)


def test_accurate_scorers_whose_errors_have_nothing_in_common_agree_often_at_kappa_0():
    pairs = list(product([1.0, 1.0, 1.0, -1.0], repeat=2))  # each right in 3 of 4
    found = agreement(*np.array(pairs).T)
    assert found.share.value == 10 / 16
    assert found.kappa == pytest.approx(0)


def test_no_kappa_where_nothing_is_decided_or_chance_alone_explains_all():
    nothing = agreement(np.array([0.0, NAN]), np.array([1.0, 1.0]))
    assert nothing.pairs == 0 and math.isnan(nothing.share.value) and math.isnan(nothing.kappa)
    always = agreement(np.ones(4), np.ones(4))
    assert always.share.value == 1 and math.isnan(always.kappa)
