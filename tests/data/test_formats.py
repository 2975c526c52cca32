"""Laws of the row formats. Real data is read from the folder in GRAO_TEST_HH, if set."""

import gzip
import json
import os
from pathlib import Path

import pytest

from grao_lightning.data import formats, shared_text, turns
from grao_lightning.data.formats import parse_rows


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def hh(*turns):
    """HH text of turns, the human's first."""
    return "".join(
        f"\n\n{'Assistant' if i % 2 else 'Human'}: {text}" for i, text in enumerate(turns)
    )


def one(row, rename=None):
    """The example of a single row that must be kept, and what was odd about it."""
    (example,), report = parse_rows([row], rename)
    return example, dict(report.survived)


def reason(row):
    """Why a single row is dropped."""
    examples, report = parse_rows([row])
    assert not examples
    ((text, count),) = report.dropped.items()
    assert count == 1
    return text


HI = [user("Hi")]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": hh("Hi", "Hello"), "rejected": hh("Hi", "No")},
        {"prompt": hh("Hi") + "\n\nAssistant:", "chosen": " Hello", "rejected": " No"},
        {"prompt": HI, "chosen": "Hello", "rejected": "No"},
        {"prompt": HI, "chosen": [assistant("Hello")], "rejected": [assistant("No")]},
        {"prompt": "Hi", "chosen": [assistant("Hello")], "rejected": [assistant("No")]},
        {"chosen": [*HI, assistant("Hello")], "rejected": [*HI, assistant("No")]},
        {
            "prompt": "Hi",
            "chosen": [*HI, assistant("Hello")],
            "rejected": [*HI, assistant("No")],
            "messages": [*HI, assistant("Hello")],
        },
    ],
)
def test_every_preference_form_gives_the_same_conversation(row):
    example, _ = one(row)
    assert (example.prompt, example.reference_answer, example.rejected_answer) == (
        HI,
        "Hello",
        "No",
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HI, "completion": [assistant("Hello")]},
        {"prompt": hh("Hi"), "completion": "Hello"},
        {"messages": [*HI, assistant("Hello")]},
        {"messages": hh("Hi", "Hello")},
    ],
)
def test_every_demonstration_form_gives_the_same_conversation(row):
    example, _ = one(row)
    assert (example.prompt, example.reference_answer, example.rejected_answer) == (
        HI,
        "Hello",
        None,
    )


@pytest.mark.parametrize("prompt", [HI, hh("Hi"), hh("Hi") + "\n\nAssistant:", "Human: Hi"])
def test_prompt_only_conversations_have_no_answers(prompt):
    example, odd = one({"prompt": prompt})
    assert (example.prompt, example.reference_answer, example.rejected_answer) == (HI, None, None)
    assert odd == {}


def test_standard_strings_are_kept_to_the_letter():
    example, odd = one({"prompt": " The sky is", "chosen": " blue. ", "rejected": " Human: x"})
    assert example.prompt == " The sky is"
    assert (example.reference_answer, example.rejected_answer) == (" blue. ", " Human: x")
    assert odd == {}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "answer"),
    [
        ("Q: a\nA: yes", "Q: a\nA: no", "Q: a\nA:", " yes"),
        ("Q: is it? A: I think it is fine", "Q: is it? A: I think it is bad",
         "Q: is it? A:", " I think it is fine"),
        ("Q: a\nA: well,\nyes", "Q: a\nA: well,\nno", "Q: a\nA:", " well,\nyes"),
        ("### Instruction:\nx\n\n### Response:\nyes", "### Instruction:\nx\n\n### Response:\nno",
         "### Instruction:\nx\n\n### Response:", "\nyes"),
        ("What is it?\nIt is good", "What is it?\nIt is bad", "What is it?", "\nIt is good"),
        ("What?\n\nyes", "What?\n\nno", "What?", "\n\nyes"),
        # A marker that only one of them has, or that is part of a word, is text.
        ("Mary said\nAnna: x", "Mary said\nAnna y", "Mary said", "\nAnna: x"),
    ],
)  # fmt: skip
def test_texts_that_begin_alike_are_cut_where_the_question_they_share_ends(
    chosen, rejected, prompt, answer
):
    example, odd = one({"chosen": chosen, "rejected": rejected})
    assert (example.prompt, example.reference_answer) == (prompt, answer)
    assert example.prompt + example.rejected_answer == rejected
    marked = prompt.endswith(":")
    assert odd == {shared_text.CUT_AT_A_TURN if marked else shared_text.CUT_AT_A_LINE: 1}


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is black."),
        ("The sky is so", "The sky is\nno"),
        ("\nThe sky is so", "\nThe sky is no"),
        ("Q: a b", "Q: a\tc"),
    ],
)
def test_texts_that_share_no_boundary_are_not_cut_in_an_answer(chosen, rejected):
    assert reason({"chosen": chosen, "rejected": rejected}) == shared_text.NO_BOUNDARY


