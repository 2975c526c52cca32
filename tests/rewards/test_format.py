"""Exact match and regular expressions."""

import time

import pytest

from grao_lightning.faults import UserError
from grao_lightning.rewards.format import ExactMatch, RegexMatch
from grao_lightning.rewards.protocol import RewardSpec


def match(completion: str, answer: str, **options) -> float | None:
    return ExactMatch(**options)([completion], [answer])[0]


@pytest.mark.parametrize(
    ("completion", "answer", "option"),
    [
        ("PARIS", "Paris", "ignore_case"),
        ("STRASSE", "straße", "ignore_case"),
        ("«Paris»!", "Paris", "ignore_punctuation"),
        ("$5 + 3", "5 3", "ignore_punctuation"),
        ("the end of a day", "end of day", "ignore_articles"),
    ],
)
def test_an_option_makes_equal_what_is_not_without_it(completion, answer, option):
    assert match(completion, answer) == 0
    assert match(completion, answer, **{option: True}) == 1


def test_white_space_and_composed_letters_never_matter():
    assert match(" New\n  York", "New York ") == 1
    assert match("cafe\u0301", "caf\u00e9") == 1
    assert match("NewYork", "New York") == 0


def test_what_a_pattern_extracts_is_compared_instead_of_the_texts():
    extract = r"answer: (\w+)"
    assert match("so, answer: 4", "answer: 4", extract=extract) == 1
    assert match("answer: 4, no, answer: 5", "answer: 5", extract=extract) == 1, "the last counts"
    assert match("answer: 4, no, answer: 5", "answer: 4", extract=extract) == 0
    assert match("4", "answer: 4", extract=extract) == 0
    assert match("x 12 y", "12", extract=r"\d+") == 1, "without a group, all that matches"
    assert match("a: 4", "b: 4", extract=r"\w: (\d)") == 1, "with a group, what it covers"


def test_a_reference_answer_with_nothing_to_compare_is_missing_not_0():
    assert match("x", "") is None and match("", " ") is None
    assert match("x", "?!", ignore_punctuation=True) is None
    assert match("answer: 4", "four", extract=r"answer: (\w+)") is None
    assert match("", "x") == 0


def regex(pattern: str, *texts: str, **options) -> list[float | None]:
    return RegexMatch(pattern, **options)(list(texts))


def test_a_pattern_covers_the_whole_text_or_a_part_of_it():
    texts = ["42", " 42\n", "it is 42", ""]
    assert regex(r"\d+", *texts) == [1, 1, 0, 0]
    assert regex(r"\d+", *texts, whole=False) == [1, 1, 1, 0]


def test_flags_stand_in_the_pattern():
    assert regex("a.b", "A\nb") == [0] and regex("(?is)a.b", "A\nb") == [1]


def test_a_match_that_takes_too_long_is_missing_and_said_once():
    # 2^60 ways to read sixty letters, none of which reaches the end.
    hanging = "a" * 60 + "?"
    with pytest.warns(UserWarning, match=r"took more than 0.05 s on a text of 61 char") as caught:
        started = time.perf_counter()
        assert regex("(?:a|a)+", hanging, "aaa", hanging, timeout=0.05) == [None, 1, None]
        assert match(hanging, "aaa", extract="(?:a|a)+$", timeout=0.05) is None
        assert match("aaa", hanging, extract="(?:a|a)+$", timeout=0.05) is None
    assert time.perf_counter() - started < 10
    assert len(caught) == 3, "one for each function"


# Errors


@pytest.mark.parametrize("pattern", ["(a", "*", "[z-a]", r"\8"])
def test_a_bad_pattern_is_refused_with_its_reason(pattern):
    for make in (lambda: RegexMatch(pattern), lambda: ExactMatch(extract=pattern)):
        with pytest.raises(UserError, match=r"must be a regular expression; got .*position \d"):
            make()


def test_patterns_and_times_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match=r"timeout must be > 0 seconds; got 0; .*got none: it"):
        RegexMatch("", timeout=0)
    with pytest.raises(UserError, match=r"at most one group; got 2 in '\(a\)\(b\)'"):
        ExactMatch(extract="(a)(b)")


def test_a_config_is_told_where_its_pattern_stands():
    spec = RewardSpec("grao_lightning.rewards.format.RegexMatch", arguments={"pattern": "("})
    with pytest.raises(
        UserError, match=r"scoring.rewards: arguments of .*RegexMatch: pattern must"
    ):
        spec.load()
