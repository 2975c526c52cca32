"""A penalty for n-grams that come again."""

from collections.abc import Sequence
from typing import get_args

from grao_lightning.faults import Faults
from grao_lightning.rewards.pieces import Pieces, split


class RepetitionPenalty:
    """Minus the share of a completion's n-grams that repeat an earlier one of it, in (-1, 0].

    Source: seq-rep-n = 1 - distinct n-grams / n-grams of arXiv 1908.04319 (Welleck et al.), used
    against repetition in reinforcement learning by arXiv 2502.03373, appendix C.2. Departure from
    the latter: one number for the completion, not one for each repeated token.

    A text of fewer than n pieces has no n-gram, thus nothing repeated: 0. The share grows with
    length in honest text too, the less the larger n. Upper and lower case are the same here;
    punctuation belongs to its word.

    2-grams of "a b a b a": ab, ba, ab, ba, of which two repeat.

    >>> RepetitionPenalty(ngram_size=2)(["a b a b a", "a b c", ""])
    [-0.5, 0.0, 0.0]

    Args:
        ngram_size: n, >= 1. With characters take more, such as 8: short ones repeat in any text.
        pieces: What n-grams are made of: "words" or "characters".

    Raises:
        UserError: Arguments break their rules.
    """

    unit = "repeated share, negative"
    range = (-1.0, 0.0)

    def __init__(self, ngram_size: int = 3, pieces: Pieces = "words") -> None:
        faults = Faults()
        if not (isinstance(ngram_size, int) and ngram_size >= 1):
            faults.add(f"ngram_size must be a whole number >= 1; got {ngram_size}")
        faults.one_of("pieces", pieces, get_args(Pieces))
        faults.raise_as_one()
        self.ngram_size, self.pieces = ngram_size, pieces

    def __call__(self, completions: Sequence[str]) -> list[float]:
        """Return one penalty a completion, in (-1, 0].

        Args:
            completions: n texts.
        """
        return [self._penalty(text) for text in completions]

    def _penalty(self, text: str) -> float:
        pieces = split(text.casefold(), self.pieces)
        ngrams = list(zip(*(pieces[start:] for start in range(self.ngram_size)), strict=False))
        return (len(set(ngrams)) - len(ngrams)) / max(1, len(ngrams))
