"""How well scores tell chosen from rejected answers on held-out pairs, and what length has to do.

Pure functions of the margins, and a `torchmetrics.Metric` that collects them over all ranks. A
margin is the chosen answer's score minus the rejected one's, in log-odds. Shapes: n pairs.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from grao_lightning.metrics.outcomes import Estimate, mean_interval, wilson_interval

_Z = 1.959964  # 97.5 % quantile of the normal distribution
BINS = 10


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs of similar confidence.

    Attributes:
        confidence: Mean predicted probability that the answer of the higher score is the chosen
            one, in [0.5, 1].
        accuracy: Share of pairs where it is, with Wilson's interval; a tie counts as half.
        number: Of pairs.
    """

    confidence: float
    accuracy: Estimate
    number: int


def pair_accuracy(margins: Tensor) -> Estimate:
    """Return the share of pairs with a positive margin, a tie counting as half.

    Args:
        margins: [n].

    Returns:
        The share in [0, 1] with Wilson's interval; NaN without pairs.

    >>> pair_accuracy(torch.tensor([1.0, 2.0, 0.0, -1.0])).value
    0.625
    """
    right = (margins > 0).sum().item() + 0.5 * (margins == 0).sum().item()
    return wilson_interval(right, len(margins))


def reliability(margins: Tensor, bins: int = BINS) -> list[ReliabilityBin]:
    """Return the pairs by confidence ``max(p, 1 - p)`` with ``p = sigmoid(margin)``.

    Bins without pairs are left out.

    Args:
        margins: [n] in log-odds.
        bins: Of equal width over [0.5, 1].
    """
    confidence = torch.sigmoid(margins.double().abs())
    number_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    found = []
    for number in range(bins):
        inside = number_of == number
        if inside.any():
            mean = confidence[inside].mean().item()
            found.append(
                ReliabilityBin(mean, pair_accuracy(margins[inside]), int(inside.sum().item()))
            )
    return found


def calibration_error(margins: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error: how far confidence and accuracy are apart, on average.

    Source: arXiv 1706.04599, equation 3. Chance alone makes it larger than 0 on few pairs.

    Args:
        margins: [n] in log-odds.
        bins: See `reliability`.

    Returns:
        A mean difference of shares, in [0, 1]; NaN without pairs.
    """
    if not len(margins):
        return math.nan
    parts = reliability(margins, bins)
    apart = [part.number * abs(part.accuracy.value - part.confidence) for part in parts]
    return sum(apart) / len(margins)


def rank_correlation(left: Tensor, right: Tensor) -> Estimate:
    """Return Spearman's rank correlation, ties sharing their mean rank.

    The interval is Fisher's z with the standard error of Bonett & Wright (2000),
    ``sqrt((1 + r^2 / 2) / (n - 3))``.

    Args:
        left: [n].
        right: [n].

    Returns:
        In [-1, 1]; NaN where either is constant, its bounds for fewer than 4 pairs.

    >>> rank_correlation(torch.tensor([1, 2, 3]), torch.tensor([1, 9, 4])).value
    0.5
    """
    n = len(left)
    if n < 2:
        return Estimate(math.nan, math.nan, math.nan)
    ranks = [_ranks(values) for values in (left, right)]
    centred = [rank - rank.mean() for rank in ranks]
    spread = (centred[0].square().sum() * centred[1].square().sum()).sqrt()
    if spread == 0:
        return Estimate(math.nan, math.nan, math.nan)
    value = min(1.0, max(-1.0, ((centred[0] * centred[1]).sum() / spread).item()))
    if n < 4 or abs(value) == 1.0:
        return Estimate(value, math.nan, math.nan)
    half_width = _Z * math.sqrt((1 + value**2 / 2) / (n - 3))
    z = math.atanh(value)
    return Estimate(value, math.tanh(z - half_width), math.tanh(z + half_width))


class PairMetrics(Metric):
    """Collects pairs over all ranks; `compute()` returns what a reward model is judged by.

    - ``accuracy``: see `pair_accuracy`.
    - ``loss``: mean of the plain Bradley-Terry loss.
    - ``margin``: their mean.
    - ``calibration_error``: see `calibration_error`; without interval.
    - ``length_correlation``: Spearman's, of margin and difference in length.

    >>> metric = PairMetrics()
    >>> metric.update(torch.tensor([1.0, -1.0]), torch.tensor([3, 5]))
    >>> metric.compute()["accuracy"].value
    0.5
    """

    is_differentiable = False
    full_state_update = False

    pairs: list[Tensor]

    #: Of what `compute` returns.
    names = ("accuracy", "loss", "margin", "calibration_error", "length_correlation")
    #: Of these, the ones that have no interval.
    without_interval = ("calibration_error",)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        #: Of the pairs that `compute` saw last.
        self.reliability: list[ReliabilityBin] = []
        # [2n] a batch: margins, each with its difference in length, as the bits of float64 in
        # int64, which "bf16-true" leaves alone.
        self.add_state("pairs", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all pairs."""
        super().reset()
        # A rank that gets no pair still takes part in gathering them, with a tensor of this kind.
        self.pairs.append(torch.empty(0, dtype=torch.int64, device=self.device))

    def update(self, margins: Tensor, length_differences: Tensor) -> None:
        """Add pairs.

        Args:
            margins: [n] in log-odds.
            length_differences: [n] length of the chosen answer minus the rejected one's.
        """
        both = torch.stack([margins.detach().cpu().double(), length_differences.cpu().double()], 1)
        self.pairs.append(both.view(torch.int64).flatten().to(self.device))

    def _sorted(self) -> tuple[Tensor, Tensor]:
        """Return margins [n] and differences in length [n] of all pairs, in an order of their own.

        Sums of floats would else depend on the ranks and batches they came in.
        """
        values = dim_zero_cat(self.pairs).cpu().view(torch.float64).view(-1, 2)
        order = sorted(range(len(values)), key=lambda number: tuple(values[number].tolist()))
        margins, lengths = values[order].unbind(dim=1)
        return margins, lengths

    def compute(self) -> dict[str, Estimate]:
        """Return every figure with its interval, over all ranks."""
        margins, lengths = self._sorted()
        self.reliability = reliability(margins)
        return {
            "accuracy": pair_accuracy(margins),
            "loss": _mean(-F.logsigmoid(margins)),
            "margin": _mean(margins),
            "calibration_error": Estimate(calibration_error(margins), math.nan, math.nan),
            "length_correlation": rank_correlation(margins, lengths),
        }


def _mean(values: Tensor) -> Estimate:
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan)
    variance = values.var().item() if len(values) > 1 else math.nan
    return mean_interval(values.mean().item(), variance, len(values))


def _ranks(values: Tensor) -> Tensor:
    """Return mean ranks, [n] float64."""
    _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]
