"""Statistics of a step over ranks of different sizes."""

import math

import torch

from grao_lightning.metrics.step_statistics import StepStatistics


def over_ranks(*ranks: StepStatistics) -> dict[str, float]:
    """Reduce the first rank's statistics as if all of them met in each collective."""
    collected: list[list[torch.Tensor]] = []

    def record(values, operation):
        collected[-1].append(values)
        return values

    for rank in ranks:
        collected.append([])
        rank.reduced(record)
    calls = iter(zip(*collected, strict=True))

    def reduce(values, operation):
        together = torch.stack(next(calls))
        return together.sum(0) if operation == "sum" else together.amax(0)

    return ranks[0].reduced(reduce)


def test_a_mean_over_ranks_is_the_mean_over_all_values():
    left, right = StepStatistics(), StepStatistics()
    left.mean("length", torch.tensor([1.0, 2.0, 3.0, math.nan]))
    right.mean("length", torch.tensor([10.0]))
    assert over_ranks(left, right)["length"] == 4.0


def test_a_share_over_ranks_is_that_of_the_sums_also_where_a_rank_has_none():
    left, right = StepStatistics(), StepStatistics()
    left.share("share", torch.tensor([3.0]), torch.tensor([3.0, 1.0]))
    right.share("share", torch.tensor([0.0]), torch.tensor([0.0, 0.0]))
    assert over_ranks(left, right)["share"] == 0.75


def test_extremes_are_those_of_all_ranks():
    left, right = StepStatistics(), StepStatistics()
    left.extremes("{}_length", torch.tensor([4.0, 6.0]))
    right.extremes("{}_length", torch.tensor([2.0, 5.0]))
    for statistics in (left, right):
        statistics.mean("any", 1.0)
    reduced = over_ranks(left, right)
    assert (reduced["min_length"], reduced["max_length"]) == (2.0, 6.0)


def test_a_mean_over_nothing_is_no_number():
    statistics = StepStatistics()
    statistics.mean("reward", torch.tensor([math.nan]))
    assert math.isnan(over_ranks(statistics)["reward"])
