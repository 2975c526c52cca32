"""What validation measures, for the policy and for the untrained base beside it."""

from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from grao_lightning.batch import Completions, PromptBatch
from grao_lightning.metrics.outcomes import (
    Estimate,
    GainKind,
    MeanWithInterval,
    NormalizedAlignmentGain,
    RelativeAdversarialScore,
    ShareWithInterval,
    TiesAs,
)

_OF_REFERENCE_ANSWERS = ("ras", "base_ras", "reference_answer_reward", "reference_answer_length")


class ValidationMetrics(nn.Module):
    """RAS, NAG, reward, length and cut-off share over the prompts of all ranks.

    Args:
        ties_as: What a tie counts as in RAS.
        gain: Which NAG.
        has_base: Whether there is an untrained base to compare with.
    """

    def __init__(
        self, ties_as: TiesAs = "loss", gain: GainKind = "net", *, has_base: bool = True
    ) -> None:
        super().__init__()
        metrics: dict[str, Metric] = {
            "ras": RelativeAdversarialScore(ties_as),
            "reward": MeanWithInterval(),
            "length": MeanWithInterval(),
            "clipped_ratio": ShareWithInterval(),
            "reference_answer_reward": MeanWithInterval(),
            "reference_answer_length": MeanWithInterval(),
        }
        if has_base:
            metrics |= {
                "nag": NormalizedAlignmentGain(gain),
                "base_ras": RelativeAdversarialScore(ties_as),
                "base_reward": MeanWithInterval(),
                "base_length": MeanWithInterval(),
                "base_clipped_ratio": ShareWithInterval(),
            }
        self._metrics = nn.ModuleDict(metrics)

    def update(self, batch: PromptBatch) -> None:
        """Take in a sampled and scored validation batch."""
        assert batch.rewards is not None and batch.outcomes is not None
        assert batch.completions is not None
        self._add("reward", batch.rewards[:, 0])
        self._add_sizes("", batch.completions)
        if batch.has_reference_answers:
            self._add("ras", batch.outcomes)
            self._add("reference_answer_reward", batch.rewards[:, 1])
            answer_lengths = [len(ids) for ids in batch.reference_answer_ids]
            self._add("reference_answer_length", torch.tensor(answer_lengths))
        if batch.base_completions is not None:
            if batch.has_reference_answers:
                self._add("base_ras", batch.base_outcomes)
            self._add("base_reward", batch.base_rewards)
            self._add_sizes("base_", batch.base_completions)
            self._add("nag", batch.gain_outcomes)

    def leave_out_reference_answers(self) -> None:
        """Measure nothing that needs reference answers, for data that has none."""
        for name in _OF_REFERENCE_ANSWERS:
            if name in self._metrics:
                del self._metrics[name]

    def compute(self) -> dict[str, Estimate]:
        """Return every metric; NaN for one that saw no prompt."""
        return {name: self._metric(name).compute() for name in self._metrics}

    @property
    def names(self) -> list[str]:
        """Return the names of all metrics."""
        return list(self._metrics)

    def reset(self) -> None:
        """Forget everything."""
        for name in self._metrics:
            self._metric(name).reset()

    def _add(self, name: str, values: Tensor | None) -> None:
        assert values is not None, f"GroupScoring has not filled what {name} needs"
        metric = self._metric(name)
        metric.update(values.to(metric.device))

    def _add_sizes(self, prefix: str, completions: Completions) -> None:
        self._add(f"{prefix}length", completions.lengths)
        self._add(f"{prefix}clipped_ratio", completions.truncated_mask)

    def _metric(self, name: str) -> Metric:
        return cast(Metric, self._metrics[name])
