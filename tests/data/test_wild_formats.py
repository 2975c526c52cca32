"""Files as they are found: each is read as its author meant it, and what is not used is counted."""

import csv
import json
import math

import pytest

from grao_lightning.data import formats, labelled, turns
from grao_lightning.data.datamodule import PromptDataModule
from grao_lightning.data.formats import parse_rows
from grao_lightning.data.sources import load_rows

U = {"role": "user", "content": "Hi"}
A = {"role": "assistant", "content": "Hello"}
#: name of the file -> (rows, [(prompt, reference answer, rejected answer)], dropped, oddities)
FILES = {
    "kto.jsonl": (
        [
            {"prompt": "p", "completion": "bad", "label": False},
            {"prompt": "p", "completion": "good", "label": True},
            {"prompt": "q", "completion": "fine", "label": True},
            {"prompt": "r", "completion": "awful", "label": False},
            {"prompt": "p", "completion": "worse", "label": False},
            {"prompt": "s", "completion": "who knows", "label": None},
        ],
        [("p", "good", "bad"), ("q", "fine", None)],
        {labelled.BAD_ANSWER: 2, formats.MISSING_VALUE: 1},
    ),
    "kto_chat.jsonl": (
        [
            {"prompt": [U], "completion": [A], "label": True},
            {"prompt": [U], "completion": [{**A, "content": "Go"}], "label": False},
        ],
        [([U], "Hello", "Go")],
    ),
    "kto_numbers.csv": (
        [
            {"prompt": "p", "completion": "good", "label": 1},
            {"prompt": "p", "completion": "bad", "label": 0},
        ],
        [("p", "good", "bad")],
    ),
    "topics.jsonl": (  # labels that do not judge are a column like any other
        [{"prompt": "p", "completion": "a", "label": "sports"},
         {"prompt": "q", "completion": "b", "label": None}],
        [("p", "a", None), ("q", "b", None)],
    ),
    "sharegpt.jsonl": (
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
          "system": "Be kind"},
         {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
          "system": None}],
        [([{"role": "system", "content": "Be kind"}, U], "Hello", None), ([U], "Hello", None)],
    ),
    "sharegpt_dpo.jsonl": (
        [{"conversations": [{"from": "human", "value": "Hi"}],
          "chosen": {"from": "gpt", "value": "Hello"}, "rejected": {"from": "gpt", "value": "No"}}],
        [([U], "Hello", "No")],
    ),
    "openai_conversations.jsonl": (
        [{"conversations": [U, A], "id": "1"}],
        [([U], "Hello", None)],
    ),
    "alpaca.json": (
        [{"instruction": "Add.", "input": "1 and 2", "output": "3"},
         {"instruction": "Greet.", "input": "", "output": "Hello"},
         {"instruction": "", "input": "", "output": "x"}],
        [("Add.\n\n1 and 2", "3", None), ("Greet.", "Hello", None)],
        {formats.MISSING_VALUE: 1},
    ),
    "dolly.jsonl": (
        [{"instruction": "Greet.", "response": "Hello", "category": "chat"}],
        [("Greet.", "Hello", None)],
    ),
    "alpaca_dpo.jsonl": (
        [{"instruction": "Greet.", "input": None, "chosen": "Hello", "rejected": "No"}],
        [("Greet.", "Hello", "No")],
    ),
    "developer.jsonl": (
        [{"messages": [{"role": "developer", "content": "Be kind"}, U, A]}],
        [([{"role": "system", "content": "Be kind"}, U], "Hello", None)],
    ),
    "tools.jsonl": (
        [{"messages": [U, {**A, "content": ""}, {"role": "tool", "content": "3"}, A]},
         {"messages": [U, A]}],
        [([U], "Hello", None)],
        {turns.TOOLS: 1},
    ),
    "parts.jsonl": (
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                       {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]},
         {"messages": [{"role": "user", "content": [{"type": "image", "text": None}]},
                       {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]}],
        [([U], "Hello", None)],
        {turns.NOT_TEXT: 1},
    ),
    "numbers.jsonl": (
        [{"prompt": "2 + 2", "completion": 4}, {"prompt": "1 / 2", "completion": 0.5}],
        [("2 + 2", "4", None), ("1 / 2", "0.5", None)],
    ),
    "numbers_some_missing.csv": (
        [{"prompt": "2 + 2", "completion": 4}, {"prompt": "x", "completion": None}],
        [("2 + 2", "4", None)],
        {formats.MISSING_VALUE: 1},
    ),
    "reasoning.jsonl": (
        [{"messages": [U, {**A, "reasoning_content": "They greet."}]}],
        [([U], "Hello", None)],
        {},
        {turns.REASONING: 1},
    ),
    "texts.jsonl": (
        [{"chosen": "Q: is it? A: I think it is fine",
          "rejected": "Q: is it? A: I think it is bad"}],
        [("Q: is it? A:", " I think it is fine", " I think it is bad")],
    ),
    "hh.jsonl": (
        [{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
          "rejected": "\n\nHuman: Hi\n\nAssistant: No"}],
        [([U], "Hello", "No")],
    ),
    "ultrafeedback.jsonl": (
        [{"prompt": "Hi", "chosen": [U, A], "rejected": [U, {**A, "content": "No"}],
          "score_chosen": 8.0}],
        [([U], "Hello", "No")],
    ),
    "prompts.jsonl": ([{"prompt": "Hi", "answer": "42"}], [("Hi", None, None)]),
}  # fmt: skip


def written(folder, name, rows):
    path = folder / name
    if name.endswith(".csv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_its_author_meant(name, tmp_path):
    rows, expected, dropped, odd, *_ = (*FILES[name], {}, {})
    examples, report = parse_rows(load_rows(written(tmp_path, name, rows), split="train"))
    found = [(one.prompt, one.reference_answer, one.rejected_answer) for one in examples]
    assert found == expected
    assert report.dropped == dropped and odd.items() <= report.survived.items()
    assert report.rows_read == len(rows)
    assert len(rows) == len(examples) + report.rows_paired + sum(dropped.values())


def test_a_label_that_judges_is_no_column_and_another_one_is():
    rows = [{"prompt": "p", "completion": "a", "label": True, "topic": "t"}]
    assert parse_rows(rows)[0][0].columns == {"topic": "t"}
    rows = [{"prompt": "p", "completion": "a", "label": "sports"}]
    assert parse_rows(rows)[0][0].columns == {"label": "sports"}


def test_a_label_that_no_row_has_judges_nothing():
    rows = [{"prompt": "p", "completion": "a", "label": None}] * 2
    examples, report = parse_rows(rows)
    assert len(examples) == 2 and not report.dropped


def test_nan_is_a_missing_value():
    rows = [{"prompt": "p", "completion": math.nan}, {"prompt": "p", "completion": "a"}]
    assert parse_rows(rows)[1].dropped == {formats.MISSING_VALUE: 1}


def test_many_rows_dropped_are_warned_of_when_the_data_is_read():
    rows = [{"prompt": "p", "completion": "c"}] * 4 + [{"prompt": "p", "completion": None}]
    with pytest.warns(UserWarning, match="data.train: 1 of 5 rows are dropped, see above"):
        PromptDataModule(train=rows).read("train")
