"""Raw dataset rows -> examples, whatever format the user brings.

Accepted are TRL's formats and Anthropic HH's, told apart by columns and value types:

====================  ========================  ==================================================
format                columns                   values
====================  ========================  ==================================================
preference, explicit  prompt, chosen, rejected  strings or lists of messages
preference, implicit  chosen, rejected          HH strings, whole conversations, or texts sharing
                                                their first words
prompt-completion     prompt, completion        strings or lists of messages
messages              messages                  a conversation ending with the reference answer
prompt-only           prompt                    a string or a list of messages
====================  ========================  ==================================================

A string that starts with "Human:" or "Assistant:" is an HH conversation where a conversation may
stand: as `prompt`, or as `chosen` and `rejected` without a prompt. Its turn markers are exactly
"\\n\\nHuman:" and "\\n\\nAssistant:"; anything like them ("\\nHuman:", "\\n\\nhuman:") is text.

Rows are **dropped** when no group can be built on them: a missing value, no user turn right before
the answer, a last turn that is not the assistant's, an empty reference answer, prompts that differ
between chosen and rejected (compared as written, turn by turn), chosen equal to rejected.

All else is **kept**. An empty rejected answer stays "", which a preference loss can use. White
space around turns is stripped. An empty turn inside a prompt is left out: a template would show the
policy that answering nothing is fine. Consecutive turns of one role are joined by a blank line,
since many templates demand alternation. Strings of the standard format are kept to the letter.

Both kinds are counted in the `FormatReport`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Message = dict[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": str}."""

MISSING_VALUE = "missing value"
NO_USER_TURN = "no user turn before the answer"
LAST_TURN_NOT_ASSISTANT = "last turn is not the assistant's"
EMPTY_REFERENCE_ANSWER = "empty reference answer"
PROMPTS_DIFFER = "prompts differ between chosen and rejected"
CHOSEN_EQUALS_REJECTED = "chosen equals rejected"

EMPTY_REJECTED_ANSWER = "empty rejected answer"
EMPTY_TURN = "empty turn left out"
CONSECUTIVE_TURNS = "consecutive turns of one role joined"
LITERAL_MARKER = "'Human:' or 'Assistant:' inside a turn's line kept as text"
NEAR_MARKER = "near-marker such as '\\nHuman:' or '\\n\\nhuman:' kept as text"
STRAY_WHITE_SPACE = "stray white space around a turn stripped"

ROLES = ("system", "user", "assistant")

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
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_HH_START = re.compile(r"\s*(?:Human|Assistant):")
_HH_MARKER = re.compile(r"\n\n(Human|Assistant):")
_NEAR_MARKER = re.compile(r"\n\s*(?:human|assistant):", re.IGNORECASE)
_LITERAL_MARKER = re.compile(r"(?:\A|\S)[^\S\n]*\b(?:Human|Assistant):")


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


@dataclass
class FormatReport:
    """What became of the rows. `rows_read == rows_kept + sum(dropped.values())`.

    Attributes:
        format: Name of the format found, one of the table above.
        rows_read: Rows seen.
        rows_kept: Rows that became examples.
        dropped: Rows dropped, by reason; a row counts once, under the first reason met.
        survived: Kept rows with an oddity, by oddity; a row counts once under each.
        prompts: Kept rows by how their prompts are written: `PLAIN`, `HH_TEXT` or `MESSAGES`.
    """

    format: str
    rows_read: int = 0
    rows_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Returns one paragraph for the console."""
        text = f"Read {self.rows_read} rows as {self.format}; kept {self.rows_kept}."
        for verb, counts in (("Dropped", self.dropped), ("Kept in spite of", self.survived)):
            if counts:
                told = "; ".join(f"{name}: {count}" for name, count in counts.most_common())
                text += f" {verb} - {told}."
        return text


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
            name; the columns fit no format; a value of a type, or a message of a role, that no
            format holds.
    """
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not columns:
        raise ValueError("the data must have at least one row with columns; got none")
    names = _new_names(columns, rename or {})
    used = _detect_format(list(names.values()))
    report = FormatReport(format=used)
    examples = []
    for number, row in enumerate(rows, start=1):
        report.rows_read += 1
        oddities: set[str] = set()
        try:
            renamed = {names[name]: value for name, value in row.items()}
            example = _parse_row(renamed, _FORMATS[used], oddities)
            report.prompts[_written(example, renamed, _FORMATS[used])] += 1
            examples.append(_as_chat(example) if as_chat else example)
        except _DropError as reason:
            report.dropped[str(reason)] += 1
        except _BadValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        else:
            report.survived.update(oddities)
    report.rows_kept = len(examples)
    return examples, report


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
        prompt=[_user(example.prompt)],
        reference_answer=reference_answer,
        rejected_answer=rejected_answer,
    )


class _DropError(Exception):
    """The row at hand cannot be used; the message is the reason counted."""


