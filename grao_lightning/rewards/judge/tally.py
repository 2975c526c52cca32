"""Sums for the logs, gathered until they are read."""


class Tally:
    """Adds up figures by name."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def note(self, name: str, value: float) -> None:
        """Add one observation to a mean."""
        self._add(name, value, 1)

    def total(self, name: str, value: float) -> None:
        """Add to a total."""
        self._add(name, value, 0)

    def take(self) -> dict[str, tuple[float, float]]:
        """Return name -> (sum, count), a total with count 0, and begin anew.

        A mean without observations has no entry.
        """
        sums, self._sums = self._sums, {}
        return sums

    def _add(self, name: str, value: float, count: int) -> None:
        before, number = self._sums.get(name, (0.0, 0))
        self._sums[name] = (before + value, number + count)
