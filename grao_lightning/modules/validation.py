"""What validation measures, for the policy and for the untrained base beside it."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from grao_lightning.batch import Completions, PromptBatch
from grao_lightning.metrics.answers import DistinctShare
from grao_lightning.metrics.outcomes import (
    Estimate,
    GainKind,
    MeanWithInterval,
    NormalizedAlignmentGain,
    RelativeAdversarialScore,
    ShareWithInterval,
    TiesAs,
)

_OF_REFERENCE_ANSWERS = (
    *("ras", "base_ras", "reference_answer_reward", "reference_answer_length"),
    "reference_answer_distinct",
)


class MetricSet(nn.Module):
    """Metrics by name, over the prompts of all ranks.

    Args:
        metrics: Each of them gives an `Estimate`.
        without_interval: Those whose bounds mean nothing.
    """

    def __init__(self, metrics: dict[str, Metric], without_interval: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._metrics = nn.ModuleDict(metrics)
        self.without_interval = without_interval

    @property
    def names(self) -> list[str]:
        """Return the names of all metrics."""
        return list(self._metrics)

    def add(self, name: str, *values: Any) -> None:
        """Hand values to a metric."""
        metric = self._metric(name)
        at_home = (part.to(metric.device) if isinstance(part, Tensor) else part for part in values)
        metric.update(*at_home)

    def compute(self) -> dict[str, Estimate]:
        """Return every metric; NaN for one that saw no prompt."""
        return {name: self._metric(name).compute() for name in self._metrics}

    def reset(self) -> None:
        """Forget everything."""
        for name in self._metrics:
            self._metric(name).reset()

    def _metric(self, name: str) -> Metric:
        return cast(Metric, self._metrics[name])


class ValidationMetrics(MetricSet):
    """RAS, NAG, and reward, length, cut-off share and diversity of the completions.

    Args:
        ties_as: What a tie counts as in RAS.
        gain: Which NAG.
        has_base: Whether there is an untrained base to compare with.
    """

    def __init__(
        self, ties_as: TiesAs = "loss", gain: GainKind = "net", *, has_base: bool = True
    ) -> None:
        metrics: dict[str, Metric] = {
            "ras": RelativeAdversarialScore(ties_as),
            "reward": MeanWithInterval(),
            "length": MeanWithInterval(),
            "cut_off": ShareWithInterval(),
            "distinct": DistinctShare(),
            "reference_answer_reward": MeanWithInterval(),
            "reference_answer_length": MeanWithInterval(),
            "reference_answer_distinct": DistinctShare(),
        }
        if has_base:
            metrics |= {
                "nag": NormalizedAlignmentGain(gain),
                "base_ras": RelativeAdversarialScore(ties_as),
                "base_reward": MeanWithInterval(),
                "base_length": MeanWithInterval(),
                "base_cut_off": ShareWithInterval(),
                "base_distinct": DistinctShare(),
            }
        bare = ("distinct", "reference_answer_distinct", "base_distinct")
        super().__init__(metrics, without_interval=bare)

    def update(self, batch: PromptBatch) -> None:
        """Take in a sampled and scored validation batch."""
        assert batch.rewards is not None and batch.outcomes is not None, "GroupScoring fills them"
        assert batch.completions is not None, "GroupSampling fills it"
        self.add("reward", batch.rewards[:, 0])
        self._add_texts("", batch.completions)
        if batch.has_reference_answers:
            self.add("ras", batch.outcomes)
            self.add("reference_answer_reward", batch.rewards[:, 1])
            answer_lengths = [len(ids) for ids in batch.reference_answer_ids]
            self.add("reference_answer_length", torch.tensor(answer_lengths))
            self.add("reference_answer_distinct", batch.reference_answers)
        if batch.base_completions is not None:
            if batch.has_reference_answers:
                self.add("base_ras", batch.base_outcomes)
            self.add("base_reward", batch.base_rewards)
            self._add_texts("base_", batch.base_completions)
            self.add("nag", batch.gain_outcomes)

    def leave_out_reference_answers(self) -> None:
        """Measure nothing that needs reference answers, for data that has none."""
        for name in _OF_REFERENCE_ANSWERS:
            if name in self._metrics:
                del self._metrics[name]

    def _add_texts(self, prefix: str, completions: Completions) -> None:
        self.add(f"{prefix}length", completions.lengths)
        self.add(f"{prefix}cut_off", completions.truncated_mask)
        self.add(f"{prefix}distinct", completions.texts)
