import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

from grao_lightning.metrics.outcomes import (
    Estimate,
    MeanWithInterval,
    NormalizedAlignmentGain,
    RelativeAdversarialScore,
    ShareWithInterval,
    compare,
    mean_interval,
    normalized_alignment_gain,
    relative_adversarial_score,
    wilson_interval,
)

NAN = math.nan
Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def assert_all_nan(estimate: Estimate) -> None:
    assert [math.isnan(number) for number in estimate] == [True, True, True]


# compare


def test_only_differences_beyond_the_tolerance_decide():
    scores = torch.tensor([1.0, 1.5, 2.0, 0.5, 0.0], dtype=torch.float64)
    outcomes = compare(scores, torch.ones(5, dtype=torch.float64), tie_tolerance=0.5)
    assert outcomes.tolist() == [0, 0, 1, 0, -1]


def test_a_missing_score_on_either_side_makes_the_outcome_missing():
    outcomes = compare(torch.tensor([NAN, 1.0, NAN, 1.0]), torch.tensor([1.0, NAN, NAN, 0.0]))
    assert outcomes.isnan().tolist() == [True, True, True, False]


def test_swapping_the_sides_negates_the_outcomes():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 4, (2, 50), generator=generator)
    outcomes = compare(a, b, tie_tolerance=1)
    assert set(outcomes.tolist()) == {-1, 0, 1}
    assert torch.equal(compare(b, a, tie_tolerance=1), -outcomes)


def test_half_precision_scores_are_compared_without_rounding_the_difference():
    # 2.015625 - 0.0107421875 = 2.0049 is beyond 2.001; in bfloat16 both would round to 2.
    scores = torch.tensor([2.015625], dtype=torch.bfloat16)
    baseline_scores = torch.tensor([0.0107421875], dtype=torch.bfloat16)
    assert compare(scores, baseline_scores, tie_tolerance=2.001).item() == 1


@pytest.mark.parametrize("tolerance", [-0.1, NAN])
def test_a_tolerance_below_zero_is_refused(tolerance: float):
    with pytest.raises(ValueError, match=r"tie_tolerance must be >= 0.*got"):
        compare(torch.zeros(1), torch.zeros(1), tolerance)


def test_scores_of_different_shapes_are_refused_rather_than_broadcast():
    with pytest.raises(ValueError, match=r"same shape.*\(3,\) and \(1,\)"):
        compare(torch.zeros(3), torch.zeros(1))


# Wilson's interval


def test_wilson_interval_matches_the_hand_calculation():
    # 5 of 10, z = 1.96: centre 0.5; half width z sqrt(0.25/10 + z^2/400) / (1 + z^2/10)
    # = 1.96 * sqrt(0.025 + 0.0096036) / 1.38415 = 1.96 * 0.1860204 / 1.38415 = 0.26341.
    estimate = wilson_interval(5, 10)
    assert estimate == pytest.approx((0.5, 0.5 - 0.26341, 0.5 + 0.26341), abs=1e-5)


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (1, 1), (0, 30), (7, 30), (30, 30), (999, 1000)]
)
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_interval_matches_scipy(successes: int, n: int, confidence: float):
    oracle = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    estimate = wilson_interval(successes, n, confidence)
    assert estimate == pytest.approx((successes / n, oracle.low, oracle.high), abs=1e-12)


@pytest.mark.parametrize("n", [1, 3, 7, 49, 1000])
def test_wilson_interval_holds_its_share_and_stays_within_zero_and_one(n: int):
    for successes in range(n + 1):
        share, low, high = wilson_interval(successes, n)
        assert 0 <= low <= share <= high <= 1 and low < high


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_successes_outside_their_range_are_refused(successes: int, n: int):
    with pytest.raises(ValueError, match=f"got {successes} of {n}"):
        wilson_interval(successes, n)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_a_confidence_that_is_no_share_is_refused(confidence: float):
    with pytest.raises(ValueError, match=f"confidence .* got {confidence}"):
        wilson_interval(1, 2, confidence)


