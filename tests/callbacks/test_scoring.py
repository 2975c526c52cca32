"""Groups scored against their reference answers."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from grao_lightning.advantages import group_advantages
from grao_lightning.batch import Completions, PromptBatch
from grao_lightning.callbacks.scoring import GroupScoring
from grao_lightning.rewards.protocol import RewardSpec
from tests.runs import fit, stages

HERE = "tests.callbacks.test_scoring"


def word_count(completions):
    return [float(len(text.split())) for text in completions]


def missing_where_empty(completions):
    return [float(len(text.split())) if text else None for text in completions]


def bonus(completions, extra):
    return [float(value) for value in extra]


def scored(
    texts,
    answers,
    *,
    extra=(),
    needs_spread=True,
    own_statistics="inside",
    own_scale="population_std",
    **options,
) -> PromptBatch:
    """Score the groups ``texts`` against ``answers`` and return their batch."""
    group_size = len(texts[0])
    flat = [text for group in texts for text in group]
    batch = PromptBatch(
        indices=list(range(len(texts))),
        prompt_ids=[[1]] * len(texts),
        prompts=["q"] * len(texts),
        reference_answer_ids=[[2]] * len(texts),
        reference_answers=answers,
        columns=[{"extra": value} for value in extra] or [{}] * len(texts),
        completions=Completions([[2]] * len(flat), flat, [False] * len(flat), group_size),
    )
    scoring = GroupScoring(
        **{"rewards": [RewardSpec(f"{HERE}.word_count")], "comparison": "raw", **options}
    )
    trainer = SimpleNamespace(
        global_step=0, precision_plugin=SimpleNamespace(forward_context=nullcontext)
    )
    module = SimpleNamespace(
        trains_on_groups=True,
        needs_spread=needs_spread,
        group_statistics=own_statistics,
        group_scale=own_scale,
    )
    scoring.on_train_batch_start(trainer, module, batch, 0)
    return batch


TEXTS = [["a", "a b", "a b c"], ["a b", "a b", "a b"]]
ANSWERS = ["a b", "a b"]


def test_rewards_are_those_of_completions_and_then_of_the_reference_answer():
    batch = scored(TEXTS, ANSWERS)
    assert batch.rewards.tolist() == [[1, 2, 3, 2], [2, 2, 2, 2]]
    assert batch.outcomes.tolist() == [[-1, 0, 1], [0, 0, 0]]


def test_raw_advantages_come_from_rewards_and_pairwise_ones_from_outcomes():
    texts = [["a", "a b c d e f", "a b c"]]
    raw = scored(texts, ["a b"])
    pairwise = scored(texts, ["a b"], comparison="pairwise")
    expected_raw = group_advantages(torch.tensor([[1.0, 6.0, 3.0, 2.0]]))
    expected_pairwise = group_advantages(torch.tensor([[-1.0, 1.0, 1.0, 0.0]]))
    torch.testing.assert_close(raw.advantages, expected_raw)
    torch.testing.assert_close(pairwise.advantages, expected_pairwise)


def test_differences_within_the_tolerance_are_ties():
    assert scored(TEXTS, ANSWERS, tie_tolerance=1.0).outcomes.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_weights_multiply_and_each_function_is_kept_by_its_name():
    rewards = [
        RewardSpec(f"{HERE}.word_count", weight=2.0),
        RewardSpec(f"{HERE}.bonus", weight=-1.0, name="extra_bonus"),
    ]
    batch = scored(TEXTS, ANSWERS, extra=[10, 20], rewards=rewards)
    # 2 * words - extra, the column of the group's own prompt
    assert batch.rewards.tolist() == [[-8, -6, -4, -6], [-16, -16, -16, -16]]
    assert batch.rewards_by_name["extra_bonus"].tolist() == [[10] * 4, [20] * 4]


def test_a_missing_score_is_left_out_and_never_counts_as_zero():
    rewards = [RewardSpec(f"{HERE}.missing_where_empty")]
    batch = scored([["a b c", "", "a"]], ["a b"], rewards=rewards)
    assert batch.rewards[0].isnan().tolist() == [False, True, False, False]
    assert math.isnan(batch.outcomes[0, 1])
    expected = group_advantages(torch.tensor([[3.0, 1.0, 2.0]]))[0]
    kept = batch.advantages[0, [0, 2, 3]]
    torch.testing.assert_close(kept, expected)
    assert batch.advantages[0, 1] == 0
    statistics = batch.statistics.reduced(lambda values, _: values)
    assert statistics["reward"] == 2.0, "mean of 3 and 1"
    assert statistics["ras"] == 0.5, "one of two compared completions wins"
    assert statistics["missing_rewards"] == 0.25


def test_statistics_tell_dead_groups_and_the_spread():
    statistics = scored(TEXTS, ANSWERS).statistics.reduced(lambda values, _: values)
    assert statistics["frac_reward_zero_std"] == 0.5
    # groups {1, 2, 3} and {2, 2, 2}: population std sqrt(2/3) and 0
    assert statistics["reward_std"] == pytest.approx(math.sqrt(2 / 3) / 2)
    assert statistics["reference_answer/reward"] == 2.0


def test_the_order_of_prompts_and_of_completions_moves_rewards_along():
    texts, answers = [["a", "a b", "a b c"], ["x y", "x", "x"]], ["a b", "x"]
    batch, swapped = scored(texts, answers), scored(texts[::-1], answers[::-1])
    assert torch.equal(batch.advantages, swapped.advantages.flip(0))
    turned = scored([group[::-1] for group in texts], answers)
    assert torch.equal(batch.advantages[:, :-1], turned.advantages[:, :-1].flip(1))


def recorded(prompts, completions, reference_answers, truncated, extra):
    SEEN.update(
        prompts=prompts,
        completions=completions,
        reference_answers=reference_answers,
        truncated=truncated,
        extra=extra,
    )
    return [0.0] * len(completions)


SEEN: dict[str, list] = {}


def test_functions_see_completions_in_order_and_then_the_reference_answers_each_with_its_own():
    batch = PromptBatch(
        indices=[0, 1],
        prompt_ids=[[1]] * 2,
        prompts=["p", "q"],
        reference_answer_ids=[[2]] * 2,
        reference_answers=["y", "z"],
        columns=[{"extra": 1}, {"extra": 2}],
        completions=Completions([[2]] * 4, ["a", "b", "c", "d"], [True, False, False, False], 2),
    )
    specs = [RewardSpec(f"{HERE}.recorded")]
    GroupScoring(specs)._score(batch, batch.completions, specs)
    assert SEEN == {
        "prompts": ["p", "p", "q", "q", "p", "q"],
        "completions": ["a", "b", "c", "d", "y", "z"],
        "reference_answers": ["y", "y", "z", "z", "y", "z"],
        "truncated": [True, False, False, False, False, False],
        "extra": [1, 1, 2, 2, 1, 2],
    }


@pytest.mark.parametrize("statistics", ["inside", "outside", "split"])
def test_the_choice_of_statistics_reaches_the_advantages(statistics):
    texts = [["a", "a b c d e f", "a b c"]]
    advantages = scored(texts, ["a b"], statistics=statistics).advantages
    rewards = torch.tensor([[1.0, 6.0, 3.0, 2.0]])
    torch.testing.assert_close(advantages, group_advantages(rewards, statistics=statistics))


@pytest.mark.parametrize("asked_for", [None, "sample_std"])
def test_without_a_setting_the_method_chooses_its_statistics_and_scale(asked_for):
    texts = [["a", "a b c d e f", "a b c"]]
    own = {"own_statistics": "outside", "own_scale": "none"}
    batch = scored(texts, ["a b"], scale=asked_for, **own)
    rewards = torch.tensor([[1.0, 6.0, 3.0, 2.0]])
    expected = group_advantages(rewards, statistics="outside", scale=asked_for or "none")
    torch.testing.assert_close(batch.advantages, expected)


def test_a_method_that_needs_no_spread_is_not_warned_of_a_dead_step(recwarn):
    scored(TEXTS[1:], ANSWERS[1:], needs_spread=False)
    assert not recwarn.list


def test_judges_score_validation_and_rewards_training(tmp_path):
    """keyword_score trains; the judge, which counts words, gives another figure in validation."""
    rewards = [RewardSpec("grao_lightning.embedded.keywords.keyword_score")]
    figures = {}
    for judges in (None, [RewardSpec(f"{HERE}.word_count")]):
        callbacks = stages(scoring={"rewards": rewards, "judges": judges})
        module = fit(
            tmp_path,
            callbacks=callbacks,
            data={"validation_prompts": 8},
            max_steps=1,
            limit_val_batches=1.0,
            val_check_interval=1,
        )
        figures[judges is None] = (module.step_values["reward"], module.estimates)
    (trained, own), (trained_again, judged) = figures[True], figures[False]
    assert trained == trained_again < 1
    assert own["reference_answer_reward"].value < 1
    assert judged["reference_answer_reward"].value > 3
    assert judged["base_reward"].value > 2


def test_only_a_step_without_any_signal_is_warned_of(recwarn):
    scored(TEXTS, ANSWERS)  # one group of two is dead
    assert not recwarn.list
    with pytest.warns(UserWarning, match="no group carries a signal"):
        scored(TEXTS[1:], ANSWERS[1:])
