"""Figures of held-out pairs: by hand, against scipy, and over ranks."""

import math

import pytest
import torch

from grao_lightning.metrics.outcomes import wilson_interval
from grao_lightning.metrics.pairs import (
    PairMetrics,
    calibration_error,
    pair_accuracy,
    rank_correlation,
    reliability,
)


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_ties_are_half_right():
    assert pair_accuracy(torch.tensor([1.0, 0.0, -2.0, 0.0])) == wilson_interval(2.0, 4)


def test_the_reliability_curve_and_its_error_by_hand():
    """Two pairs at 0.8, one told wrong; three at 0.9, all right; one at 0.55 told wrong."""
    margins = torch.tensor([logit(0.8), -logit(0.8), *[logit(0.9)] * 3, -logit(0.55)]).double()
    low, middle, high = reliability(margins, bins=5)
    assert [part.number for part in (low, middle, high)] == [1, 2, 3]
    assert [part.accuracy.value for part in (low, middle, high)] == [0.0, 0.5, 1.0]
    assert middle.confidence == pytest.approx(0.8) and high.accuracy == wilson_interval(3, 3)
    expected = (1 * 0.55 + 2 * 0.3 + 3 * 0.1) / 6
    assert calibration_error(margins, bins=5) == pytest.approx(expected)


def test_a_model_that_is_right_as_often_as_it_is_sure_is_calibrated():
    torch.manual_seed(0)
    probability = torch.rand(200_000).double() * 0.98 + 0.01
    right = torch.rand(200_000).double() < probability
    lead = torch.logit(probability)
    margins = torch.where(right, lead, -lead)  # the predicted answer is the chosen one, or not
    assert calibration_error(margins) < 0.005
    assert calibration_error(3 * margins) > 0.08


def test_a_certain_pair_stands_in_the_last_bin():
    (only,) = reliability(torch.tensor([80.0]))
    assert only.confidence == 1.0 and only.number == 1


def test_rank_correlation_is_scipys_also_with_ties():
    from scipy.stats import spearmanr

    torch.manual_seed(0)
    left, right = torch.randn(60), torch.randint(0, 5, (60,))
    left = left + 0.3 * right
    found = rank_correlation(left, right)
    assert found.value == pytest.approx(spearmanr(left.numpy(), right.numpy()).statistic, abs=1e-9)
    assert found.low < found.value < found.high
    half = 1.959964 * math.sqrt((1 + found.value**2 / 2) / 57)
    assert math.atanh(found.high) - math.atanh(found.low) == pytest.approx(2 * half)


def test_a_constant_has_no_rank_correlation():
    assert math.isnan(rank_correlation(torch.ones(5), torch.arange(5)).value)


def test_order_and_batches_change_nothing_not_even_a_rounding():
    torch.manual_seed(0)
    margins, lengths = torch.randn(41), torch.randint(-9, 9, (41,))
    whole, parts = PairMetrics(), PairMetrics()
    whole.update(margins, lengths)
    order = torch.randperm(41)
    for part in (order[:3], order[3:3], order[3:]):
        parts.update(margins[part], lengths[part])
    assert whole.compute() == parts.compute()
    assert whole.reliability == parts.reliability
    assert whole.compute()["loss"].value == pytest.approx(
        -torch.nn.functional.logsigmoid(margins.double()).mean().item()
    )


def test_a_reset_forgets_and_without_pairs_all_is_nan():
    metric = PairMetrics()
    metric.update(torch.ones(3), torch.ones(3))
    metric.reset()
    assert all(math.isnan(estimate.value) for estimate in metric.compute().values())
    assert metric.reliability == [] and set(metric.compute()) == set(metric.names)


def test_a_rank_without_pairs_takes_part_with_one_empty_tensor_like_the_others():
    """Ranks must meet in as many collectives, with tensors of one kind."""
    gathered = []

    def gather(value, group=None):
        gathered.append(value)
        return [value, torch.empty(0, dtype=torch.int64)]

    options = {"dist_sync_fn": gather, "distributed_available_fn": lambda: True}
    with_pairs, without = PairMetrics(**options), PairMetrics(**options)
    for part in (torch.tensor([1.0, -2.0]), torch.tensor([3.0])):
        with_pairs.update(part, part)
    alone = PairMetrics()
    alone.update(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, -2.0, 3.0]))
    assert with_pairs.compute() == alone.compute()
    without.compute()
    assert [(part.dtype, part.ndim, len(part)) for part in gathered] == [
        (torch.int64, 1, 6),
        (torch.int64, 1, 0),
    ]
