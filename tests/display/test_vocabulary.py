"""One name and one way of writing a figure."""

import pytest

from grao_lightning.display.vocabulary import JUDGES, TRAINING, VALIDATION, figure_of
from grao_lightning.rewards.judge.pairwise import _MEANS, _TOTALS


@pytest.mark.parametrize(
    ("tag", "label"),
    [
        ("val/ras", "RAS"),
        ("val/base_ras", "RAS"),
        ("val/reference_answer_length", "length"),
        ("val_bounds/base_rewards/margins_low", "margin"),
        ("train/kl", "KL"),
    ],
)
def test_a_figure_has_one_label_wherever_it_stands(tag, label):
    assert figure_of(tag).label == label


@pytest.mark.parametrize("tag", ["val/mine", "train/mine", "mine", "val_bounds/ras", "test/ras"])
def test_a_figure_of_the_users_is_unknown(tag):
    assert figure_of(tag) is None


def test_all_that_a_judge_tells_of_itself_is_explained():
    for name in (*_MEANS, *_TOTALS):
        assert figure_of(f"train/judge/{name}") is figure_of(f"val/judge/mine/{name}") is not None
    assert set(JUDGES) == {*_MEANS, *_TOTALS}


def test_shares_are_shown_in_percent_and_other_units_named():
    assert VALIDATION["nag"].shown(0.8) == "+80.0" and VALIDATION["nag"].heading == "NAG %"
    assert VALIDATION["length"].shown(5.04) == "5.0"
    assert VALIDATION["length"].heading == "length (tokens)"
    assert VALIDATION["reward"].heading == "reward", "its unit is the user's"


def test_every_figure_says_what_it_is_and_which_end_is_better():
    for figures in (VALIDATION, TRAINING, JUDGES):
        for figure in figures.values():
            assert figure.meaning and figure.better in ("higher", "lower", "")
            assert figure.shown(0.5)
