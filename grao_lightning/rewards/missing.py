"""When too many rewards are missing for a run to go on."""

from collections import deque


class MissingWindow:
    """Keeps the missing share of the last steps.

    Args:
        length: Steps that count.
        limit: Largest mean share over them.
    """

    def __init__(self, length: int, limit: float) -> None:
        self._limit = limit
        self._shares: deque[float] = deque(maxlen=length)

    def exceeded_by(self, share: float) -> float | None:
        """Take in a step's share in [0, 1]; return the window's mean if it exceeds the limit.

        A window that is not full yet has exceeded nothing: an outage of a few steps is waited out.
        """
        self._shares.append(share)
        mean = sum(self._shares) / len(self._shares)
        full = len(self._shares) == self._shares.maxlen
        return mean if full and mean > self._limit else None
