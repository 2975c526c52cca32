"""GRPO: completions compared within their group, the reference answer left out."""

from typing import ClassVar, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from grao_lightning.batch import PromptBatch
from grao_lightning.faults import Faults
from grao_lightning.language_model.transfer import sent
from grao_lightning.modules.rollout import CLIPPED, RolloutModule, RolloutSettings, Tokens
from grao_lightning.modules.step import Charts
from grao_lightning.objectives.grpo import (
    Aggregation,
    GRPOSettings,
    grpo_token_loss,
    token_weights,
    weight_total,
)
from grao_lightning.objectives.ratio import RatioLevel, policy_ratio


class GRPOModule(RolloutModule):
    """Group Relative Policy Optimization.

    Source: arXiv 2402.03300, equation 3. Its descendants are settings: DAPO (arXiv 2503.14476) is
    ``aggregation: tokens`` with ``eps_high: 0.28`` and no KL, Dr. GRPO (arXiv 2503.20783)
    ``aggregation: max_tokens`` with ``scoring.scale: none``, GSPO (arXiv 2507.18071) ``ratio:
    sequence``.

    Args:
        aggregation: How token losses become one: "completions", "tokens" or "max_tokens" (divided
            by completions times ``sampling.max_new_tokens``).
        ratio: Of the "token" or of the whole "sequence".
        mask_truncated_completions: Take no gradient from completions cut off by the length limit;
            they still count in the group's statistics.
        rollout_settings: The settings of `RolloutModule` and `AlignmentModule`.
    """

    group_scale = "sample_std"
    charts: ClassVar[Charts] = {"loss": ["train/loss$"], **CLIPPED}

    def __init__(
        self,
        aggregation: Aggregation = "completions",
        ratio: RatioLevel = "token",
        mask_truncated_completions: bool = False,
        **rollout_settings: Unpack[RolloutSettings],
    ) -> None:
        super().__init__(**rollout_settings)
        self.aggregation = aggregation
        self.ratio = ratio
        self.mask_truncated_completions = mask_truncated_completions

    def faults(self) -> Faults:
        """Return what is wrong with the settings."""
        faults = super().faults()
        faults.one_of("model.aggregation", self.aggregation, get_args(Aggregation))
        faults.one_of("model.ratio", self.ratio, get_args(RatioLevel))
        return faults

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Take the updates of equation 3 on a sampled and scored batch."""
        assert batch.advantages is not None, "GroupScoring has not filled batch.advantages"
        assert batch.completions is not None, "GroupSampling has not filled batch.completions"
        advantages = batch.advantages[:, :-1].flatten()  # [N]
        lengths = batch.completions.lengths.double()
        if self.mask_truncated_completions:
            lengths[batch.completions.truncated_mask] = 0.0
        limit = batch.completions.max_tokens
        total = self.global_sum(weight_total(lengths, self.aggregation, limit))
        weights = token_weights(lengths, self.aggregation) / max(total, 1.0)
        teaches = (weights != 0) & ((advantages != 0) | torch.tensor(self.kl_weight != 0))
        (of_rows,), (weights,) = (sent(self.device, part) for part in (advantages, weights))
        settings = GRPOSettings(self.eps_low, self.eps_high, self.ratio, self.kl_weight)
        frozen = None
        if self.kl_weight:
            assert batch.reference_model_logprobs is not None, "ReferenceAwareClipping fills it"
            frozen = torch.cat(batch.reference_model_logprobs)

        def token_loss(tokens: Tokens, logprobs: Tensor, old: Tensor) -> Tensor:
            of_tokens = tokens.of_rows(of_rows)
            ratio = policy_ratio(logprobs.detach(), old, tokens.row, settings.ratio)
            self.note_clipped(batch, ratio, of_tokens)
            loss = grpo_token_loss(
                logprobs,
                old,
                of_tokens,
                tokens.row,
                settings,
                None if frozen is None else tokens.of_tokens(frozen),
            )
            return tokens.of_rows(weights) * loss

        self.learn(batch, token_loss, teaches.tolist(), weigh_rows=self.ratio == "sequence")
        self.finish_step(batch)
