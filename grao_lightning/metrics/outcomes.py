"""Scores of a policy over prompts, each with its 95 % interval: RAS, NAG, means and shares.

Source: the evaluation section of arXiv 2508.07750 (RAS, NAG). Every measure comes as a function of
counts or moments and as a thin `torchmetrics.Metric` that collects them batch by batch and over all
ranks; both return an `Estimate` of floats. Values are shares in [0, 1], or in [-1, 1] for a net
share; multiplying by 100 is left to whoever displays them.

All intervals take prompts as independent: give one outcome per prompt. Several completions of one
prompt agree with each other, so counting each as an outcome makes the interval too narrow.
"""

import math
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

TiesAs = Literal["win", "half", "loss"]
GainKind = Literal["wins", "net"]

_Z = NormalDist().inv_cdf(0.975)

# 97.5 % quantiles of Student's t with 1 to 10 degrees of freedom, where the series of `_t_quantile`
# is too coarse.
_T_QUANTILES = (
    *(12.706205, 4.302653, 3.182446, 2.776445, 2.570582),
    *(2.446912, 2.364624, 2.306004, 2.262157, 2.228139),
)


class Estimate(NamedTuple):
    """A measured value and the two ends of its 95 % interval; all NaN where nothing was measured.

    Attributes:
        value: The estimate itself.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float


def compare(scores: Tensor, baseline_scores: Tensor, tie_tolerance: float = 0.0) -> Tensor:
    """Return whether each score wins (+1), ties (0) or loses (-1) against the baseline's.

    Args:
        scores: Any shape; NaN means missing.
        baseline_scores: Same shape, same unit as `scores`; NaN means missing.
        tie_tolerance: Differences of at most this size are ties; same unit as the scores.

    Returns:
        Outcomes of the same shape, float32; NaN where either score is missing (or both are the same
        infinity).

    Raises:
        ValueError: If the shapes differ or `tie_tolerance` is not >= 0.

    >>> compare(torch.tensor([2.0, 1.0, 0.0, float("nan")]), torch.tensor([1.0, 1.0, 1.0, 1.0]))
    tensor([ 1.,  0., -1., nan])
    """
    if scores.shape != baseline_scores.shape:
        raise ValueError(
            "scores and baseline_scores must have the same shape, one entry per prompt: got "
            f"{tuple(scores.shape)} and {tuple(baseline_scores.shape)}"
        )
    if not tie_tolerance >= 0:
        raise ValueError(
            "tie_tolerance must be >= 0: it is the largest difference called a tie; got "
            f"{tie_tolerance}"
        )
    # At least float32: a bfloat16 difference would be rounded before it meets the tolerance.
    dtype = torch.promote_types(scores.dtype, torch.float32)
    difference = scores.detach().to(dtype) - baseline_scores.detach()
    sign = (difference > tie_tolerance).float() - (difference < -tie_tolerance).float()
    return sign.masked_fill(difference.isnan(), math.nan)


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Estimate:
    """Return the share `successes / n` with Wilson's score interval.

    It stays inside [0, 1] and keeps a width where the share is 0 or 1.

    Args:
        successes: Number of successes, in [0, n]; a fraction where an observation may count for
            less than one.
        n: Number of observations.
        confidence: Nominal coverage, in (0, 1).

    Returns:
        The share in [0, 1] and its interval; all NaN where n is 0.

    Raises:
        ValueError: If `successes` is not in [0, n] or `confidence` not in (0, 1).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and n: got {successes} of {n}")
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence must be a share between 0 and 1, such as 0.95; got {confidence}"
        )
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half_width = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    # At 0 and n successes the formula meets the share itself, up to a rounding error that would
    # leave it outside.
    return Estimate(
        share, max(0.0, min(share, centre - half_width)), min(1.0, max(share, centre + half_width))
    )