def test_other_columns_reach_the_example_and_used_ones_do_not():
    row = {"prompt": "p", "messages": [*HI, assistant("a")], "topic": "t", "score": 3}
    assert one(row)[0].columns == {"topic": "t", "score": 3}


def test_rename_maps_the_users_columns_to_ours():
    example, _ = one(
        {"question": "q", "answer": "a"}, {"question": "prompt", "answer": "completion"}
    )
    assert (example.prompt, example.reference_answer, example.columns) == ("q", "a", {})


def test_rename_may_swap_two_columns():
    example, _ = one(
        {"prompt": "a", "completion": "q"}, {"prompt": "completion", "completion": "prompt"}
    )
    assert (example.prompt, example.reference_answer) == ("q", "a")


def test_unknown_rename_key_lists_the_columns_there_are():
    with pytest.raises(ValueError, match=r"data\.rename .* quest not found; there are prompt, x"):
        parse_rows([{"prompt": "p", "x": 1}], {"quest": "prompt"})


def test_rename_onto_an_existing_column_is_refused():
    with pytest.raises(ValueError, match="id, question would all be called 'id'"):
        parse_rows([{"id": 1, "question": "q"}], {"question": "id"})


@pytest.mark.parametrize("row", [{"text": "t", "label": 1}, {"prompt": "p", "chosen": "c"}])
def test_unusable_columns_name_what_was_found_what_fits_and_the_fix(row):
    with pytest.raises(ValueError) as error:
        parse_rows([row])
    for part in (", ".join(row), "prompt, completion", "chosen, rejected", "data.rename"):
        assert part in str(error.value)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least one row"):
        parse_rows([])


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (True, turns.NEITHER_TEXT_NOR_MESSAGES),
        ("text", turns.NEITHER_TEXT_NOR_MESSAGES),
        ([3], turns.NO_MESSAGE),
        ([{"role": "user"}], turns.NO_MESSAGE),
        ([{"content": "x"}], turns.NO_MESSAGE),
        ([{"role": "narrator", "content": "x"}], turns.UNKNOWN_ROLE),
        ([{"role": ["user"], "content": "x"}], turns.UNKNOWN_ROLE),
        ([{"role": "tool", "content": "x"}], turns.TOOLS),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], turns.TOOLS),
        ([{"role": "user", "content": [{"type": "image"}]}], turns.NOT_TEXT),
        ([{"role": "user", "content": True}], turns.NOT_TEXT),
    ],
)
def test_a_value_that_no_format_holds_drops_its_row_alone_and_is_shown_once(value, why):
    good = {"messages": [*HI, assistant("a")]}
    examples, report = parse_rows([good, {"messages": value}, {"messages": value}, good])
    assert len(examples) == 2 and report.dropped == {why: 2}
    assert str(report).count(why) == 1 and "(first: row 2: {'messages'" in str(report)


