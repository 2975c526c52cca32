"""One line that says how far a long piece of work is."""

import math
import time
from typing import TextIO


class ProgressLine:
    """Writes how many are finished, the time so far and the time left.

    Args:
        what: Is counted.
        stream: Where it goes. On a terminal the line is overwritten; elsewhere each is a new one.
    """

    def __init__(self, what: str, stream: TextIO) -> None:
        self._what = what
        self._stream = stream
        self._started = time.monotonic()
        self._first: int | None = None

    def __call__(self, finished: int, number: int, note: str = "") -> None:
        """Write the line.

        Args:
            finished: So many; those of the first call were finished before.
            number: Of all.
            note: Behind it.
        """
        if self._first is None:
            self._first = finished
        minutes = (time.monotonic() - self._started) / 60
        done = finished - self._first
        left = (number - finished) * minutes / done if done else math.nan
        text = f"{self._what} {finished}/{number}, {minutes:.1f} min"
        if done and number > finished:
            text += f", about {left:.1f} left"
        terminal = self._stream.isatty()
        end = "\n" if finished == number or not terminal else ""
        start = "\r\033[K" if terminal else ""
        self._stream.write(f"{start}{text}{': ' + note if note else ''}{end}")
        self._stream.flush()
