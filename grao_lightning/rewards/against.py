"""What rewards have in common that hold a completion against its reference answer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any


class AgainstReferenceAnswer(ABC):
    """Scores each completion by what a subclass makes of it and of its reference answer.

    A text is looked at once a call, however often it occurs.
    """

    def __call__(
        self, completions: Sequence[str], reference_answers: Sequence[str]
    ) -> list[float | None]:
        """Return one score a completion.

        Args:
            completions: n texts.
            reference_answers: n texts.

        Returns:
            None where the two cannot be compared, as with an empty reference answer.
        """
        texts = list(dict.fromkeys([*completions, *reference_answers]))
        compared = dict(zip(texts, self._compared(texts), strict=True)) if texts else {}
        return [
            self._score(compared[text], compared[answer]) if answer.strip() else None
            for text, answer in zip(completions, reference_answers, strict=True)
        ]

    @abstractmethod
    def _compared(self, texts: list[str]) -> Sequence[Any]:
        """Return what of each text is compared; there is at least one."""

    @abstractmethod
    def _score(self, completion: Any, answer: Any) -> float | None:
        """Return the score of a pair; the same object on both sides is the same text."""
