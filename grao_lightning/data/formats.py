"""Raw dataset rows -> examples, whatever format the user brings.

Accepted are TRL's formats, Anthropic HH's, and by `foreign_format` ShareGPT's and Alpaca's, told
apart by columns and value types:

====================  ========================  ==================================================
format                columns                   values
====================  ========================  ==================================================
preference, explicit  prompt, chosen, rejected  strings or lists of messages
preference, implicit  chosen, rejected          HH strings, whole conversations, or texts that share
                                                a question, see `split_shared`
prompt-completion     prompt, completion        strings or lists of messages
... with labels       and label                 true: a reference answer; false: the rejected answer
                                                of a row with the same prompt (KTO's form)
messages              messages                  a conversation ending with the reference answer
prompt-only           prompt                    a string or a list of messages
====================  ========================  ==================================================

A string that starts with "Human:" or "Assistant:" is an HH conversation where a conversation may
stand: as `prompt`, or as `chosen` and `rejected` without a prompt. Its turn markers are exactly
"\\n\\nHuman:" and "\\n\\nAssistant:"; anything like them ("\\nHuman:", "\\n\\nhuman:") is text.
Numbers are text where text may stand, and NaN is a missing value. A developer's message is the
system's; content may be a list of text parts.

Rows are **dropped** when no group can be built on them: a missing value, no user turn right before
the answer, a last turn that is not the assistant's, an empty reference answer, prompts that differ
between chosen and rejected (compared as written, turn by turn), chosen equal to rejected, a value
or message that no format has, tool calls.

All else is **kept**. An empty rejected answer stays "", which a preference loss can use. White
space around turns is stripped. An empty turn inside a prompt is left out: a template would show the
policy that answering nothing is fine. Consecutive turns of one role are joined by a blank line,
since many templates demand alternation. Strings of the standard format are kept to the letter.

Both kinds are counted in the `FormatReport`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grao_lightning.data.example import Example
from grao_lightning.data.foreign import foreign_format
from grao_lightning.data.labelled import BAD_ANSWER, are_labels, is_good, paired
from grao_lightning.data.shared_text import CHOSEN_EQUALS_REJECTED, PROMPTS_DIFFER, split_shared
from grao_lightning.data.turns import (
    NO_USER_TURN,
    DropError,
    Message,
    as_text,
    is_plain,
    tidied,
    turns_of,
    user,
)

MISSING_VALUE = "missing value"
LAST_TURN_NOT_ASSISTANT = "last turn is not the assistant's"
EMPTY_REFERENCE_ANSWER = "empty reference answer"
EMPTY_REJECTED_ANSWER = "empty rejected answer"

PLAIN = "plain string"
HH_TEXT = "one string of Anthropic HH's form"
MESSAGES = "messages with roles"

_FORMATS: dict[str, tuple[str, ...]] = {  # the first whose columns are all there is taken
    "preference (explicit prompt)": ("prompt", "chosen", "rejected"),
    "preference (implicit prompt)": ("chosen", "rejected"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "prompt-only": ("prompt",),
}
LABELLED = "prompt-completion"  # may have labels
_MANY = 0.1  # of the rows dropped are a reason to warn


@dataclass
class FormatReport:
    """What became of the rows: `rows_read == rows_kept + rows_paired + sum(dropped.values())`.

    Attributes:
        format: Name of the format found, one of the table above.
        rows_read: Rows seen.
        rows_kept: Rows that became examples.
        rows_paired: Rows whose bad answer became the rejected one of another row's example.
        dropped: Rows dropped, by reason; a row counts once, under the first reason met.
        first_dropped: Number and excerpt of the first row dropped for each reason.
        survived: Kept rows with an oddity, by oddity; a row counts once under each.
        prompts: Kept rows by how their prompts are written: `PLAIN`, `HH_TEXT` or `MESSAGES`.
    """

    format: str
    rows_read: int = 0
    rows_kept: int = 0
    rows_paired: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)
    survived: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Returns one paragraph for the console."""
        text = f"Read {self.rows_read} rows as {self.format}; kept {self.rows_kept}."
        if self.rows_paired:
            text += f" {self.rows_paired} bad answers stand beside a good one as rejected."
        if self.dropped:
            told = "; ".join(
                f"{reason}: {count} (first: {self.first_dropped[reason]})"
                for reason, count in self.dropped.most_common()
            )
            text += f" Dropped - {told}."
        if self.survived:
            told = "; ".join(f"{name}: {count}" for name, count in self.survived.most_common())
            text += f" Kept in spite of - {told}."
        return text

    @property
    def drops_many(self) -> bool:
        """Return whether more than a tenth of the rows were dropped."""
        return sum(self.dropped.values()) > _MANY * self.rows_read

    def drop(self, reason: str, number: int, row: Mapping[str, Any]) -> None:
        """Count a row as dropped.

        Args:
            reason: Why.
            number: Of the row, from 0.
            row: As it was read.
        """
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, f"row {number + 1}: {_excerpt(row)}")


