"""Figures over all answers of a validation that no sum by batch gives: ratios, different texts."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from grao_lightning.metrics.outcomes import Estimate, mean_interval


def ratio_interval(numerators: Tensor, denominators: Tensor) -> Estimate:
    """Return ``sum(numerators) / sum(denominators)`` with its interval over rows.

    Rows are what is drawn at random, not the tokens in them: the interval is Student's t on the
    ratio's linearisation, ``(numerator - ratio * denominator) / mean(denominator)``.

    Args:
        numerators: [n], such as the nats of each answer.
        denominators: [n], such as its tokens.

    Returns:
        All NaN without rows; the bounds are NaN with one row.

    >>> ratio_interval(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 2.0])).value
    2.0
    """
    n = len(numerators)
    if not n:
        return Estimate(math.nan, math.nan, math.nan)
    numerators, denominators = numerators.double(), denominators.double()
    ratio = numerators.sum() / denominators.sum()
    residuals = (numerators - ratio * denominators) / denominators.mean()
    variance = residuals.square().sum().item() / (n - 1) if n > 1 else math.nan
    return mean_interval(ratio.item(), variance, n)


class _Gathered(Metric):
    """Collects rows of int64 over all ranks, in an order that neither ranks nor batches decide."""

    is_differentiable = False
    full_state_update = False

    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        # A rank that gets none still takes part in gathering them, with a tensor of this kind.
        self.rows.append(torch.empty(0, dtype=torch.int64, device=self.device))


class RatioWithInterval(_Gathered):
    """Collects two numbers a row; `compute()` returns the ratio of their sums.

    >>> metric = RatioWithInterval()
    >>> metric.update(torch.tensor([1.0, 5.0]), torch.tensor([1, 2]))
    >>> metric.compute().value
    2.0
    """

    def update(self, numerators: Tensor, denominators: Tensor) -> None:
        """Add rows: [n] numerators and their [n] denominators."""
        both = torch.stack([numerators.detach().cpu().double(), denominators.cpu().double()], dim=1)
        # As the bits of float64: "bf16-true" casts floating states, and MPS has no float64.
        self.rows.append(both.view(torch.int64).flatten().to(self.device))

    def compute(self) -> Estimate:
        """Return the ratio over all rows so far, on all ranks."""
        rows = dim_zero_cat(self.rows).cpu().view(torch.float64).view(-1, 2)
        ordered = torch.tensor(sorted(rows.tolist()), dtype=torch.double).view(-1, 2)
        return ratio_interval(ordered[:, 0], ordered[:, 1])


class DistinctShare(_Gathered):
    """Collects texts; `compute()` returns how many different ones there are, over their number.

    1 where every text is another, ``1 / number`` where all are the same. It falls with the number
    of texts, so compare it at the same number; it has no interval.

    >>> metric = DistinctShare()
    >>> metric.update(["yes", "no", "yes", "yes"])
    >>> metric.compute().value
    0.5
    """

    def update(self, texts: Sequence[str]) -> None:
        """Add texts."""
        digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
        numbers = [int.from_bytes(digest, "big", signed=True) for digest in digests]
        self.rows.append(torch.tensor(numbers, dtype=torch.int64, device=self.device))

    def compute(self) -> Estimate:
        """Return the share over all texts so far, on all ranks; NaN without texts."""
        rows = dim_zero_cat(self.rows)
        share = len(rows.unique()) / len(rows) if len(rows) else math.nan
        return Estimate(share, math.nan, math.nan)
