"""Penalties for length."""

import pytest

from grao_lightning.faults import UserError
from grao_lightning.rewards.length import LengthBand, SoftOverlong, TruncationPenalty


def words(number: int) -> str:
    return "word " * number


def test_the_band_costs_nothing_and_the_way_from_it_falls_to_minus_one():
    band = LengthBand(low=4, high=6, falloff=4)
    found = band([words(number) for number in range(13)])
    assert found == [-1, -0.75, -0.5, -0.25, 0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]


def test_a_band_without_width_wants_one_length():
    assert LengthBand(low=2, high=2, falloff=1)([words(1), words(2), words(3)]) == [-1, 0, -1]


def test_characters_are_counted_without_outer_space():
    band = LengthBand(low=4, high=4, falloff=4, pieces="characters")
    assert band(["你好世界", " \n你好世界\t", "a b", ""]) == [0, 0, -0.25, -1]


def soft_overlong(length: int, max_length: int, cache: int) -> float:
    """Equation 13 of arXiv 2503.14476, case by case."""
    if length <= max_length - cache:
        return 0.0
    if length <= max_length:
        return ((max_length - cache) - length) / cache
    return -1.0


@pytest.mark.parametrize(("max_length", "margin"), [(10, 4), (10, 10), (7, 1)])
def test_soft_overlong_is_equation_13(max_length, margin):
    found = SoftOverlong(max_length, margin)([words(n) for n in range(15)], [False] * 15)
    assert found == pytest.approx([soft_overlong(n, max_length, margin) for n in range(15)])


def test_a_truncated_completion_is_at_the_limit_however_few_its_words():
    overlong = SoftOverlong(max_length=10, margin=4)
    assert overlong([words(3), words(3), ""], [True, False, True]) == [-1, 0, -1]
    assert TruncationPenalty()([True, False]) == [-1, 0]


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": -1}, "low must be >= 0; got -1"),
        ({"high": 1}, "high must be >= 2: .*; got 1"),
        ({"falloff": 0}, "falloff must be > 0; got 0"),
        ({"falloff": float("nan")}, "falloff must be > 0; got nan"),
        ({"pieces": "tokens"}, "pieces must be one of words, characters; got 'tokens'"),
    ],
)
def test_a_band_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        LengthBand(**{"low": 2, "high": 4, "falloff": 1, **arguments})


def test_all_faults_of_the_arguments_are_told_together():
    with pytest.raises(UserError, match=r"(?s)max_length must be >= 9.*got 8; pieces must"):
        SoftOverlong(max_length=8, margin=9, pieces="lines")
    with pytest.raises(UserError, match="margin must be > 0; got 0"):
        SoftOverlong(max_length=8, margin=0)