# RAS


@pytest.mark.parametrize(("ties_as", "expected"), [("win", 0.7), ("half", 0.6), ("loss", 0.5)])
def test_ties_count_as_stated(ties_as, expected: float):
    estimate = relative_adversarial_score(5, 2, 3, ties_as)
    assert estimate == pytest.approx(wilson_interval(expected * 10, 10))
    assert estimate.value == pytest.approx(expected)


def test_ties_count_as_losses_unless_stated():
    assert relative_adversarial_score(0, 4, 0).value == 0.0


def test_halved_ties_take_the_spread_of_a_coin_although_ties_have_none():
    assert relative_adversarial_score(0, 8, 0, "half") == wilson_interval(4, 8)


# NAG


def test_net_gain_matches_the_hand_calculation():
    # 6 wins, 1 tie, 3 losses. p = 7/12, q = 4/12, p - q = 1/4;
    # half width 1.96 sqrt((11/12 - 1/16) / 12) = 1.96 sqrt(0.0711806) = 0.52291.
    estimate = normalized_alignment_gain(6, 1, 3)
    assert estimate == pytest.approx((0.3, 0.25 - 0.52291, 0.25 + 0.52291), abs=1e-5)


def test_net_gain_is_negative_where_the_base_wins_more_often():
    assert normalized_alignment_gain(1, 6, 3).value == pytest.approx(-0.2)


def test_swapping_the_policies_negates_the_net_gain_and_its_interval():
    value, low, high = normalized_alignment_gain(6, 1, 3)
    assert normalized_alignment_gain(3, 1, 6) == pytest.approx((-value, -high, -low))


@pytest.mark.parametrize("n", [1, 2, 10, 500])
def test_winning_every_prompt_leaves_an_interval_with_width(n: int):
    value, low, high = normalized_alignment_gain(n, 0, 0)
    assert (value, high) == (1.0, 1.0)
    assert -1 <= low < 1
    assert normalized_alignment_gain(0, 0, n) == pytest.approx((-1.0, -1.0, -low))


def test_net_gain_approaches_the_plain_wald_interval_with_many_prompts():
    # d +- z sqrt((p + q - d^2) / n), the interval without adjustment.
    wins, ties, losses = 50_000, 20_000, 30_000
    half_width = Z * math.sqrt((0.8 - 0.2**2) / 100_000)
    expected = (0.2, 0.2 - half_width, 0.2 + half_width)
    assert normalized_alignment_gain(wins, ties, losses) == pytest.approx(expected, abs=2e-5)


def test_share_of_wins_leaves_ties_and_losses_alike():
    assert normalized_alignment_gain(3, 2, 1, "wins") == wilson_interval(3, 6)
    assert normalized_alignment_gain(3, 0, 3, "wins") == wilson_interval(3, 6)


# Means


def test_mean_interval_matches_scipy():
    for n in (2, 3, 5, 11, 12, 30, 200):
        values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        mean, variance = values.mean().item(), values.var().item()
        low, high = stats.t.interval(0.95, n - 1, mean, math.sqrt(variance / n))
        # The quantile is good to 3e-6, see the next test.
        assert mean_interval(mean, variance, n) == pytest.approx((mean, low, high), rel=1e-5)


def test_quantiles_of_t_are_exact_to_their_last_digit_then_to_the_fifth_order():
    for degrees_of_freedom in range(1, 120):
        n = degrees_of_freedom + 1
        quantile = mean_interval(0.0, n, n).high  # variance / n = 1
        # Tabulated to six decimals up to 10, then a series whose first missing term is of order 5.
        tolerance = 5.1e-7 if degrees_of_freedom <= 10 else 0.8 / degrees_of_freedom**5
        assert abs(quantile - stats.t.ppf(0.975, degrees_of_freedom)) < tolerance


def test_one_observation_has_a_mean_and_no_interval():
    value, low, high = mean_interval(2.0, 0.0, 1)
    assert value == 2.0 and math.isnan(low) and math.isnan(high)


