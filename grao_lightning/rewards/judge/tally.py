"""Sums for the logs, gathered until they are read."""

from collections.abc import Sequence


class Tally:
    """Adds up figures by name.

    Args:
        means: Names of figures whose mean matters.
        totals: Names of figures whose sum matters.
    """

    def __init__(self, means: Sequence[str], totals: Sequence[str]) -> None:
        self._sums = dict.fromkeys([*means, *totals], 0.0)
        self._counts = dict.fromkeys(means, 0)

    def note(self, name: str, value: float) -> None:
        """Add an observation to a mean, or an amount to a total."""
        self._sums[name] += value
        if name in self._counts:
            self._counts[name] += 1

    def take(self) -> dict[str, tuple[float, float | None]]:
        """Return every name's (sum, count), None for the count of a total, and begin anew."""
        taken: dict[str, tuple[float, float | None]] = {
            name: (value, self._counts.get(name)) for name, value in self._sums.items()
        }
        self._sums = dict.fromkeys(self._sums, 0.0)
        self._counts = dict.fromkeys(self._counts, 0)
        return taken
