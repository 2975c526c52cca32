"""One row of the data as everything behind it takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grao_lightning.data.turns import Message


@dataclass(frozen=True)
class Example:
    """One prompt with what the data says about it.

    Attributes:
        prompt: A string (standard), or messages ending with the user's turn (conversational).
        reference_answer: The chosen answer or completion; None in prompt-only data.
        rejected_answer: The rejected answer; None unless the data holds preferences.
        columns: Every column not used above, for reward functions by name.
    """

    prompt: str | list[Message]
    reference_answer: str | None
    rejected_answer: str | None
    columns: dict[str, Any]
