"""How reward functions are found, called and summed."""

import asyncio
import math
import time

import pytest
import torch

from grao_lightning.faults import UserError
from grao_lightning.rewards.protocol import RewardSpec, call_rewards, weighted_sum

NAN = math.nan
ARGUMENTS = {
    "prompts": ["p", "p", "q"],
    "completions": ["a", "bb", "ccc"],
    "reference_answers": ["y", "y", "z"],
    "truncated": [False, True, False],
    "difficulty": [1, 1, 3],
}


def length(completions):
    return [len(text) for text in completions]


async def slow_length(completions, difficulty):
    await asyncio.sleep(0.2)
    return [len(text) * hard for text, hard in zip(completions, difficulty, strict=True)]


def everything(**columns):
    return [float(len(columns))] * 3


class Scaled:
    def __init__(self, factor: float) -> None:
        if factor <= 0:
            raise ValueError(f"factor must be > 0; got {factor}")
        self.factor = factor

    def __call__(self, completions):
        return [self.factor * len(text) for text in completions]


def test_functions_get_the_arguments_that_they_name():
    assert call_rewards([length, everything], ARGUMENTS) == [[1.0, 2.0, 3.0], [5.0] * 3]


def test_async_functions_run_side_by_side_and_inside_a_running_loop():
    async def notebook_cell():
        return call_rewards([slow_length] * 5, ARGUMENTS)

    started = time.perf_counter()
    scores = asyncio.run(notebook_cell())
    assert scores == [[1.0, 2.0, 9.0]] * 5
    assert time.perf_counter() - started < 0.8, "one after the other takes 1 s"


def test_none_is_missing_not_zero():
    scores = call_rewards([lambda completions: [None, 0.0, NAN]], ARGUMENTS)
    assert math.isnan(scores[0][0]) and scores[0][1] == 0.0 and math.isnan(scores[0][2])


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(UserError, match=r"column colour; the dataset has difficulty"):
        call_rewards([lambda completions, colour: []], ARGUMENTS)


def test_a_wrong_number_of_scores_is_refused():
    with pytest.raises(UserError, match="got 1 for 3 completions"):
        call_rewards([lambda completions: [1.0]], ARGUMENTS)


def test_import_paths_give_functions_and_classes_with_their_arguments():
    assert RewardSpec("tests.rewards.test_protocol.length").load()(["abc"]) == [3]
    scaled = RewardSpec("tests.rewards.test_protocol:Scaled", arguments={"factor": 2.0}).load()
    assert scaled(["abc"]) == [6.0]


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("no_such_package.reward", {}, "cannot import 'no_such_package.reward'"),
        ("tests.rewards.test_protocol.no_such", {}, "no_such"),
        ("reward", {}, "cannot import 'reward'"),
        ("tests.rewards.test_protocol.Scaled", {"fctor": 2.0}, "fctor"),
        ("tests.rewards.test_protocol.Scaled", {"factor": -2.0}, "factor must be > 0; got -2.0"),
    ],
)
def test_a_reward_that_cannot_be_made_is_an_error_that_names_it(path, arguments, message):
    with pytest.raises(UserError, match=message):
        RewardSpec(path, arguments=arguments).load()


def test_sum_is_weighted_and_missing_where_a_needed_score_is():
    scores = torch.tensor(
        [
            [[1.0, 2.0], [3.0, NAN], [NAN, NAN], [NAN, NAN]],
            [[10.0, 20.0], [30.0, 40.0], [50.0, 60.0], [NAN, NAN]],
        ]
    )
    expected = torch.tensor(
        [
            [2.0 + 5.0, 4.0 + 10.0],
            [6.0 + 15.0, NAN],  # one of two scores: not comparable with a whole sum
            [25.0, 30.0],  # the first function does not apply to this group
            [NAN, NAN],
        ]
    )
    torch.testing.assert_close(weighted_sum(scores, [2.0, 0.5]), expected, equal_nan=True)
