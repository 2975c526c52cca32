"""Ratios with their interval, and the share of different texts."""

import math

import pytest
import torch

from grao_lightning.metrics.answers import DistinctShare, RatioWithInterval, ratio_interval
from grao_lightning.metrics.outcomes import mean_interval


def test_a_ratio_weighs_every_token_the_same():
    assert ratio_interval(torch.tensor([2.0, 9.0]), torch.tensor([1.0, 9.0])).value == 11 / 10


def test_with_equal_denominators_the_ratio_is_a_mean_with_its_interval():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0]).double()
    found = ratio_interval(values, torch.full((4,), 2.0))
    assert found == pytest.approx(mean_interval(2.0, (values / 2).var().item(), 4))


def test_the_interval_of_a_ratio_holds_the_truth_in_19_of_20_samples():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(1000):
        tokens = torch.randint(1, 20, (60,), generator=generator).double()
        rates = 1.5 + torch.rand(60, generator=generator, dtype=torch.double)
        _, low, high = ratio_interval(rates * tokens, tokens)
        held += low <= 2.0 <= high
    assert 0.93 < held / 1000 < 0.97


def test_neither_batches_nor_their_order_change_a_ratio():
    numerators, denominators = torch.rand(7).double(), torch.arange(1, 8)
    whole, parts = RatioWithInterval(), RatioWithInterval()
    whole.update(numerators, denominators)
    for part in ([6, 2], [0, 1, 3], [5, 4]):
        parts.update(numerators[part], denominators[part])
    assert parts.compute() == whole.compute()


def test_bfloat16_modules_do_not_round_a_ratio():
    metric = RatioWithInterval()
    metric.update(torch.tensor([1 / 3, 1.0]), torch.tensor([1001, 1000]))
    metric.to(torch.bfloat16)
    assert metric.compute().value == pytest.approx((1 / 3 + 1) / 2001, rel=1e-7)


@pytest.mark.parametrize(
    ("texts", "share"),
    [(["sorry"] * 4, 0.25), ([*"abcd"], 1.0), (["a ", "a"], 1.0), (["é", "é", "e", "e"], 0.5)],
)
def test_one_answer_to_all_is_one_over_their_number(texts, share):
    metric = DistinctShare()
    metric.update(texts[:1])
    metric.update(texts[1:])
    assert metric.compute().value == share
    metric.reset()
    assert math.isnan(metric.compute().value)


def test_a_text_that_two_ranks_have_is_counted_once():
    left, right, none = DistinctShare(), DistinctShare(), DistinctShare()
    left.update(["sorry", "apple"])
    right.update(["sorry"])
    for other in (right, none):
        left.merge_state(other)
    assert left.compute().value == 2 / 3