def parse_rows(
    rows: Iterable[Mapping[str, Any]],
    rename: Mapping[str, str] | None = None,
    *,
    as_chat: bool = False,
) -> tuple[list[Example], FormatReport]:
    """Returns the examples in `rows`, in order, and a report of what was dropped or odd.

    Args:
        rows: Raw rows, e.g. a `datasets.Dataset`, all read in one format.
        rename: Dataset column -> name used here, e.g. {"question": "prompt"}.
        as_chat: Make of a prompt that is a plain string a user's turn, of its answers the
            assistant's.

    Returns:
        The examples kept (possibly none), and the report. The module docstring has the rules.

    Raises:
        ValueError: No rows; `rename` names a column that is not there, or gives two columns one
            name; the columns fit no format.
    """
    rows = list(rows)
    renamed, owner = _under_our_names(rows, rename or {})
    used = _detect_format(_columns(renamed))
    labels = _labels(used, renamed)
    report = FormatReport(f"{owner}'s {used}" if owner else used, len(rows))
    kept: dict[int, Example] = {}
    for number, row in enumerate(renamed):
        oddities: set[str] = set()
        try:
            if labels and is_good(labels[number]) is None:
                raise DropError(MISSING_VALUE)
            kept[number] = _parse_row(row, _FORMATS[used], oddities)
        except DropError as reason:
            report.drop(str(reason), number, rows[number])
        else:
            report.survived.update(oddities)
    if labels:
        kept = _paired(kept, labels, report, rows)
    report.rows_kept = len(kept)
    report.prompts.update(
        _written(example, renamed[number], _FORMATS[used]) for number, example in kept.items()
    )
    return [_as_chat(example) if as_chat else example for example in kept.values()], report


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _under_our_names(
    rows: Sequence[Mapping[str, Any]], rename: Mapping[str, str]
) -> tuple[list[dict[str, Any]], str | None]:
    """Returns rows under our columns' names, and whose form they had if not ours."""
    columns = _columns(rows)
    if not columns:
        raise ValueError("the data must have at least one row with columns; got none")
    names = _new_names(columns, rename)
    renamed = [{names[name]: value for name, value in row.items()} for row in rows]
    foreign = foreign_format(names.values())
    if foreign is None:
        return renamed, None
    return [foreign.adopt(row) for row in renamed], foreign.name


def _labels(used: str, rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Takes the labels of answers out of rows and returns them; none where there are none."""
    if used != LABELLED or not all("label" in row for row in rows):
        return []
    if not are_labels([row["label"] for row in rows]):
        return []
    return [row.pop("label") for row in rows]


def _paired(
    kept: dict[int, Example],
    labels: Sequence[Any],
    report: FormatReport,
    rows: Sequence[Mapping[str, Any]],
) -> dict[int, Example]:
    """Returns the examples with good answers, and counts what became of the others."""
    places = list(kept)
    found, left = paired(list(kept.values()), [bool(is_good(labels[at])) for at in places])
    for place in left:
        report.drop(BAD_ANSWER, places[place], rows[places[place]])
    report.rows_paired = len(kept) - len(found) - len(left)
    report.format = "prompt-completion with labels"
    return {places[place]: example for place, example in found.items()}


def _written(example: Example, row: Mapping[str, Any], used: tuple[str, ...]) -> str:
    """Returns how an example's prompt is written in its row."""
    if isinstance(example.prompt, str):
        return PLAIN
    return MESSAGES if any(isinstance(row.get(name), list) for name in used) else HH_TEXT


def _as_chat(example: Example) -> Example:
    """Returns an example whose prompt, if it is a plain string, is a user's turn."""
    if not isinstance(example.prompt, str):
        return example
    reference_answer, rejected_answer = (
        answer and answer.strip() for answer in (example.reference_answer, example.rejected_answer)
    )
    return replace(
        example,
        prompt=[user(example.prompt)],
        reference_answer=reference_answer,
        rejected_answer=rejected_answer,
    )


def _new_names(columns: list[str], rename: Mapping[str, str]) -> dict[str, str]:
    """Returns dataset column -> name used here, checked."""
    unknown = sorted(set(rename) - set(columns))
    if unknown:
        raise ValueError(
            f"data.rename must name columns of the dataset: {', '.join(unknown)} not found; "
            f"there are {', '.join(columns)}"
        )
    names = {name: rename.get(name, name) for name in columns}
    for target, count in Counter(names.values()).items():
        if count > 1:
            sources = ", ".join(name for name in columns if names[name] == target)
            raise ValueError(
                f"data.rename must give every column its own name: {sources} would all be called "
                f"{target!r}; rename the others to something else"
            )
    return names


def _detect_format(columns: list[str]) -> str:
    """Returns the first format whose columns are all there."""
    for name, needed in _FORMATS.items():
        # A lone `chosen` beside `prompt` would be silently ignored as prompt-only data.
        if set(needed) <= set(columns) and not (needed == ("prompt",) and "chosen" in columns):
            return name
    accepted = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in _FORMATS.items())
    raise ValueError(
        f"the columns must fit one of the accepted formats ({accepted}); "
        f"found {', '.join(columns)}; "
        "map yours with data.rename, e.g. {question: prompt, answer: completion}"
    )


