"""Means over prompts and seeds with intervals, paired differences, steps to a level. Pure: numpy.

Shapes: S seeds, P prompts; every seed meets the same prompts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Crossed(NamedTuple):
    """A mean over prompts and seeds.

    Attributes:
        value: The mean.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p: Two-sided probability of a mean so far from 0 if there were none.
    """

    value: float
    low: float
    high: float
    p: float


def crossed_mean(values: np.ndarray, bounds: tuple[float, float] = (-1.0, 1.0)) -> Crossed:
    """Return the mean of values by seed and prompt, its interval covering new seeds and prompts.

    Prompts and seeds are crossed random effects: ``Var(mean) = (MS_prompt + MS_seed - MS_rest) /
    (S P)`` in terms of the mean squares of the two-way table, with Satterthwaite's degrees of
    freedom. Where seeds differ by no more than prompts explain, that is the interval over prompts;
    where they differ much, it is nearly Student's over S seeds, and wide for few of them. One seed
    alone: over prompts.

    Source: Brennan, "Generalizability Theory" (2001), chapter 6; Satterthwaite (1946).

    Args:
        values: [S, P]; a prompt that is NaN for a seed is left out for all of them.
        bounds: The values' range. Where all are the same, which leaves no spread to estimate, the
            interval is that of P prompts of which none (or all) differ: the rule of three.

    Returns:
        All NaN without prompts.
    """
    values = values[:, ~np.isnan(values).any(axis=0)]
    num_prompts = values.shape[1]
    if num_prompts < 2:
        return Crossed(*[math.nan] * 4)
    mean = float(values.mean())
    variance, freedom = _variance_of_mean(values)
    if variance <= 0:
        margin = (bounds[1] - bounds[0]) * 3 / num_prompts
        low, high = max(bounds[0], mean - margin), min(bounds[1], mean + margin)
        return Crossed(mean, low, high, 1.0 if mean == 0 else 0.0)
    from scipy.stats import t

    error = math.sqrt(variance)
    half_width = float(t.ppf(0.975, freedom)) * error
    p = 2 * float(t.sf(abs(mean) / error, freedom))
    low, high = max(bounds[0], mean - half_width), min(bounds[1], mean + half_width)
    return Crossed(mean, low, high, p)


def _variance_of_mean(values: np.ndarray) -> tuple[float, float]:
    """Return the variance of the mean and its degrees of freedom."""
    num_seeds, num_prompts = values.shape
    by_prompt, by_seed, mean = values.mean(axis=0), values.mean(axis=1), values.mean()
    prompt_square = num_seeds * np.square(by_prompt - mean).sum() / (num_prompts - 1)
    if num_seeds == 1:
        return float(prompt_square / num_prompts), num_prompts - 1
    seed_square = num_prompts * np.square(by_seed - mean).sum() / (num_seeds - 1)
    rest = values - by_prompt - by_seed[:, None] + mean
    rest_freedom = (num_seeds - 1) * (num_prompts - 1)
    rest_square = np.square(rest).sum() / rest_freedom
    # An effect estimated below 0 is none: its mean square is then the rest's.
    prompt_square, seed_square = max(prompt_square, rest_square), max(seed_square, rest_square)
    total = prompt_square + seed_square - rest_square
    if total <= 0:
        return 0.0, 1.0
    freedom = total**2 / (
        prompt_square**2 / (num_prompts - 1)
        + seed_square**2 / (num_seeds - 1)
        + rest_square**2 / rest_freedom
    )
    return float(total / (num_seeds * num_prompts)), float(freedom)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Return p-values adjusted for being several, by Holm's step-down rule (1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = largest
    return adjusted


def first_crossing(
    positions: Sequence[float], values: Sequence[float], level: float
) -> float | None:
    """Return where a curve first reaches a level, straight lines between its points.

    Args:
        positions: Rising, such as steps.
        values: Of the curve at these.
        level: In the unit of the values.

    Returns:
        None where it never does.
    """
    for at, (position, value) in enumerate(zip(positions, values, strict=True)):
        if value >= level:
            if at == 0:
                return position
            before, under = positions[at - 1], values[at - 1]
            return before + (position - before) * (level - under) / (value - under)
    return None
