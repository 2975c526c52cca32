"""Reads a verdict off a judge's answer, and never guesses one."""

import html
import re
import unicodedata

_SIDE = r"(?:(?:text|answer|response)\s*)?"
# Not within another number or a chain: "1 > 2.5", "11 > 2", "1 > 2 > 3", "1 >= 2" are no verdicts.
_VERDICT = re.compile(
    rf"(?<![\w.<>=]){_SIDE}(?P<left>[12])\s*(?P<sign>>|<|={{1,2}})\s*{_SIDE}(?!(?P=left))[12]"
    r"(?!\w|\.\d|\s*[<>=])",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?:\b(?:the|my|final|so|therefore|thus|hence|overall|correct|answer|verdict|judge?ment|"
    r"decision|conclusion|result|comparison|is)\b|[\s:,.#-])*",
    re.IGNORECASE,
)
# What our template says of each.
_MEANINGS = {1: "text 1 is better", 0: "neither is better", -1: "text 2 is better"}
_EXPLANATION = re.compile(r"\s*[,.;:\u2013\u2014-]\s+\S")
_THOUGHT_BEGINS = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_THOUGHT_ENDS = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_TAGS = re.compile(r"</?[a-z][\w-]*>|<\|[^<>|]*\|>", re.IGNORECASE)
_QUOTES = "\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb"
_DECORATION = re.compile(rf"""[*_`~"'{_QUOTES}$()\[\]{{}}\\]|\bboxed\b""")


def read_verdict(answer: str) -> int | None:
    """Return 1 where text 1 is better, -1 where text 2 is, 0 for a tie, None if it is unreadable.

    The verdict must stand alone on the last line, or on the first one with words after it that
    weigh nothing else. "Alone" allows quotes, Markdown, tags, full-width and HTML-escaped signs, a
    lead such as "Final answer:" and a full stop. What comes before the end of a <think> is not
    looked at; a thought that never ends leaves no answer. Two lines with different verdicts are
    unreadable, and so is a verdict amid a sentence ("I cannot say that 1 > 2").

    >>> [read_verdict(text) for text in ("1 > 2", "Answer: **2 > 1**.", "1 > 2 or 1 < 2")]
    [1, -1, None]
    """
    text = unicodedata.normalize("NFKC", html.unescape(answer))
    text = _THOUGHT_ENDS.split(text)[-1]
    if _THOUGHT_BEGINS.search(text):
        return None
    text = _DECORATION.sub(" ", _TAGS.sub(" ", text))
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    alone = [_alone(line) for line in lines]
    first = alone[0] if alone[0] is not None else _explained(lines[0])
    stated = {verdict for verdict in (first, *alone) if verdict is not None}
    if len(stated) != 1:
        return None
    if alone[-1] is not None:
        return alone[-1]
    mentioned = {_value(match) for match in _VERDICT.finditer(text)}
    return first if first is not None and mentioned == {first} else None


def _alone(line: str) -> int | None:
    """Return the verdict of a line that says nothing else."""
    match = _VERDICT.search(line)
    if not match or not _LEAD.fullmatch(line[: match.start()]):
        return None
    verdict, rest = _value(match), line[match.end() :].strip(" \t.!,;:-").lower()
    return verdict if rest in ("", _MEANINGS[verdict]) else None


def _explained(line: str) -> int | None:
    """Return the verdict that a line begins with, followed by a stop and the reasons."""
    match = _VERDICT.match(line.strip())
    if not match or not _EXPLANATION.match(line.strip()[match.end() :]):
        return None
    return _value(match)


def _value(match: re.Match[str]) -> int:
    if match["sign"].startswith("="):
        return 0
    return 1 if (match["left"] == "1") == (match["sign"] == ">") else -1
