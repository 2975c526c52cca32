"""Values of rows -> the turns of a conversation: HH text, messages, and ShareGPT's messages."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

Message = dict[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": str}."""

NO_USER_TURN = "no user turn before the answer"
NEITHER_TEXT_NOR_MESSAGES = "a value that is neither text nor messages"
NO_MESSAGE = "a message without role and content"
UNKNOWN_ROLE = "a message of an unknown role"
TOOLS = "tool calls, which are not supported"
NOT_TEXT = "content other than text"

EMPTY_TURN = "empty turn left out"
CONSECUTIVE_TURNS = "consecutive turns of one role joined"
LITERAL_MARKER = "'Human:' or 'Assistant:' inside a turn's line kept as text"
NEAR_MARKER = "near-marker such as '\\nHuman:' or '\\n\\nhuman:' kept as text"
STRAY_WHITE_SPACE = "stray white space around a turn stripped"
REASONING = "reasoning_content beside content left out"

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
}
_TOOL_ROLES = {"tool", "function", "ipython", "observation", "function_call", "function_response"}
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_HH_START = re.compile(r"\s*(?:Human|Assistant):")
_HH_MARKER = re.compile(r"\n\n(Human|Assistant):")
_NEAR_MARKER = re.compile(r"\n\s*(?:human|assistant):", re.IGNORECASE)
_LITERAL_MARKER = re.compile(r"(?:\A|\S)[^\S\n]*\b(?:Human|Assistant):")


class DropError(Exception):
    """The row at hand cannot be used; the message is the reason counted."""


def is_plain(value: Any) -> bool:
    """True for a string that is not an HH conversation."""
    return isinstance(value, str) and not _HH_START.match(value)


def user(text: str) -> Message:
    return {"role": "user", "content": text.strip()}


def turns_of(value: Any, name: str, oddities: set[str]) -> list[Message]:
    """Returns the turns of an HH string or a list of messages, contents stripped.

    The empty assistant turn that ends an HH prompt is only the cue to answer, and left out.
    """
    if isinstance(value, str) and _HH_START.match(value):
        parts = _HH_MARKER.split("\n\n" + value.lstrip())[1:]
        raw = [
            # The one space after a marker is part of the form.
            {"role": _HH_ROLES[marker], "content": content.removeprefix(" ")}
            for marker, content in zip(parts[::2], parts[1::2], strict=True)
        ]
        if name == "prompt" and raw[-1]["role"] == "assistant" and not raw[-1]["content"].strip():
            raw.pop()
        if any(_NEAR_MARKER.search(turn["content"]) for turn in raw):
            oddities.add(NEAR_MARKER)
        if any(_LITERAL_MARKER.search(turn["content"]) for turn in raw):
            oddities.add(LITERAL_MARKER)
    elif isinstance(value, list | Mapping):
        value = [value] if isinstance(value, Mapping) else value
        raw = [_message(message, oddities) for message in value]
    else:
        raise DropError(NEITHER_TEXT_NOR_MESSAGES)
    turns = [{"role": turn["role"], "content": turn["content"].strip()} for turn in raw]
    if turns != raw:
        oddities.add(STRAY_WHITE_SPACE)
    return turns


def _message(message: Any, oddities: set[str]) -> Message:
    """Returns one message's role and content; ShareGPT calls them from and value."""
    if not isinstance(message, Mapping):
        raise DropError(NO_MESSAGE)
    role, content = _first(message, "role", "from"), _first(message, "content", "value")
    if message.get("tool_calls") or (isinstance(role, str) and role in _TOOL_ROLES):
        raise DropError(TOOLS)
    if role is None or not {"content", "value"} & set(message):
        raise DropError(NO_MESSAGE)
    if not isinstance(role, str) or role not in _ROLES:
        raise DropError(UNKNOWN_ROLE)
    if message.get("reasoning_content"):
        oddities.add(REASONING)
    return {"role": _ROLES[role], "content": _text(content)}


def _first(message: Mapping[str, Any], *names: str) -> Any:
    """Returns the first value that is there; a file with both forms has None for the other."""
    return next((message[name] for name in names if message.get(name) is not None), None)


def _text(content: Any) -> str:
    """Returns a content as text: a string, None (nothing), a number, or a list of text parts."""
    if isinstance(content, list):
        return "".join(map(_part, content))
    text = as_text(content)
    if text is not None and not isinstance(text, str):
        raise DropError(NOT_TEXT)
    return text or ""


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    raise DropError(NOT_TEXT)


def as_text(value: Any) -> Any:
    """Returns a number as text and NaN as None; anything else as it is.

    4.0 is 4: files of tables make such numbers of whole ones where some are missing.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, float) and math.isnan(value):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def tidied(
    turns: list[Message], answers: list[str], oddities: set[str]
) -> tuple[list[Message], list[str]]:
    """Returns prompt and answers as chat templates take them: alternating roles, the user's last.

    An assistant turn right before the answers is joined to each of them. An empty system message
    stays: it is how a user switches off a template's default one.
    """
    if turns and turns[-1]["role"] == "user" and not turns[-1]["content"]:
        raise DropError(NO_USER_TURN)
    tidy: list[Message] = []
    for turn in turns:
        if not turn["content"] and turn["role"] != "system":
            oddities.add(EMPTY_TURN)
        elif tidy and tidy[-1]["role"] == turn["role"]:
            oddities.add(CONSECUTIVE_TURNS)
            tidy[-1]["content"] += "\n\n" + turn["content"]
        else:
            tidy.append(dict(turn))
    if answers and tidy and tidy[-1]["role"] == "assistant":
        oddities.add(CONSECUTIVE_TURNS)
        before = tidy.pop()["content"]
        answers = [f"{before}\n\n{answer}".strip() for answer in answers]
    if not tidy or tidy[-1]["role"] != "user":
        raise DropError(NO_USER_TURN)
    return tidy, answers
