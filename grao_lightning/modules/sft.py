"""Supervised fine-tuning on the reference answers: the first stage before GRAO."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from grao_lightning.batch import PromptBatch, TokenRow
from grao_lightning.language_model.logprobs import frozen_logprobs
from grao_lightning.metrics.answers import RatioWithInterval
from grao_lightning.modules.base import AlignmentModule, AlignmentSettings
from grao_lightning.modules.step import Charts
from grao_lightning.modules.validation import MetricSet
from grao_lightning.objectives.sft import Aggregation, sft_coefficients


class SFTModule(AlignmentModule):
    """Maximises the log-probability of the reference answers.

    Validation gives the loss on held-out reference answers. With ``scoring.rewards`` or ``judges``
    it samples and scores too, so that RAS and NAG are those of every method.

    Args:
        aggregation: "tokens" weighs every token the same, "answers" every answer.
        base_settings: The settings of `AlignmentModule`.
    """

    trains_on_groups = False
    charts: ClassVar[Charts] = {
        "loss": ["train/loss$", "val/loss$"],
        "entropy": ["train/entropy"],
        "gradient norm": ["train/grad_norm"],
    }

    def __init__(
        self, aggregation: Aggregation = "tokens", **base_settings: Unpack[AlignmentSettings]
    ) -> None:
        super().__init__(**base_settings)
        self.aggregation = aggregation
        names = ["loss"] if self.reference_model_source is None else ["loss", "base_loss"]
        self.answer_metrics = MetricSet({name: RatioWithInterval() for name in names})
        self._base_nats: dict[tuple[int, ...], Tensor] = {}

    def rows(self, batch: PromptBatch) -> list[TokenRow]:
        """Return the reference answers."""
        return batch.reference_answer_rows()

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Take one step on the reference answers of a batch."""
        rows = self.rows(batch)
        num_tokens = torch.tensor([len(row.answer_ids) for row in rows])
        weights = sft_coefficients(num_tokens, self.aggregation)  # [B]
        weights = weights / self.global_sum(weights.sum().item())
        computed = self.ascend(batch, rows, weights)
        batch.statistics.mean("loss", -torch.cat(computed.logprobs))
        batch.statistics.mean("entropy", torch.cat(computed.entropies))
        batch.statistics.mean("reference_answer/mean_logprob", computed.means)
        self.finish_step(batch)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Take in what the reference answers cost the policy and, read once, the untrained base."""
        super().validation_step(batch, batch_idx)
        assert self.answer_metrics is not None
        lengths = torch.tensor([len(ids) for ids in batch.reference_answer_ids])
        self.answer_metrics.add("loss", self._nats(self.policy, batch), lengths)
        if self.reference_model is not None:
            key = tuple(batch.indices)
            if key not in self._base_nats:
                self._base_nats[key] = self._nats(self.reference_model, batch)
            self.answer_metrics.add("base_loss", self._base_nats[key], lengths)

    def _nats(self, model: Any, batch: PromptBatch) -> Tensor:
        """Return what each reference answer costs a model, [B] nats."""
        logprobs = frozen_logprobs(
            model,
            self.rows(batch),
            self.micro_batch_tokens,
            temperature=self.training_temperature,
        )
        return torch.stack([-row.double().sum().cpu() for row in logprobs])