# Coverage


def test_intervals_cover_the_truth_about_95_times_in_100():
    # 4,000 runs of 60 prompts: the standard error of a coverage of 0.95 is 0.0034. Exact coverage
    # for these counts wavers around the nominal one; 0.94 to 0.965 admits that, and no wrong z.
    runs, n = 4000, 60
    win, tie, loss = 0.5, 0.2, 0.3
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(
        torch.tensor([win, tie, loss]), runs * n, replacement=True, generator=generator
    ).view(runs, n)
    counts = [tuple(int((run == k).sum()) for k in range(3)) for run in drawn]
    normal = torch.randn(runs, 8, generator=generator, dtype=torch.float64)

    def coverage(estimates, truth: float) -> float:
        return sum(e.low <= truth <= e.high for e in estimates) / runs

    ras = coverage((relative_adversarial_score(*c) for c in counts), win)
    halved = coverage((relative_adversarial_score(*c, "half") for c in counts), win + tie / 2)
    nag = coverage((normalized_alignment_gain(*c) for c in counts), win - loss)
    mean = coverage((mean_interval(float(x.mean()), float(x.var()), 8) for x in normal), 0.0)
    for share in (ras, nag, mean):
        assert 0.94 < share < 0.965
    assert halved > 0.96  # conservative, as documented


# Nothing measured, wrong choices


@pytest.mark.filterwarnings("error")
def test_without_prompts_everything_is_nan_and_silent():
    assert_all_nan(wilson_interval(0, 0))
    assert_all_nan(relative_adversarial_score(0, 0, 0))
    assert_all_nan(normalized_alignment_gain(0, 0, 0, "net"))
    assert_all_nan(normalized_alignment_gain(0, 0, 0, "wins"))
    assert_all_nan(mean_interval(0.0, 0.0, 0))
    for metric in (RelativeAdversarialScore(), NormalizedAlignmentGain(), MeanWithInterval()):
        metric.update(torch.tensor([NAN, NAN]))
        assert_all_nan(metric.compute())


def test_unknown_choices_are_refused_with_the_valid_ones():
    for make in (RelativeAdversarialScore, lambda t: relative_adversarial_score(1, 1, 1, t)):
        with pytest.raises(
            ValueError, match="ties_as must be one of 'win', 'half', 'loss'; got 'w'"
        ):
            make("w")
    for make in (NormalizedAlignmentGain, lambda k: normalized_alignment_gain(1, 1, 1, k)):
        with pytest.raises(ValueError, match="kind must be one of 'wins', 'net'; got 'share'"):
            make("share")


@pytest.mark.parametrize("function", [relative_adversarial_score, normalized_alignment_gain])
def test_negative_counts_are_refused(function):
    with pytest.raises(ValueError, match="ties=-1"):
        function(1, -1, 3)


# Metrics

OUTCOMES = torch.tensor([1.0, 1.0, 0.0, -1.0, NAN, 1.0, -1.0, 0.0, NAN, 1.0, 1.0])
# 5 wins, 2 ties, 2 losses, 2 missing.


@pytest.mark.parametrize("split", [1, 3, 11])
def test_the_split_into_batches_leaves_ras_and_nag_unchanged(split: int):
    ras, nag = RelativeAdversarialScore("half"), NormalizedAlignmentGain("net")
    for batch in OUTCOMES.split(split):
        ras.update(batch)
        nag.update(batch)
    assert ras.compute() == relative_adversarial_score(5, 2, 2, "half")
    assert nag.compute() == normalized_alignment_gain(5, 2, 2, "net")


def test_missing_outcomes_are_left_out_of_the_denominator():
    metric = NormalizedAlignmentGain("wins")
    metric.update(torch.tensor([1.0, NAN, NAN, -1.0]))
    assert metric.compute() == wilson_interval(1, 2)


def test_a_reset_metric_starts_from_nothing():
    for metric in (RelativeAdversarialScore(), NormalizedAlignmentGain(), MeanWithInterval()):
        metric.update(torch.ones(3))
        metric.reset()
        metric.update(torch.tensor([NAN]))
        assert_all_nan(metric.compute())


