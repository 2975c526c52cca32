"""Whether a completion is the wanted text, or has the wanted form."""

import string
import unicodedata
from collections.abc import Sequence

from grao_lightning.faults import Faults
from grao_lightning.rewards.against import AgainstReferenceAnswer
from grao_lightning.rewards.pattern import Pattern

_ARTICLES = {"a", "an", "the"}


class ExactMatch(AgainstReferenceAnswer):
    """1 for a completion that equals its reference answer, 0 for another.

    Texts are equal up to white space and Unicode's composed and decomposed letters. With case,
    punctuation and articles ignored too it is the exact match of SQuAD (arXiv 1606.05250); with
    ``extract`` that of GSM8K (arXiv 2110.14168). The score is missing where the reference answer
    has nothing to compare with (it is empty, or ``extract`` does not match it), or where
    ``extract`` took too long.

    The reference answer's own score is 1: compared "pairwise" with it, no completion wins, an equal
    one ties and every other loses. Compare "raw", or give it a weight beside other functions.

    >>> match = ExactMatch(ignore_case=True, ignore_punctuation=True)
    >>> match(["Paris!", "In Paris"], ["paris"] * 2)
    [1.0, 0.0]
    >>> ExactMatch(extract=r"#### (\\S+)")(["2 + 2 = 4 #### 4", "4"], ["#### 4"] * 2)
    [1.0, 0.0]

    Args:
        ignore_case: Upper and lower case are the same.
        ignore_punctuation: ASCII's punctuation and symbols, and Unicode's punctuation, are left
            off.
        ignore_articles: The English words a, an and the are left out; wants ``ignore_case`` for
            capital ones.
        extract: A regular expression; what its last match covers, or its group if it has one, is
            compared instead of the whole texts.
        timeout: Seconds that ``extract`` may take for one text before its score is missing.

    Raises:
        UserError: Arguments break their rules.
    """

    unit = "match"
    range = (0.0, 1.0)

    def __init__(
        self,
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        ignore_articles: bool = False,
        extract: str | None = None,
        timeout: float = 1.0,
    ) -> None:
        faults = Faults()
        self._extract = None if extract is None else Pattern("extract", extract, timeout, faults)
        if self._extract is not None and self._extract.groups > 1:
            faults.add(
                f"extract must have at most one group; got {self._extract.groups} in {extract!r}: "
                "write (?:...) for those that only bind"
            )
        faults.raise_as_one()
        self.ignore_case = ignore_case
        self.ignore_punctuation = ignore_punctuation
        self.ignore_articles = ignore_articles

    def _score(self, completion: str | None, answer: str | None) -> float | None:
        return None if completion is None or not answer else float(completion == answer)

    def _compared(self, texts: list[str]) -> list[str | None]:
        return [self._counted(text) for text in texts]

    def _counted(self, text: str) -> str | None:
        """Return the part of a text that counts; None where finding it took too long."""
        if self._extract is not None:
            extracted = self._extract.last_match(text)
            if extracted is None:
                return None
            text = extracted
        text = unicodedata.normalize("NFC", text)
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = "".join(character for character in text if not _is_punctuation(character))
        words = text.split()
        if self.ignore_articles:
            words = [word for word in words if word not in _ARTICLES]
        return " ".join(words)


class RegexMatch:
    """1 for a completion that a regular expression matches, 0 for another.

    ``(?i)`` at the expression's start ignores case, ``(?s)`` lets a dot match line breaks. In YAML,
    single quotes keep backslashes as they are.

    >>> RegexMatch(r"<think>.*</think>.+")(["<think>2 + 2</think>4", "4"])
    [1.0, 0.0]

    Args:
        pattern: In the syntax of Python's ``re``.
        whole: It must cover the whole completion, outer white space left off; false: some part.
        timeout: Seconds for one completion, after which its score is missing, with a warning.

    Raises:
        UserError: Arguments break their rules.
    """

    unit = "match"
    range = (0.0, 1.0)

    def __init__(self, pattern: str, whole: bool = True, timeout: float = 1.0) -> None:
        faults = Faults()
        self._pattern = Pattern("pattern", pattern, timeout, faults)
        faults.raise_as_one()
        self.whole = whole

    def __call__(self, completions: Sequence[str]) -> list[float | None]:
        """Return one score a completion, 0 or 1; None where the expression took too long.

        Args:
            completions: n texts.
        """
        found = [self._pattern.matches(text.strip(), whole=self.whole) for text in completions]
        return [None if match is None else float(match) for match in found]


def _is_punctuation(character: str) -> bool:
    # ASCII's symbols ($ + < = > ^ ` | ~) are punctuation for SQuAD, though not for Unicode.
    return character in string.punctuation or unicodedata.category(character).startswith("P")