def relative_adversarial_score(
    wins: int, ties: int, losses: int, ties_as: TiesAs = "loss"
) -> Estimate:
    """Return RAS, the share of completions that beat their reference answer.

    Source: arXiv 2508.07750. Its definition counts R(o, y) > 0, its appendix combines wins and
    ties: hence `ties_as`, to be stated beside every figure. The interval is Wilson's. With "half"
    the mean outcome stands for the share in Wilson's formula. That is conservative: a variable in
    [0, 1] with mean p has a variance of at most p (1 - p).

    Args:
        wins: Number of prompts won.
        ties: Number of prompts tied.
        losses: Number of prompts lost.
        ties_as: What a tie counts as: "win" (1), "half" (0.5) or "loss" (0).

    Returns:
        The share in [0, 1] and its interval; all NaN without prompts.

    Raises:
        ValueError: If `ties_as` is unknown or a count is negative.

    >>> relative_adversarial_score(5, 2, 3).value, relative_adversarial_score(5, 2, 3, "win").value
    (0.5, 0.7)
    """
    _check_choice("ties_as", ties_as, get_args(TiesAs))
    _check_counts(wins, ties, losses)
    worth = {"win": 1.0, "half": 0.5, "loss": 0.0}[ties_as]
    return wilson_interval(wins + worth * ties, wins + ties + losses)


def normalized_alignment_gain(
    wins: int, ties: int, losses: int, kind: GainKind = "net"
) -> Estimate:
    """Return NAG, how often the trained policy scores above the untrained base, by prompt.

    Source: arXiv 2508.07750. It defines the share of wins ("wins"), yet its tables hold negative
    values, which a share cannot take and wins minus losses can: "net" is the default. The interval
    of "net" is the adjusted Wald interval of Bonett & Price (2012) for a difference of paired
    proportions: one win and one loss are added to the counts, so that it keeps its width when every
    prompt is won.

    Args:
        wins: Number of prompts on which the trained policy scores higher.
        ties: Number of prompts on which both score the same.
        losses: Number of prompts on which the untrained base scores higher.
        kind: "net", (wins - losses) / n, or "wins", wins / n with Wilson's interval.

    Returns:
        The gain, in [-1, 1] for "net" and in [0, 1] for "wins", and its interval; all NaN without
        prompts.

    Raises:
        ValueError: If `kind` is unknown or a count is negative.

    >>> normalized_alignment_gain(1, 2, 3).value, normalized_alignment_gain(3, 2, 1, "wins").value
    (-0.3333333333333333, 0.5)
    """
    _check_choice("kind", kind, get_args(GainKind))
    _check_counts(wins, ties, losses)
    n = wins + ties + losses
    if kind == "wins":
        return wilson_interval(wins, n)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan)
    win_share, loss_share = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    centre = win_share - loss_share
    half_width = _Z * math.sqrt((win_share + loss_share - centre**2) / (n + 2))
    return Estimate(
        (wins - losses) / n, max(-1.0, centre - half_width), min(1.0, centre + half_width)
    )


def mean_interval(mean: float, variance: float, n: int) -> Estimate:
    """Return a mean with Student's t interval, `mean +- t * sqrt(variance / n)`.

    Args:
        mean: Mean of the observations, in their unit.
        variance: Sample variance, divisor n - 1, in their unit squared.
        n: Number of observations.

    Returns:
        The mean and its interval, in the unit of the observations. Without observations all is NaN;
        with one the mean is given and the bounds are NaN, since one observation tells nothing about
        the spread.
    """
    if n < 2:
        return Estimate(mean if n == 1 else math.nan, math.nan, math.nan)
    half_width = _t_quantile(n - 1) * math.sqrt(variance / n)
    return Estimate(mean, mean - half_width, mean + half_width)


