"""Which number of a batch each validation metric takes."""

import pytest
import torch

from grao_lightning import GRAOModule
from grao_lightning.batch import Completions, PromptBatch


def validated() -> PromptBatch:
    """Four prompts: the policy wins, ties, loses, wins; the base ties, wins, loses, loses."""
    return PromptBatch(
        indices=[0, 1, 2, 3],
        prompt_ids=[[1]] * 4,
        prompts=["q"] * 4,
        reference_answer_ids=[[5] * 7, [5] * 7, [5] * 7, [5] * 11],
        reference_answers=[*"yyyz"],
        columns=[{}] * 4,
        completions=Completions([[5]] * 3 + [[5] * 5], [*"aabc"], [True, False, False, False], 1),
        base_completions=Completions([[5] * 3] * 4, ["b"] * 4, [True, True, True, False], 1),
        rewards=torch.tensor([[4.0, 1.0], [1.0, 1.0], [1.0, 2.0], [6.0, 4.0]]).double(),
        outcomes=torch.tensor([[1.0], [0.0], [-1.0], [1.0]]).double(),
        base_rewards=torch.tensor([1.0, 2.0, 0.5, 0.5]).double(),
        base_outcomes=torch.tensor([0.0, 1.0, -1.0, -1.0]).double(),
        gain_outcomes=torch.tensor([1.0, -1.0, 1.0, 1.0]).double(),
    )


EXPECTED = {
    "ras": 2 / 4,
    "reward": 3.0,
    "length": 2.0,
    "cut_off": 1 / 4,
    "distinct": 3 / 4,
    "reference_answer_distinct": 2 / 4,
    "reference_answer_reward": 2.0,
    "reference_answer_length": 8.0,
    "nag": (3 - 1) / 4,
    "base_ras": 1 / 4,
    "base_reward": 1.0,
    "base_length": 3.0,
    "base_cut_off": 3 / 4,
    "base_distinct": 1 / 4,
}


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({}, {}),
        ({"ties_as": "half"}, {"ras": 2.5 / 4, "base_ras": 1.5 / 4}),
        ({"ties_as": "win"}, {"ras": 3 / 4, "base_ras": 2 / 4}),
        ({"gain": "wins"}, {"nag": 3 / 4}),
    ],
)
def test_every_metric_takes_its_own_part_of_the_batch(options, other):
    metrics = GRAOModule(**options).validation_metrics
    metrics.update(validated())
    values = {name: estimate.value for name, estimate in metrics.compute().items()}
    assert values == pytest.approx({**EXPECTED, **other})


def test_a_validation_starts_from_nothing():
    metrics = GRAOModule().validation_metrics
    metrics.update(validated())
    metrics.reset()
    metrics.update(validated())
    once = GRAOModule().validation_metrics
    once.update(validated())
    # As text: what has no interval has NaN for it, which equals nothing.
    assert str(metrics.compute()) == str(once.compute())
