"""Penalties for a completion's length: outside a band, close to a limit, cut off.

All lie in [-1, 0], 0 = nothing to object to, so that a weight says what the worst case costs.
"""

from collections.abc import Sequence
from typing import get_args

from grao_lightning.faults import Faults
from grao_lightning.rewards.pieces import Pieces, split


class LengthBand:
    """Penalty for a completion shorter or longer than a band, linear up to -1.

    0 from ``low`` to ``high``; outside, minus the distance to the band divided by ``falloff``, at
    least -1. Nothing but the length is looked at: any text inside the band is as good as another.

    >>> band = LengthBand(low=2, high=3, falloff=4)
    >>> band(["one two", "one", "1 2 3 4 5", "word " * 99])
    [0.0, -0.25, -0.5, -1.0]

    Args:
        low: Shortest length without penalty, >= 0, in pieces.
        high: Longest length without penalty, >= ``low``.
        falloff: Distance from the band at which the penalty is whole, > 0; up to 1 makes its ends
            sharp.
        pieces: What lengths are counted in: "words" or "characters". Tokens are not seen here; on
            Anthropic HH, SmolLM2's tokenizer makes 1.3 of a word.

    Raises:
        UserError: Arguments break their rules.
    """

    unit = "penalty"
    range = (-1.0, 0.0)

    def __init__(self, low: float, high: float, falloff: float, pieces: Pieces = "words") -> None:
        faults = Faults()
        faults.at_least("low", low, 0)
        faults.at_least("high", high, low, "the band ends no lower than it starts")
        _check(faults, pieces, falloff=falloff)
        self.low, self.high, self.falloff, self.pieces = low, high, falloff, pieces

    def __call__(self, completions: Sequence[str]) -> list[float]:
        """Return one penalty a completion, in [-1, 0].

        Args:
            completions: n texts.
        """
        lengths = [len(split(text, self.pieces)) for text in completions]
        return [
            _penalty(max(self.low - length, length - self.high), self.falloff) for length in lengths
        ]


class SoftOverlong:
    """DAPO's penalty for a completion close to its limit, linear over the last ``margin`` pieces.

    Source: arXiv 2503.14476, equation 13: 0 up to L_max - L_cache, ((L_max - L_cache) - |y|) /
    L_cache up to L_max, -1 beyond. A truncated completion has reached L_max and gets -1. Departure:
    |y| is counted in words or characters, not in tokens. ``max_length`` should be what
    ``sampling.max_new_tokens`` comes to in them, so that the penalty starts before the limit cuts:
    on Anthropic HH, 48 tokens of SmolLM2 are 37 words.

    >>> overlong = SoftOverlong(max_length=6, margin=4)
    >>> overlong(["1 2", "1 2 3", "1 2 3 4 5 6", "word " * 9], [False] * 4)
    [0.0, -0.25, -1.0, -1.0]
    >>> overlong(["cut o"], [True])
    [-1.0]

    Args:
        max_length: Length at which the penalty is whole (L_max), in pieces.
        margin: The last pieces before it, over which the penalty grows (L_cache), > 0 and
            <= ``max_length``.
        pieces: What lengths are counted in: "words" or "characters".

    Raises:
        UserError: Arguments break their rules.
    """

    unit = "penalty"
    range = (-1.0, 0.0)

    def __init__(self, max_length: float, margin: float, pieces: Pieces = "words") -> None:
        faults = Faults()
        faults.at_least(
            "max_length", max_length, margin, "margin is the end of it, where the penalty grows"
        )
        _check(faults, pieces, margin=margin)
        self.max_length, self.margin, self.pieces = max_length, margin, pieces

    def __call__(self, completions: Sequence[str], truncated: Sequence[bool]) -> list[float]:
        """Return one penalty a completion, in [-1, 0].

        Args:
            completions: n texts.
            truncated: n flags, True where the length limit ended the completion.
        """
        free = self.max_length - self.margin
        return [
            -1.0 if cut else _penalty(len(split(text, self.pieces)) - free, self.margin)
            for text, cut in zip(completions, truncated, strict=True)
        ]


class TruncationPenalty:
    """-1 for a completion that the length limit ended, 0 for one that ended by itself.

    A reference answer is never truncated, so this says nothing of its length.

    >>> TruncationPenalty()([False, True])
    [0.0, -1.0]
    """

    unit = "penalty"
    range = (-1.0, 0.0)

    def __call__(self, truncated: Sequence[bool]) -> list[float]:
        """Return one penalty a completion, 0 or -1.

        Args:
            truncated: n flags, True where the length limit ended the completion.
        """
        return [-1.0 if cut else 0.0 for cut in truncated]


def _penalty(excess: float, whole: float) -> float:
    """Return 0 without excess, falling to -1 where the excess is ``whole``."""
    return -min(1.0, excess / whole) if excess > 0 else 0.0


def _check(faults: Faults, pieces: str, **above_zero: float) -> None:
    for setting, value in above_zero.items():
        if not value > 0:
            faults.add(f"{setting} must be > 0; got {value}")
    faults.one_of("pieces", pieces, get_args(Pieces))
    faults.raise_as_one()
