"""How reward functions are found, called and summed."""

import asyncio
import math
import pickle
import time
from functools import partial

import pytest
import torch

from grao_lightning.faults import UserError
from grao_lightning.rewards.protocol import (
    RewardSpec,
    call_rewards,
    columns_asked_for,
    is_pairwise,
    weighted_sum,
)

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


def test_pairwise_functions_see_no_reference_answer_and_give_it_0():
    class AgainstAnswer:
        pairwise = True

        def __call__(self, completions, reference_answers, difficulty):
            assert completions == ["a", "bb"] and difficulty == [1, 1]
            assert reference_answers == ["y", "y"]
            return [1.0, -1.0]

    scores = call_rewards([AgainstAnswer(), length], ARGUMENTS, num_reference_answers=1)
    assert scores == [[1.0, -1.0, 0.0], [1.0, 2.0, 3.0]]


def test_a_function_that_computes_runs_while_async_ones_wait():
    def slow(completions):
        time.sleep(0.3)
        return [0.0] * len(completions)

    async def waiting(completions):
        await asyncio.sleep(0.3)
        return [1.0] * len(completions)

    started = time.perf_counter()
    assert call_rewards([slow, waiting], ARGUMENTS) == [[0.0] * 3, [1.0] * 3]
    assert time.perf_counter() - started < 0.55, "one after the other takes 0.6 s"


def test_a_function_that_only_hands_on_an_async_one_is_waited_for_too():
    scores = call_rewards([lambda completions, difficulty: slow_length(**locals())], ARGUMENTS)
    assert scores == [[1.0, 2.0, 9.0]]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.0, 1.5, 0.0], r"finite scores in \[-1, 1\], None for a missing one; got 1.5"),
        ([0.0, -1.5, 0.0], "got -1.5"),
        ([0.0, math.inf, 0.0], "got inf"),
        ([0.0, "good", 0.0], "a list of numbers, None for a missing one.*'good'"),
        (None, "a list of numbers"),
    ],
)
def test_what_is_no_score_is_refused_with_the_functions_name(scores, message):
    def Bounded(completions):
        return scores

    Bounded.range = (-1, 1)
    with pytest.raises(UserError, match=f"reward function Bounded must return .*{message}"):
        call_rewards([Bounded], ARGUMENTS)


def test_infinite_scores_are_refused_without_a_range():
    with pytest.raises(UserError, match="got -inf"):
        call_rewards([lambda completions: [0.0, -math.inf, NAN]], ARGUMENTS)


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


def with_bonus(completions, bonus=0, scale=1):
    return [scale * len(text) + bonus for text in completions]


class Bonus:
    pairwise, range = True, (0.0, 100.0)

    def __call__(self, completions, bonus):
        return [len(text) + bonus for text in completions]


async def slow_bonus(completions, bonus, **columns):
    await asyncio.sleep(0.2)
    return [len(text) + bonus for text in completions]


@pytest.mark.parametrize(
    "function",
    [with_bonus, f"{__name__}.with_bonus", partial(with_bonus, scale=1), Bonus(), slow_bonus],
)
def test_arguments_of_the_config_reach_every_callable(function):
    (scores,) = call_rewards([RewardSpec(function, arguments={"bonus": 5}).load()], ARGUMENTS)
    assert scores == [6.0, 7.0, 8.0]


def test_a_callable_with_arguments_is_what_it_was_in_everything_else():
    made = RewardSpec(Bonus(), arguments={"bonus": 5}).load()
    assert is_pairwise(made) and made.range == (0.0, 100.0)
    assert columns_asked_for(made) == (set(), False)
    assert columns_asked_for(Bonus()) == ({"bonus"}, False)
    assert isinstance(pickle.loads(pickle.dumps(made)).__wrapped__, Bonus)
    started = time.perf_counter()
    call_rewards([RewardSpec(slow_bonus, arguments={"bonus": 5}).load()] * 5, ARGUMENTS)
    assert time.perf_counter() - started < 0.8, "one after the other takes 1 s"


def test_an_argument_of_the_config_hides_a_column_of_its_name():
    columns = {**ARGUMENTS, "bonus": [100, 200, 300]}
    for function in (with_bonus, slow_bonus):
        (scores,) = call_rewards([RewardSpec(function, arguments={"bonus": 5}).load()], columns)
        assert scores == [6.0, 7.0, 8.0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"bonnus": 5}, r"of with_bonus must be parameters .* got bonnus: did you mean bonus\?"),
        ({"weight": 5}, r"\(bonus, scale\); got weight: remove it, or add the parameter"),
        ({"completions": []}, r"must not hold completions, which comes from the data"),
    ],
)
def test_arguments_that_a_function_does_not_take_are_refused(arguments, told):
    with pytest.raises(UserError, match=told):
        RewardSpec(with_bonus, arguments=arguments).load()