class _OutcomeCounts(Metric):
    """Counts of wins, ties and losses: integers, so that uneven shards sum to the exact figure."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    wins: Tensor
    ties: Tensor
    losses: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("wins", "ties", "losses"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outcomes: Tensor) -> None:
        """Add outcomes of any shape; their sign counts, NaN is left out."""
        self.wins += (outcomes > 0).sum()
        self.ties += (outcomes == 0).sum()
        self.losses += (outcomes < 0).sum()

    def _counts(self) -> tuple[int, int, int]:
        return int(self.wins), int(self.ties), int(self.losses)


class RelativeAdversarialScore(_OutcomeCounts):
    """Collects outcomes against the reference answers; `compute()` returns RAS.

    Args:
        ties_as: What a tie counts as, see `relative_adversarial_score`.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If `ties_as` is unknown.

    >>> metric = RelativeAdversarialScore(ties_as="half")
    >>> metric.update(torch.tensor([1.0, 0.0, -1.0, float("nan")]))
    >>> metric.compute().value
    0.5
    """

    def __init__(self, ties_as: TiesAs = "loss", **kwargs: Any) -> None:
        _check_choice("ties_as", ties_as, get_args(TiesAs))
        super().__init__(**kwargs)
        self.ties_as = ties_as

    def compute(self) -> Estimate:
        """Return RAS over all outcomes so far, on all ranks."""
        return relative_adversarial_score(*self._counts(), ties_as=self.ties_as)


class NormalizedAlignmentGain(_OutcomeCounts):
    """Collects outcomes against the untrained base; `compute()` returns NAG.

    Args:
        kind: Which gain, see `normalized_alignment_gain`.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If `kind` is unknown.

    >>> metric = NormalizedAlignmentGain()
    >>> metric.update(torch.tensor([1.0, 1.0, -1.0, 0.0]))
    >>> metric.compute().value
    0.25
    """

    def __init__(self, kind: GainKind = "net", **kwargs: Any) -> None:
        _check_choice("kind", kind, get_args(GainKind))
        super().__init__(**kwargs)
        self.kind = kind

    def compute(self) -> Estimate:
        """Return NAG over all outcomes so far, on all ranks."""
        return normalized_alignment_gain(*self._counts(), kind=self.kind)


class ShareWithInterval(Metric):
    """Collects booleans, one per prompt; `compute()` returns the share of True.

    >>> metric = ShareWithInterval()
    >>> metric.update(torch.tensor([True, False, True, True]))
    >>> metric.compute().value
    0.75
    """

    is_differentiable = False
    full_state_update = False

    hits: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add booleans of any shape.

        Raises:
            ValueError: If `values` is not boolean (NaN would silently count as True).
        """
        if values.dtype is not torch.bool:
            raise ValueError(
                f"values must be boolean, got {values.dtype}: compare first, as in `lengths > 0`"
            )
        self.hits += values.sum()
        self.total += values.numel()

    def compute(self) -> Estimate:
        """Return the share of True over all values so far, on all ranks."""
        return wilson_interval(int(self.hits), int(self.total))


class MeanWithInterval(Metric):
    """Collects values, one per prompt; `compute()` returns their mean.

    >>> metric = MeanWithInterval()
    >>> metric.update(torch.tensor([1.0, 3.0, float("nan")]))
    >>> metric.compute().value
    2.0
    """

    is_differentiable = False
    full_state_update = False

    moments: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # [3]: count, mean, sum of squared deviations. They are float64, kept as their bits in
        # int64, because Lightning's "bf16-true" casts every floating state to bfloat16 (where 256 +
        # 1 = 256) and MPS has no float64 at all.
        self.add_state("moments", torch.zeros(3, dtype=torch.int64), dist_reduce_fx=_merge_moments)

    def update(self, values: Tensor) -> None:
        """Add values of any shape and numeric dtype; NaN is left out."""
        values = values.detach().cpu().double()
        values = values[~values.isnan()]
        if values.numel() == 0:
            return
        mean = values.mean()
        batch = torch.stack(
            [torch.tensor(values.numel()).double(), mean, (values - mean).square().sum()]
        )
        self.moments = _merge_moments(
            torch.stack([self.moments.cpu(), batch.view(torch.int64)])
        ).to(self.device)

    def compute(self) -> Estimate:
        """Return the mean over all values so far, on all ranks."""
        count, mean, squared_deviations = self.moments.cpu().view(torch.float64).tolist()
        return mean_interval(mean, squared_deviations / max(count - 1, 1), int(count))


def _merge_moments(moments: Tensor) -> Tensor:
    """Return the moments [3] of K samples together, from theirs [K, 3]; int64 bits of float64.

    Chan's merge, for K samples at once: raw sums of squares would cancel where the mean is large
    beside the spread.
    """
    counts, means, squared_deviations = moments.cpu().view(torch.float64).unbind(dim=-1)
    total = counts.sum()
    mean = (counts * means).sum() / total.clamp(min=1)
    merged = torch.stack(
        [total, mean, (squared_deviations + counts * (means - mean).square()).sum()]
    )
    return merged.view(torch.int64).to(moments.device)


def _t_quantile(degrees_of_freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, to a relative error below 3e-6.

    Source: tabulated up to 10 degrees of freedom, then Abramowitz & Stegun 26.7.5.
    """
    if degrees_of_freedom <= len(_T_QUANTILES):
        return _T_QUANTILES[degrees_of_freedom - 1]
    z, v = _Z, degrees_of_freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _check_counts(wins: int, ties: int, losses: int) -> None:
    if min(wins, ties, losses) < 0:
        raise ValueError(f"counts must be >= 0: got wins={wins}, ties={ties}, losses={losses}")
