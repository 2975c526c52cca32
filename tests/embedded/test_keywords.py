"""The embedded task and its base."""

import statistics

import pytest
import torch

from grao_lightning.embedded.base import base_folder, make_base
from grao_lightning.embedded.keywords import FILLERS, KEYWORDS, keyword_rows, keyword_score
from grao_lightning.faults import UserError


def score(text: str, wanted: str = "apple bridge candle desert", truncated: bool = False) -> float:
    return keyword_score([text], [truncated], [wanted])[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("apple bridge candle desert", 1.0),
        # all there, one neighbour pair swapped: common subsequence 3 of 4
        ("bridge apple candle desert", 0.4 + 0.3 * 3 / 4 + 0.3),
        # three of four, one filler: one extra word
        ("apple well bridge candle", 0.4 * 3 / 4 + 0.3 * 3 / 4 + 0.3 * 0.75),
        # a repeated keyword is an extra word
        ("apple apple", 0.4 / 4 + 0.3 / 4 + 0.3 * 0.75),
        ("well please", 0.0),
        ("", 0.0),
        ("apple " + "well " * 9, 0.4 / 4 + 0.3 / 4),  # brevity never falls below 0
    ],
)
def test_the_score_is_the_sum_worked_out_by_hand(text, expected):
    assert score(text) == pytest.approx(expected)


def test_an_answer_cut_off_earns_nothing_for_brevity():
    assert score("apple bridge candle desert", truncated=True) == pytest.approx(0.7)


def test_the_order_of_other_completions_does_not_change_a_score():
    texts = ["apple", "bridge apple", "well"]
    together = keyword_score(texts, [False] * 3, ["apple bridge candle desert"] * 3)
    assert together == [score(text) for text in texts]


def test_rows_are_a_function_of_the_split_and_splits_do_not_overlap():
    train, validation = keyword_rows("train"), keyword_rows("validation")
    assert (len(train), len(validation)) == (4096, 256)
    assert keyword_rows("train") == train
    shared = {row["keywords"] for row in train} & {row["keywords"] for row in validation}
    assert len(shared) <= 0.05 * 256  # 255,024 ordered draws: a few prompts meet by chance
    assert not set(KEYWORDS) & set(FILLERS)


def test_reference_answers_are_imperfect_but_better_than_rejected_ones():
    rows = keyword_rows("validation")
    wanted = [row["keywords"] for row in rows]
    chosen, rejected = (
        keyword_score([row[name][0]["content"] for row in rows], [False] * 256, wanted)
        for name in ("chosen", "rejected")
    )
    assert 0.65 < statistics.mean(chosen) < 0.75
    assert max(chosen) < 0.95, "there must be room above the reference answers"
    assert statistics.mean(rejected) < statistics.mean(chosen) - 0.2


def test_an_unknown_split_or_base_lists_those_there_are():
    with pytest.raises(UserError, match="train, validation; got 'test'"):
        keyword_rows("test")
    with pytest.raises(UserError, match="embedded:keywords-weak"):
        base_folder("no-such")


def test_the_recipe_gives_the_same_weights_each_time_and_leaves_the_seed_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, _ = make_base(num_steps=2)
    assert torch.equal(torch.rand(2), expected)  # which moves the seed on
    second, _ = make_base(num_steps=2)
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_base_is_made_once_and_loads_like_any_model(monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grao_lightning.embedded import base

    monkeypatch.setenv("GRAO_CACHE", str(tmp_path))
    folder = base_folder("keywords-random")
    monkeypatch.setattr(base, "make_base", None)  # a second making would fail
    assert base_folder("keywords-random") == folder
    assert [path.name for path in tmp_path.iterdir()] == [folder.name], "nothing half-made is left"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert AutoTokenizer.from_pretrained(folder).chat_template
