"""GRAO: imitate while worse than the reference answer, explore when better."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from grao_lightning.batch import PromptBatch, TokenRow
from grao_lightning.language_model.transfer import sent
from grao_lightning.modules.base import AlignmentModule, AlignmentSettings, RowLogprobs
from grao_lightning.modules.step import Charts
from grao_lightning.objectives.grao import (
    GRAOWeights,
    grao_coefficients,
    grao_terms_per_prompt,
)

_TERMS = ("exploration", "imitation", "regularizer")


class GRAOModule(AlignmentModule):
    """Group Relative Alignment Optimization.

    Source: arXiv 2508.07750, equation 3. Its open readings are options: the sign of the reference
    answer here (see `GRAOWeights`), who enters a group's statistics in `GroupScoring`.

    Args:
        exploration_weight: Weight of ``1/G sum_i A_oi l(o_i)``.
        imitation_weight: beta, weight of ``A_y l(y)``.
        regularizer_weight: lambda, weight of ``1/G sum_i A_oi (l(o_i) - l(y))``.
        gate: Never push the reference answer down. False is equation 3 to the letter, which runs
            away once the policy beats the reference answers.
        mask_truncated_completions: Take no gradient from completions cut off by the length limit;
            they still count in the group's statistics.
        base_settings: The settings of `AlignmentModule`.
    """

    def __init__(
        self,
        exploration_weight: float = 1.0,
        imitation_weight: float = 0.5,
        regularizer_weight: float = 0.6,
        gate: bool = True,
        mask_truncated_completions: bool = False,
        **base_settings: Unpack[AlignmentSettings],
    ) -> None:
        super().__init__(**base_settings)
        self.weights = GRAOWeights(exploration_weight, imitation_weight, regularizer_weight, gate)
        self.mask_truncated_completions = mask_truncated_completions

    heeds_outward_mask = True
    charts: ClassVar[Charts] = {
        "objective terms": [f"train/objective/{name}$" for name in _TERMS],
        "shares of the terms": [f"train/objective/{name}_share" for name in _TERMS],
        "log-probabilities": [
            "train/completions/mean_logprob",
            "train/reference_answer/mean_logprob",
        ],
    }

    def rows(self, batch: PromptBatch) -> list[TokenRow]:
        """Return the completions, then the reference answers."""
        return batch.group_rows()

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Take one step of equation 3 on a sampled and scored batch."""
        assert batch.advantages is not None, "GroupScoring has not filled batch.advantages"
        coefficients = grao_coefficients(batch.advantages, self.weights)  # [B, G+1] dJ/dl
        if self.mask_truncated_completions:
            coefficients[:, :-1][batch.truncated_mask()] = 0.0
        coefficients = coefficients / self.global_sum(len(batch))  # J is a mean over prompts
        computed = self.ascend(batch, self.rows(batch), _by_row(coefficients))
        self._note_terms(batch, coefficients, computed)
        self.finish_step(batch)

    def _note_terms(self, batch: PromptBatch, coefficients: Tensor, computed: RowLogprobs) -> None:
        assert batch.advantages is not None and batch.completions is not None
        num_completions = len(batch.completions.ids)
        means = computed.means
        (advantages,) = sent(means.device, batch.advantages)
        mean_logprobs = torch.cat(
            [means[:num_completions].view(len(batch), -1), means[num_completions:, None]], dim=1
        )
        terms = grao_terms_per_prompt(mean_logprobs, advantages, self.weights)
        note = batch.statistics.mean
        for name in ("exploration", "imitation", "regularizer", "total"):
            note(f"objective/{name}", getattr(terms, name))
        term_sizes = terms.sizes()
        for name, size in term_sizes.items():
            whole = torch.stack(list(term_sizes.values()))
            batch.statistics.share(f"objective/{name}_share", size, whole)
        note("loss", -terms.total)
        note("entropy", torch.cat(computed.entropies[:num_completions]))
        sizes = coefficients.abs()
        batch.statistics.share("reference_answer/grad_share", sizes[:, -1], sizes)
        note("reference_answer/advantage", batch.advantages[:, -1])
        note("reference_answer/mean_logprob", mean_logprobs[:, -1])
        note("completions/mean_logprob", mean_logprobs[:, :-1])


def _by_row(values: Tensor) -> Tensor:
    """Return group values [B, G+1] in the order of `PromptBatch.group_rows`."""
    return torch.cat([values[:, :-1].flatten(), values[:, -1]])