@pytest.mark.parametrize(("dropped", "told"), [(1, False), (2, True)])
def test_more_than_a_tenth_dropped_is_many(dropped, told):
    rows = [{"prompt": "p", "completion": "c"}] * (10 - dropped)
    _, report = parse_rows(rows + [{"prompt": None, "completion": "c"}] * dropped)
    assert report.drops_many == told


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chosen": hh("Hi", "a"), "rejected": hh("Ho", "b")}, shared_text.PROMPTS_DIFFER),
        # A chosen answer that runs on into a further turn: its prompt is longer as written.
        ({"chosen": hh("Hi", "a") + "\n\nAssistant: b", "rejected": hh("Hi", "c")},
         shared_text.PROMPTS_DIFFER),
        ({"chosen": "a x", "rejected": "b x"}, shared_text.PROMPTS_DIFFER),
        ({"chosen": hh("Hi", " "), "rejected": hh("Hi", "b")}, formats.EMPTY_REFERENCE_ANSWER),
        ({"prompt": "p", "completion": " "}, formats.EMPTY_REFERENCE_ANSWER),
        ({"chosen": hh("Hi", "a "), "rejected": hh("Hi", " a")},
         shared_text.CHOSEN_EQUALS_REJECTED),
        ({"chosen": "a", "rejected": "a"}, shared_text.CHOSEN_EQUALS_REJECTED),
        ({"chosen": hh("Hi", "a", "b"), "rejected": hh("Hi", "a", "b")},
         formats.LAST_TURN_NOT_ASSISTANT),
        ({"messages": []}, formats.LAST_TURN_NOT_ASSISTANT),
        ({"messages": [*HI, assistant("a"), user("b")]}, formats.LAST_TURN_NOT_ASSISTANT),
        ({"messages": [system("s"), assistant("a")]}, turns.NO_USER_TURN),
        ({"messages": [user(" "), assistant("a")]}, turns.NO_USER_TURN),
        ({"messages": hh("Hi", "a", "", "b")}, turns.NO_USER_TURN),
        ({"prompt": [*HI, assistant("a")]}, turns.NO_USER_TURN),
        ({"prompt": "  "}, turns.NO_USER_TURN),
        ({"prompt": "p", "completion": None}, formats.MISSING_VALUE),
    ],
)  # fmt: skip
def test_unusable_rows_are_dropped_and_counted_under_one_reason(row, why):
    assert reason(row) == why


def test_text_like_a_marker_is_not_a_turn():
    text = "a\nHuman: b\n\nhuman: c\n\nASSISTANT: d\n\n Human: e"
    example, odd = one({"chosen": hh("Hi", text), "rejected": hh("Hi", "no")})
    assert example.prompt == HI
    assert example.reference_answer == text
    assert odd == {turns.NEAR_MARKER: 1}


@pytest.mark.parametrize("text", ["He said Human: no", "Human: no", "a\nAs Assistant: b"])
def test_a_literal_marker_inside_a_line_is_kept_and_counted(text):
    example, odd = one({"chosen": hh("Hi", text), "rejected": hh("Hi", "no")})
    assert example.reference_answer == text
    assert odd == {turns.LITERAL_MARKER: 1}


def test_the_first_marker_needs_no_newlines_but_later_ones_do():
    example, _ = one(
        {"chosen": "Human: Hi\n\nAssistant: a", "rejected": "\nHuman: Hi\n\nAssistant:b"}
    )
    assert (example.prompt, example.reference_answer, example.rejected_answer) == (HI, "a", "b")


def test_white_space_around_turns_is_stripped_and_counted():
    example, odd = one({"chosen": hh(" Hi\n", "a "), "rejected": hh("Hi", "b")})
    assert (example.prompt, example.reference_answer) == (HI, "a")
    assert odd == {turns.STRAY_WHITE_SPACE: 1}


def test_the_usual_form_is_not_odd():
    assert one({"chosen": hh("Hi", "a"), "rejected": hh("Hi", "b")})[1] == {}


def test_consecutive_turns_of_one_role_are_joined():
    rows = {
        "messages": [system("s"), user("a"), user("b"), assistant("c"), user("d"), assistant("e")]
    }
    example, odd = one(rows)
    assert example.prompt == [system("s"), user("a\n\nb"), assistant("c"), user("d")]
    assert odd == {turns.CONSECUTIVE_TURNS: 1}


def test_an_assistants_turn_before_the_answers_is_joined_to_each():
    start = hh("Hi", "a") + "\n\nAssistant: "
    example, odd = one({"chosen": start + "b", "rejected": start + "c"})
    assert (example.prompt, example.reference_answer) == (HI, "a\n\nb")
    assert example.rejected_answer == "a\n\nc"
    assert odd == {turns.CONSECUTIVE_TURNS: 1}