def _parse_row(row: Mapping[str, Any], used: tuple[str, ...], oddities: set[str]) -> Example:
    """Returns the row's example and adds to `oddities` what was survived."""
    values: dict[str, Any] = {name: as_text(row.get(name)) for name in used}
    if any(value is None for value in values.values()):
        raise DropError(MISSING_VALUE)
    raw_prompt = values.pop("prompt", None)
    if used == ("chosen", "rejected"):
        texts = [value for value in values.values() if isinstance(value, str)]
        if len(texts) == 2 and any(is_plain(text) for text in texts):
            raw_prompt, *answers = split_shared(oddities, *texts)
            values = dict(zip(used, answers, strict=True))

    prompt: str | list[Message]
    if values:
        sides = [_join(raw_prompt, raw, name, oddities) for name, raw in values.items()]
        prompt, answers = _check_sides(sides, oddities)
    else:
        answers = []
        prompt = raw_prompt if is_plain(raw_prompt) else turns_of(raw_prompt, "prompt", oddities)

    if isinstance(prompt, str):
        if not prompt.strip():
            raise DropError(NO_USER_TURN)
    else:
        prompt, answers = tidied(prompt, answers, oddities)
    return Example(
        prompt=prompt,
        reference_answer=answers[0] if answers else None,
        rejected_answer=answers[1] if len(answers) > 1 else None,
        # A `prompt` beside `messages` must not reach reward functions next to ours.
        columns={name: value for name, value in row.items() if name not in (*used, "prompt")},
    )


def _check_sides(
    sides: list[tuple[str | list[Message], str | None]], oddities: set[str]
) -> tuple[str | list[Message], list[str]]:
    """Returns the prompt shared by a row's sides (chosen and rejected, or one), and the answers."""
    prompts, maybe_answers = zip(*sides, strict=True)
    answers = [answer for answer in maybe_answers if answer is not None]
    if len(answers) < len(sides):
        raise DropError(LAST_TURN_NOT_ASSISTANT)
    if not answers[0].strip():
        raise DropError(EMPTY_REFERENCE_ANSWER)
    if prompts[0] != prompts[-1]:
        raise DropError(PROMPTS_DIFFER)
    if len(answers) == 2:
        if answers[0] == answers[1]:
            raise DropError(CHOSEN_EQUALS_REJECTED)
        if not answers[1].strip():
            oddities.add(EMPTY_REJECTED_ANSWER)
    return prompts[0], answers


def _join(
    prompt: Any, answer: Any, name: str, oddities: set[str]
) -> tuple[str | list[Message], str | None]:
    """Returns prompt (its turns as written) and answer of one side; None without a final answer."""
    if prompt is not None and isinstance(answer, str):
        # With its own prompt column, an answer is text even if it starts with "Human:".
        if is_plain(prompt):
            return prompt, answer
        return turns_of(prompt, "prompt", oddities), answer.strip()

    turns = turns_of(answer, name, oddities)
    # Where an answer starts afresh, it repeats the prompt (UltraFeedback's columns do).
    if prompt is not None and turns and turns[0]["role"] == "assistant":
        before = [user(prompt)] if is_plain(prompt) else turns_of(prompt, "prompt", oddities)
        turns = before + turns
    if not turns or turns[-1]["role"] != "assistant":
        return turns, None
    return turns[:-1], turns[-1]["content"]


def _excerpt(row: Mapping[str, Any]) -> str:
    text = repr(dict(row))
    return text if len(text) <= 100 else text[:97] + "..."
