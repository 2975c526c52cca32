"""Answers with a label each (KTO's form): good ones are reference answers, bad ones rejected."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from grao_lightning.data.example import Example

BAD_ANSWER = "a bad answer (label) without a good one to the same prompt"
#: 1 and 0, and 1.0 and 0.0, are equal to True and False.
_LABELS: dict[bool | float | str, bool] = {
    **{True: True, False: False},
    **{"true": True, "false": False, "True": True, "False": False},
}


def are_labels(values: Sequence[Any]) -> bool:
    """Returns whether a column says of each answer that it is good or bad, or nothing of some."""
    said = [value for value in values if not _is_missing(value)]
    return bool(said) and all(map(_is_label, said))


def is_good(value: Any) -> bool | None:
    """Returns what a label says; None where it is missing."""
    return None if _is_missing(value) else _LABELS[value]


def paired(
    examples: Sequence[Example], good: Sequence[bool]
) -> tuple[dict[int, Example], list[int]]:
    """Returns the good ones by place, each with a bad answer to its prompt where there is one.

    Args:
        examples: Each with one answer, as its reference answer.
        good: What their labels say.

    Returns:
        The good ones, and the places of bad ones that stand beside none.
    """
    bad: dict[str, list[int]] = defaultdict(list)
    for place, (example, is_one) in enumerate(zip(examples, good, strict=True)):
        if not is_one:
            bad[repr(example.prompt)].append(place)
    found = {}
    for place, (example, is_one) in enumerate(zip(examples, good, strict=True)):
        if is_one:
            others = bad[repr(example.prompt)]
            rejected = next((examples[i].reference_answer for i in others[:1]), None)
            del others[:1]
            found[place] = replace(example, rejected_answer=rejected)
    return found, sorted(place for others in bad.values() for place in others)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_label(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) and value in _LABELS
