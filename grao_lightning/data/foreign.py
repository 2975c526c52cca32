"""Rows of other programs' formats, under the names of ours.

ShareGPT: ``conversations`` of messages with ``from`` and ``value`` (or role and content), perhaps a
``system`` text, perhaps ``chosen`` and ``rejected`` beside it. Alpaca: ``instruction``, perhaps
``input``, and ``output`` (or ``response``, or chosen and rejected).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Foreign:
    """Another program's format.

    Attributes:
        name: Of the format.
        adopt: Gives a row under our names; columns without a meaning stay.
    """

    name: str
    adopt: Callable[[Row], dict[str, Any]]


def foreign_format(columns: Collection[str]) -> Foreign | None:
    """Returns the foreign format of columns, None if they are ours or unknown.

    Args:
        columns: Of the data, as renamed.
    """
    names = set(columns)
    if names & {"prompt", "messages"}:
        return None
    if names & {"conversations", "conversation"}:
        return Foreign("ShareGPT", _of_sharegpt)
    if "instruction" in names and names & {"output", "response", "chosen"}:
        return Foreign("Alpaca", _of_alpaca)
    return None


def _of_sharegpt(row: Row) -> dict[str, Any]:
    found = dict(row)
    turns = _taken(found, "conversations", "conversation")
    system = found.pop("system", None)
    if system and isinstance(turns, list):
        turns = [{"role": "system", "content": system}, *turns]
    found["prompt" if "chosen" in found else "messages"] = turns
    return found


def _of_alpaca(row: Row) -> dict[str, Any]:
    found = dict(row)
    parts = [found.pop(name, None) for name in ("instruction", "input")]
    found["prompt"] = None if not parts[0] else "\n\n".join(str(part) for part in parts if part)
    if "chosen" not in found:
        found["completion"] = _taken(found, "output", "response")
    return found


def _taken(row: dict[str, Any], *names: str) -> Any:
    """Returns the first value that is there and takes all of those names out."""
    values = [row.pop(name, None) for name in names]
    return next((value for value in values if value is not None), None)
