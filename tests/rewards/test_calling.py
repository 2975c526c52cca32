"""A scorer that fails for some texts loses those alone, and says so once."""

import asyncio
import logging
import math

import pytest

from grao_lightning.faults import UserError
from grao_lightning.rewards.protocol import RewardSpec, call_rewards
from grao_lightning.rewards.scorers import Scorers

ARGUMENTS = {"prompts": ["p"] * 4, "completions": ["1", "two", "3", "four"]}


def number(completions):
    return [float(int(text)) for text in completions]


async def number_later(completions, prompts):
    await asyncio.sleep(0)
    return [float(int(text)) for text in completions]


class Number:
    async def __call__(self, completions):
        return number(completions)


def returns_a_coroutine(completions):
    return number_later(completions, None)


def length(completions):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("function", [number, number_later, Number(), returns_a_coroutine])
def test_an_exception_makes_its_own_completion_missing_alone(function):
    failures = []
    scores = call_rewards(
        [function, length], ARGUMENTS, failed=lambda scorer, text, error: failures.append(text)
    )
    assert scores[1] == [1.0, 3.0, 1.0, 4.0]
    assert [scores[0][0], scores[0][2]] == [1.0, 3.0]
    assert math.isnan(scores[0][1]) and math.isnan(scores[0][3])
    assert failures == ["two", "four"]


@pytest.mark.parametrize("function", [number, number_later])
def test_where_nobody_is_told_the_exception_is_raised(function):
    with pytest.raises(ValueError, match="two"):
        call_rewards([function], ARGUMENTS)


def test_faults_of_settings_are_no_missing_scores():
    def refuses(completions):
        raise UserError("scoring.x must be y")

    with pytest.raises(UserError, match="must be y"):
        call_rewards([refuses], ARGUMENTS, failed=lambda *_: None)


def test_exceptions_are_counted_and_the_first_is_shown_with_its_text(caplog):
    scorers = Scorers([RewardSpec(number)])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            scorers.scores([RewardSpec(number)], ARGUMENTS, 0)
    assert len(caplog.records) == 1
    told = caplog.records[0].getMessage()
    assert "number raised an exception for 1 texts so far, whose rewards are missing" in told
    assert "test_calling.py, line" in told and "ValueError: invalid literal" in told
    assert "the text: 'two'" in told
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            scorers.scores([RewardSpec(number)], ARGUMENTS, 0)
    assert "for 10 texts so far" in caplog.records[1].getMessage() and len(caplog.records) == 2
