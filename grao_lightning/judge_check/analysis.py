"""Differences between the scores of chosen and rejected answers -> figures. Pure: numpy.

Shapes: P pairs. A difference > 0 means that the scorer prefers the chosen answer, 0 is a tie, NaN
is missing. Intervals take pairs as independent.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from grao_lightning.metrics.outcomes import Estimate, wilson_interval


@dataclass(frozen=True)
class Figures:
    """How one scorer did on pairs of a chosen and a rejected answer.

    Ties count as half in every share but `ties`; missing pairs count in `missing` alone.

    Attributes:
        pairs: Pairs that it was asked for.
        judged: Of these, not missing.
        missing: Share of `pairs`.
        accuracy: Share of `judged` in which the chosen answer is preferred.
        ties: Share of `judged`.
        prefers_longer: Share in which the longer answer is preferred; pairs of equal length are
            left out here and below.
        people_prefer_longer: Share of the same pairs in which the chosen answer is the longer one.
        accuracy_chosen_longer: Accuracy where the chosen answer is the longer one.
        accuracy_chosen_shorter: Accuracy where it is the shorter one.
        num_chosen_longer: Number of judged pairs of the former kind.
        num_chosen_shorter: Number of judged pairs of the latter kind.
        length_correlation: Of differences in score with differences in length, see there.
    """

    pairs: int
    judged: int
    missing: Estimate
    accuracy: Estimate
    ties: Estimate
    prefers_longer: Estimate
    people_prefer_longer: Estimate
    accuracy_chosen_longer: Estimate
    accuracy_chosen_shorter: Estimate
    num_chosen_longer: int
    num_chosen_shorter: int
    length_correlation: float


class Agreement(NamedTuple):
    """How far two scorers prefer the same answers.

    Attributes:
        pairs: Pairs that both have decided: neither a tie nor missing.
        share: Of these, in which both prefer the same answer.
        kappa: Cohen's, see `agreement`.
    """

    pairs: int
    share: Estimate
    kappa: float


def figures_of(differences: np.ndarray, longer_by: np.ndarray) -> Figures:
    """Return a scorer's figures.

    Args:
        differences: [P] score of the chosen minus that of the rejected answer, or a verdict.
        longer_by: [P] length of the chosen minus that of the rejected answer.
    """
    judged = ~np.isnan(differences)
    wins = (np.sign(differences[judged]) + 1) / 2  # 1 the chosen answer is preferred, 0.5 a tie
    longer_by = longer_by[judged]
    longer, shorter = longer_by > 0, longer_by < 0
    return Figures(
        pairs=len(differences),
        judged=len(wins),
        missing=wilson_interval(len(differences) - len(wins), len(differences)),
        accuracy=_share(wins),
        ties=_share(wins == 0.5),
        prefers_longer=_share(np.concatenate([wins[longer], 1 - wins[shorter]])),
        people_prefer_longer=_share(longer[longer | shorter]),
        accuracy_chosen_longer=_share(wins[longer]),
        accuracy_chosen_shorter=_share(wins[shorter]),
        num_chosen_longer=int(longer.sum()),
        num_chosen_shorter=int(shorter.sum()),
        length_correlation=length_correlation(differences[judged], longer_by),
    )


def length_correlation(differences: np.ndarray, longer_by: np.ndarray) -> float:
    """Return Spearman's rank correlation of differences in score with differences in length.

    Every pair is counted both ways round, chosen minus rejected and rejected minus chosen: which
    of the two people preferred is no matter of the scorer's taste in length.

    Args:
        differences: [P] in score, none missing.
        longer_by: [P] in length.

    Returns:
        In [-1, 1]; NaN where one of the two has no differences.
    """
    if not differences.any() or not longer_by.any():
        return math.nan
    from scipy.stats import spearmanr

    both = (np.concatenate([values, -values]) for values in (differences, longer_by))
    return float(spearmanr(*both).statistic)


def agreement(left: np.ndarray, right: np.ndarray) -> Agreement:
    """Return how far two scorers prefer the same answers.

    Cohen's kappa takes off what they would agree by chance, each preferring the chosen answer as
    often as it does: two accurate scorers agree often, and have a kappa of 0 if their errors have
    nothing in common.

    Source: Cohen (1960), equation 1.

    Args:
        left: [P] differences of one scorer.
        right: [P] those of another one, for the same pairs.

    Returns:
        A kappa of NaN where chance alone would make them agree always.
    """
    # A comparison with NaN is false: where one is missing, neither is preferred.
    decided = ((left > 0) | (left < 0)) & ((right > 0) | (right < 0))
    left_wins, right_wins = left[decided] > 0, right[decided] > 0
    share = _share(left_wins == right_wins)
    if not len(left_wins):
        return Agreement(0, share, math.nan)
    p, q = left_wins.mean(), right_wins.mean()
    chance = float(p * q + (1 - p) * (1 - q))
    kappa = (share.value - chance) / (1 - chance) if chance < 1 else math.nan
    return Agreement(len(left_wins), share, kappa)


def _share(values: np.ndarray) -> Estimate:
    return wilson_interval(float(values.sum()), len(values))