def test_an_empty_turn_is_left_out_and_its_neighbours_joined():
    example, odd = one({"messages": hh("a", "", "b", "c")})
    assert example.prompt == [user("a\n\nb")]
    assert odd == {turns.EMPTY_TURN: 1, turns.CONSECUTIVE_TURNS: 1}


def test_an_empty_system_message_stays():
    assert one({"prompt": [system(""), *HI]})[0].prompt == [system(""), *HI]


def test_an_empty_rejected_answer_is_kept_and_counted():
    example, odd = one({"chosen": hh("Hi", "a"), "rejected": hh("Hi", "")})
    assert example.rejected_answer == ""
    assert odd[formats.EMPTY_REJECTED_ANSWER] == 1


def test_rows_are_neither_changed_nor_shared():
    row = {"messages": [user(" a "), user("b"), assistant("c")]}
    before = json.dumps(row)
    one(row)
    assert json.dumps(row) == before


def test_report_accounts_for_every_row():
    rows = [
        {"chosen": hh("Hi", "a"), "rejected": hh("Hi", "b ")},
        {"chosen": hh("Hi", "a"), "rejected": hh("Hi", "a")},
        {"chosen": hh("Hi", ""), "rejected": None},
    ]
    examples, report = parse_rows(rows)
    assert (report.rows_read, report.rows_kept, len(examples)) == (3, 1, 1)
    assert sum(report.dropped.values()) == 2
    assert str(report) == (
        "Read 3 rows as preference (implicit prompt); kept 1. Dropped - chosen equals rejected: 1 "
        "(first: row 2: {'chosen': '\\n\\nHuman: Hi\\n\\nAssistant: a', 'rejected': "
        "'\\n\\nHuman: Hi\\n\\nAssistant: a'}); missing value: 1 (first: row 3: {'chosen': "
        "'\\n\\nHuman: Hi\\n\\nAssistant: ', 'rejected': None}). Kept in spite of - stray white "
        "space around a turn stripped: 1."
    )


def hh_keep(row):
    """Whether the usual filter keeps an HH row: whole-string searches, no parsing into turns."""
    marker = "\n\nAssistant:"
    (chosen_prompt, chosen), (rejected_prompt, rejected) = (
        (text[: text.rindex(marker)], text[text.rindex(marker) + len(marker) :])
        for text in (row["chosen"], row["rejected"])
    )
    human_last = any("\n\nHuman:" in answer for answer in (chosen, rejected))
    return (
        not human_last
        and "".join(chosen_prompt.split()) == "".join(rejected_prompt.split())
        and chosen.strip() != ""
        and chosen.strip() != rejected.strip()
    )


@pytest.mark.parametrize(
    ("name", "read", "kept"),
    [
        ("harmless-base.train", 1777, 1774),
        ("harmless-base.validation", 225, 224),
        ("helpful-base.train", 1776, 1766),
        ("helpful-base.validation", 254, 253),
    ],
)
def test_real_hh_rows_kept_match_an_independent_count(name, read, kept):
    folder = os.environ.get("GRAO_TEST_HH")
    if not folder:
        pytest.skip("GRAO_TEST_HH (folder with the HH files) is not set")
    with gzip.open(Path(folder) / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    examples, report = parse_rows(rows)
    expected = [row for row in rows if hh_keep(row)]
    assert (report.rows_read, report.rows_kept, len(expected)) == (read, kept, kept)
    for row, example in zip(expected, examples, strict=True):
        assert row["chosen"].rstrip().endswith(example.reference_answer)
        assert row["rejected"].rstrip().endswith(example.rejected_answer)
        roles = [turn["role"] for turn in example.prompt]
        assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]
        # Nothing is lost: prompt and answer hold the text's every word, markers aside.
        words = row["chosen"].replace("\n\nHuman:", " ").replace("\n\nAssistant:", " ").split()
        said = [turn["content"] for turn in example.prompt] + [example.reference_answer]
        assert " ".join(said).split() == words
