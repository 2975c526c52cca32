"""Supervised fine-tuning on the reference answers: the first stage before GRAO."""

import torch
from typing_extensions import Unpack

from grao_lightning.batch import PromptBatch, TokenRow
from grao_lightning.modules.base import AlignmentModule, AlignmentSettings
from grao_lightning.objectives.sft import Aggregation, sft_coefficients


class SFTModule(AlignmentModule):
    """Maximises the log-probability of the reference answers.

    Sampling and scoring run in validation only, so that RAS and NAG are those of every method.

    Args:
        aggregation: "tokens" weighs every token the same, "answers" every answer.
        base_settings: The settings of `AlignmentModule`.
    """

    trains_on_groups = False

    def __init__(
        self, aggregation: Aggregation = "tokens", **base_settings: Unpack[AlignmentSettings]
    ) -> None:
        super().__init__(**base_settings)
        self.aggregation = aggregation

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