class _BadValueError(Exception):
    """The row at hand holds a value of a kind that no format has."""


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
    values: dict[str, Any] = {name: row.get(name) for name in used}
    if any(value is None for value in values.values()):
        raise _DropError(MISSING_VALUE)
    raw_prompt = values.pop("prompt", None)
    if used == ("chosen", "rejected"):
        texts = [value for value in values.values() if isinstance(value, str)]
        if len(texts) == 2 and any(_is_plain(text) for text in texts):
            raw_prompt, *answers = _split_shared_words(*texts)
            values = dict(zip(used, answers, strict=True))

    prompt: str | list[Message]
    if values:
        sides = [_join(raw_prompt, raw, name, oddities) for name, raw in values.items()]
        prompt, answers = _check_sides(sides, oddities)
    else:
        answers = []
        prompt = raw_prompt if _is_plain(raw_prompt) else _turns(raw_prompt, "prompt", oddities)

    if isinstance(prompt, str):
        if not prompt.strip():
            raise _DropError(NO_USER_TURN)
    else:
        prompt, answers = _tidy(prompt, answers, oddities)
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
        raise _DropError(LAST_TURN_NOT_ASSISTANT)
    if not answers[0].strip():
        raise _DropError(EMPTY_REFERENCE_ANSWER)
    if prompts[0] != prompts[-1]:
        raise _DropError(PROMPTS_DIFFER)
    if len(answers) == 2:
        if answers[0] == answers[1]:
            raise _DropError(CHOSEN_EQUALS_REJECTED)
        if not answers[1].strip():
            oddities.add(EMPTY_REJECTED_ANSWER)
    return prompts[0], answers


def _is_plain(value: Any) -> bool:
    """True for a string that is not an HH conversation."""
    return isinstance(value, str) and not _HH_START.match(value)


def _join(
    prompt: Any, answer: Any, name: str, oddities: set[str]
) -> tuple[str | list[Message], str | None]:
    """Returns prompt (its turns as written) and answer of one side; None without a final answer."""
    if prompt is not None and isinstance(answer, str):
        # With its own prompt column, an answer is text even if it starts with "Human:".
        if _is_plain(prompt):
            return prompt, answer
        return _turns(prompt, "prompt", oddities), answer.strip()

    turns = _turns(answer, name, oddities)
    # Where an answer starts afresh, it repeats the prompt (UltraFeedback's columns do).
    if prompt is not None and turns and turns[0]["role"] == "assistant":
        before = [_user(prompt)] if _is_plain(prompt) else _turns(prompt, "prompt", oddities)
        turns = before + turns
    if not turns or turns[-1]["role"] != "assistant":
        return turns, None
    return turns[:-1], turns[-1]["content"]


def _user(text: str) -> Message:
    return {"role": "user", "content": text.strip()}


def _turns(value: Any, name: str, oddities: set[str]) -> list[Message]:
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
    elif isinstance(value, list):
        raw = [_message(message, name) for message in value]
    else:
        text = "an HH conversation" if isinstance(value, str) else "a string"
        raise _BadValueError(
            f"column {name!r} must hold a list of messages or {text}; "
            f"got {type(value).__name__}: {_excerpt(value)}"
        )
    turns = [{"role": turn["role"], "content": turn["content"].strip()} for turn in raw]
    if turns != raw:
        oddities.add(STRAY_WHITE_SPACE)
    return turns


def _message(message: Any, name: str) -> Message:
    """Returns one message's role and content, checked; a content of None is an empty one."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise _BadValueError(
            f"column {name!r} must hold messages with role and content; got {_excerpt(message)}"
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise _BadValueError(
            f"column {name!r}: a message's role must be one of {', '.join(ROLES)}; got {role!r}; "
            "remove or convert such messages before training"
        )
    if not isinstance(content, str | None):
        raise _BadValueError(
            f"column {name!r}: a message's content must be a string; "
            f"got {type(content).__name__}: {_excerpt(content)}"
        )
    return {"role": role, "content": content or ""}


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _tidy(
    turns: list[Message], answers: list[str], oddities: set[str]
) -> tuple[list[Message], list[str]]:
    """Returns prompt and answers as chat templates take them: alternating roles, the user's last.

    An assistant turn right before the answers is joined to each of them. An empty system message
    stays: it is how a user switches off a template's default one.
    """
    if turns and turns[-1]["role"] == "user" and not turns[-1]["content"]:
        raise _DropError(NO_USER_TURN)
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
        raise _DropError(NO_USER_TURN)
    return tidy, answers


def _split_shared_words(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Returns the whole words two texts share at their start, and what follows in each.

    The answers keep the white space before their first word.
    """
    if chosen == rejected:
        raise _DropError(CHOSEN_EQUALS_REJECTED)
    pairs = enumerate(zip(chosen, rejected, strict=False))
    end = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    # Where a word goes on in either text, it is not shared.
    if chosen[end : end + 1].strip() or rejected[end : end + 1].strip():
        end = len(re.sub(r"\S*\Z", "", chosen[:end]))
    prompt = chosen[:end].rstrip()
    if not prompt:
        raise _DropError(PROMPTS_DIFFER)
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
