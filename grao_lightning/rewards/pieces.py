"""What texts are counted in, for the reward functions that count."""

from typing import Literal

Pieces = Literal["words", "characters"]


def split(text: str, pieces: Pieces) -> list[str]:
    """Return a text's words, as white space parts them, or its characters, outer space left off.

    Words suit languages that write spaces; Chinese, Japanese or Thai want characters.

    >>> split(" A dog. ", "words")
    ['A', 'dog.']
    >>> split(" a b ", "characters")
    ['a', ' ', 'b']
    """
    return text.split() if pieces == "words" else list(text.strip())
