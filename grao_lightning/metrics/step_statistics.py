"""What one training step measured, brought together over all ranks in two collectives."""

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor, str], Tensor]  # (values, "sum" | "max") -> values over all ranks


class StepStatistics:
    """Named means, totals and extremes of one step.

    Sums and counts are kept apart until all ranks are added up, so a mean over ranks with
    different numbers of tokens is still the mean over all tokens. Every rank must note the same
    names in the same order.

    Sums stay on the device they are formed on until `reduced` reads them, all at once.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        self._highest: dict[str, float] = {}
        self._totals: set[str] = set()

    def mean(self, name: str, values: Tensor | float) -> None:
        """Note values whose mean is wanted; NaN is left out."""
        flat = torch.as_tensor(values, dtype=torch.double).detach().flatten()
        missing = flat.isnan()
        self.add(name, flat.masked_fill(missing, 0.0).sum(), (~missing).sum())

    def add(self, name: str, total: Tensor | float, count: Tensor | float | None) -> None:
        """Note a sum of ``count`` values whose mean is wanted; with None, the sum itself is."""
        before = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (before[0] + total, before[1] + (0.0 if count is None else count))
        if count is None:
            self._totals.add(name)

    def share(self, name: str, part: Tensor, whole: Tensor) -> None:
        """Note a part and its whole: their ratio is taken once all ranks are added up."""
        self._sums[name] = (part.detach().sum(), whole.detach().sum())

    def extremes(self, name: str, values: Tensor) -> None:
        """Note values whose minimum and maximum are wanted, under ``name`` with {} replaced."""
        self._highest[name.format("max")] = values.max().item()
        self._highest[name.format("min")] = -values.min().item()

    def reduced(self, reduce: Reduce) -> dict[str, float]:
        """Return every statistic over all ranks; a mean over nothing, a share of 0, is NaN."""
        sums = reduce(_read([part for both in self._sums.values() for part in both]), "sum")
        means = {
            name: total if name in self._totals else total / count if count else float("nan")
            for name, (total, count) in zip(self._sums, sums.view(-1, 2).tolist(), strict=True)
        }
        if not self._highest:
            return means
        highest = reduce(torch.tensor(list(self._highest.values()), dtype=torch.double), "max")
        for name, value in zip(self._highest, highest.tolist(), strict=True):
            means[name] = -value if name.endswith("min_length") else value
        return means


def _read(values: list[Tensor | float]) -> Tensor:
    """Return numbers, some of them on a device, as one float64 tensor on the host, in one copy."""
    found = torch.empty(len(values), dtype=torch.double)
    by_device: dict[torch.device, dict[int, Tensor]] = {}
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, {})[place] = value.double()
        else:
            found[place] = value
    for parts in by_device.values():
        found[list(parts)] = torch.stack(list(parts.values())).cpu()
    return found