def test_share_counts_true_values():
    metric = ShareWithInterval()
    metric.update(torch.tensor([[True, False], [True, True]]))
    metric.update(torch.tensor([False]))
    assert metric.compute() == wilson_interval(3, 5)


def test_share_refuses_values_in_which_nan_would_count_as_true():
    with pytest.raises(ValueError, match=r"must be boolean, got torch\.float32"):
        ShareWithInterval().update(torch.tensor([NAN]))


@pytest.mark.parametrize("split", [1, 7, 100])
@pytest.mark.parametrize("offset", [0.0, 1e9])
def test_the_split_into_batches_and_an_offset_leave_the_spread_unchanged(split: int, offset: float):
    values = torch.arange(100, dtype=torch.float64).remainder(7)
    expected = mean_interval(values.mean().item() + offset, values.var().item(), 100)
    metric = MeanWithInterval()
    for batch in (values + offset).split(split):
        metric.update(torch.cat([batch, torch.tensor([NAN])]))
    assert metric.compute() == pytest.approx(expected, rel=1e-14, abs=1e-12)
    assert metric.compute().high - metric.compute().value == pytest.approx(
        expected.high - expected.value,
        abs=3e-7,  # float64 resolves 1.2e-7 at 1e9
    )


def test_casting_the_model_to_bfloat16_leaves_every_metric_unchanged():
    # Lightning's precision "bf16-true" calls module.to(bfloat16), which reaches metric states.
    module = torch.nn.Module()
    module.mean, module.ras = MeanWithInterval(), RelativeAdversarialScore()
    module.to(torch.bfloat16)
    for _ in range(2):
        module.mean.update(torch.arange(302.0))
        module.ras.update(torch.ones(301))
        module.to(torch.bfloat16)
    # 150.5 and 302 both need more than bfloat16's 8 bits.
    variance = torch.arange(302.0, dtype=torch.float64).repeat(2).var().item()
    assert module.mean.compute() == pytest.approx(mean_interval(150.5, variance, 604), rel=1e-12)
    assert module.ras.compute() == relative_adversarial_score(602, 0, 0)


RANK = """
import sys
import torch
import torch.distributed as dist
from grao_lightning.metrics.outcomes import *

rank, rendezvous = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + rendezvous, rank=rank, world_size=2)
nan = float("nan")
outcomes = torch.tensor([1.0, 1.0, 0.0, -1.0, nan, 1.0, -1.0, 0.0, nan, 1.0, 1.0])
# Rank 0 sees 2 outcomes, rank 1 the other 9; in the second round rank 1 sees none at all.
module = torch.nn.ModuleList(
    [RelativeAdversarialScore("half"), NormalizedAlignmentGain(), ShareWithInterval(),
     MeanWithInterval()]
).to(torch.bfloat16)
for shards in ((outcomes[:2], outcomes[2:]), (outcomes, None)):
    shard = shards[rank]
    for metric in module:
        metric.reset()
        if shard is not None:
            metric.update(shard > 0 if isinstance(metric, ShareWithInterval) else shard)
        print(*metric.compute())
dist.destroy_process_group()
"""


def test_uneven_shards_on_two_ranks_give_the_figures_of_one_process(tmp_path: Path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(tmp_path / "rendezvous")],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    alone = [RelativeAdversarialScore("half"), NormalizedAlignmentGain(), MeanWithInterval()]
    for metric in alone:
        metric.update(OUTCOMES)
    ras, nag, mean = (metric.compute() for metric in alone)
    for output in outputs:
        rows = [tuple(float(number) for number in line.split()) for line in output.splitlines()]
        assert len(rows) == 8
        for round_ in (rows[:4], rows[4:]):
            assert round_[:3] == [ras, nag, wilson_interval(5, 11)]
            # A sum of float64 in another order: the last bits may differ.
            assert round_[3] == pytest.approx(mean, rel=1e-14)
