"""What scorers see of a text: whole as it was written, plain, or the answer behind the thought."""

import re
from collections.abc import Sequence
from typing import Literal

Seen = Literal["written", "plain", "answer"]


def opening(prompt_end: str, tag: str) -> str:
    """Return the thought's opening tag with which a prompt ends, as of a template, or nothing.

    It belongs to the completion as a reader sees it, though the policy did not sample it.

    Args:
        prompt_end: The prompt's last tokens as text, special ones included.
        tag: Such as <think>.
    """
    found = re.search(rf"{re.escape(tag)}\s*\Z", prompt_end)
    return found.group() if found else ""


def text_seen(seen: Seen, plain: str, written: str, tags: Sequence[str]) -> str:
    """Return what scorers see.

    Args:
        seen: "written": the text with the special tokens the policy wrote, the one that ended it
            left out; "plain": without any; "answer": what stands behind the last closing tag of a
            thought, nothing where a thought was never closed, all where there is none.
        plain: The text without special tokens.
        written: With them, and with the tag that the template opened it with.
        tags: That open and close a thought.
    """
    if seen == "plain":
        return plain
    if seen == "written":
        return written
    opens, closes = tags
    _, closed, answer = written.rpartition(closes)
    if closed:
        return answer.lstrip()
    return "" if opens in written else plain
