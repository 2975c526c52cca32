"""What GRPO and PPO share: several updates on the completions of one rollout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import Unpack

from grao_lightning.batch import PromptBatch, TokenRow
from grao_lightning.callbacks.sampling import GroupSampling
from grao_lightning.faults import Faults
from grao_lightning.language_model.head import Weigh, weigh_by_gradient
from grao_lightning.language_model.logprobs import split_by_tokens
from grao_lightning.language_model.transfer import sent
from grao_lightning.modules.base import AlignmentModule, AlignmentSettings, Beside
from grao_lightning.objectives.ratio import is_clipped

#: (the rows' tokens, their log-probabilities, those of the sampling policy) -> weighted losses
TokenLoss = Callable[["Tokens", Tensor, Tensor], Tensor]

#: The chart of what the clipped ratio leaves without gradient.
CLIPPED = {"clipped tokens": ["train/clip_ratio/low_mean", "train/clip_ratio/high_mean"]}


@dataclass(frozen=True)
class Tokens:
    """K tokens of some rows of a rollout, all rows behind one another.

    Attributes:
        row: [K] long, the row among these.
        number: [K] long, the row in the rollout.
        place: [K] long, the token among those of all rows of the rollout.
    """

    row: Tensor
    number: Tensor
    place: Tensor

    @classmethod
    def of(cls, numbers: list[int], lengths: Tensor, device: torch.device) -> "Tokens":
        """Return the tokens of the rows ``numbers``, by the lengths [R] of the rollout's rows."""
        chosen = lengths[numbers]
        row = torch.arange(len(numbers)).repeat_interleave(chosen)
        number = torch.tensor(numbers)[row]
        first_here, first = chosen.cumsum(0) - chosen, lengths.cumsum(0) - lengths
        place = torch.arange(len(row)) - first_here[row] + first[number]
        return cls(*sent(device, row, number, place))

    def __getitem__(self, part: slice) -> "Tokens":
        return Tokens(self.row[part], self.number[part], self.place[part])

    def of_rows(self, values: Tensor) -> Tensor:
        """Return a value a row, [R], as one a token, [K]."""
        return values[self.number]

    def of_tokens(self, values: Tensor) -> Tensor:
        """Return the values [K] of these tokens out of those of all rows' tokens."""
        return values[self.place]


class _RolloutLoss:
    """The loss of a rollout's tokens, summed up as it is formed.

    Args:
        token_loss: Of tokens, weighted.
        rows: Of the rollout.
        old_logprobs: Of all rows' tokens, under the policy that sampled; None: those of the
            forward pass at hand.
        device: Of the policy.

    Attributes:
        total: The loss so far.
    """

    def __init__(
        self,
        token_loss: TokenLoss,
        rows: Sequence[TokenRow],
        old_logprobs: Tensor | None,
        device: torch.device,
    ) -> None:
        self._token_loss = token_loss
        self._lengths = torch.tensor([len(row.answer_ids) for row in rows])
        self.old_logprobs = old_logprobs
        self._device = device
        self.total = torch.zeros((), dtype=torch.double, device=device)

    def weigh_for(self, numbers: list[int]) -> Weigh:
        """Return the weights of the tokens of the rows ``numbers``."""
        of_micro_batch = Tokens.of(numbers, self._lengths, self._device)

        def loss(part: slice, logprobs: Tensor) -> Tensor:
            tokens, old = of_micro_batch[part], logprobs.detach()
            if self.old_logprobs is not None:
                old = tokens.of_tokens(self.old_logprobs)
            value = self._token_loss(tokens, logprobs, old).sum()
            self.total += value.detach()
            return value

        return weigh_by_gradient(loss)


class RolloutSettings(AlignmentSettings, total=False):
    """Names and types of the settings of `RolloutModule`, for editors and type checkers."""

    updates_per_rollout: int
    eps_low: float
    eps_high: float
    kl_weight: float


class RolloutModule(AlignmentModule):
    """Takes several optimiser steps on each rollout; the trainer counts them as one step.

    Args:
        updates_per_rollout: Optimiser steps on each rollout, each over all of it.
        eps_low: The ratio to the policy that sampled is clipped below ``1 - eps_low``.
        eps_high: It is clipped above ``1 + eps_high``.
        kl_weight: Weight of the KL penalty towards the reference model; 0 = none.
        base_settings: The settings of `AlignmentModule`.
    """

    group_statistics = "outside"
    needs_reference_answers = False

    def __init__(
        self,
        updates_per_rollout: int = 1,
        eps_low: float = 0.2,
        eps_high: float = 0.2,
        kl_weight: float = 0.0,
        **base_settings: Unpack[AlignmentSettings],
    ) -> None:
        super().__init__(**base_settings)
        self.updates_per_rollout = updates_per_rollout
        self.eps_low = eps_low
        self.eps_high = eps_high
        self.kl_weight = kl_weight

    @property
    def training_temperature(self) -> float:
        """Return what divides the logits in training: by default what divided them in sampling."""
        if self.logprob_temperature is not None:
            return self.logprob_temperature
        temperature = self._sampling_temperature
        return 1.0 if temperature is None else temperature

    @property
    def _sampling_temperature(self) -> float | None:
        callbacks: list[Any] = getattr(self._trainer, "callbacks", [])
        found = (part.temperature for part in callbacks if isinstance(part, GroupSampling))
        return next(found, None)

    def on_fit_start(self) -> None:
        """Say where the ratio is not that of the policy that samples."""
        super().on_fit_start()
        sampled = self._sampling_temperature
        if self.logprob_temperature is not None and sampled not in (None, self.logprob_temperature):
            rank_zero_warn(
                f"model.logprob_temperature={self.logprob_temperature} is not sampling.temperature="
                f"{sampled}: the ratio of {type(self).__name__} is then to a policy that did not "
                "sample; set model.logprob_temperature to null"
            )

    def setup(self, stage: str) -> None:
        """Check the run; of prompts without reference answers measure what can be measured."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "has_reference_answers") and not data.has_reference_answers("validation"):
            self.validation_metrics.leave_out_reference_answers()
        super().setup(stage)

    @property
    def needs_reference_logprobs(self) -> bool:
        """Return whether every step reads ``batch.reference_model_logprobs``."""
        return self.kl_weight != 0

    def faults(self) -> Faults:
        """Return what is wrong with the settings."""
        faults = super().faults()
        faults.at_least("model.updates_per_rollout", self.updates_per_rollout, 1)
        faults.between("model.eps_low", self.eps_low, 0, 1)
        faults.at_least("model.eps_high", self.eps_high, 0)
        faults.at_least("model.kl_weight", self.kl_weight, 0)
        if self.kl_weight and self.reference_model_source is None:
            faults.add(
                "model.kl_weight needs a reference model; got reference_model=null: set "
                "model.reference_model to policy or to a model, or kl_weight to 0"
            )
        return faults

    def rows(self, batch: PromptBatch) -> list[TokenRow]:
        """Return the completions."""
        return batch.completion_rows()

    def learn(
        self,
        batch: PromptBatch,
        token_loss: TokenLoss,
        needs_gradient: Sequence[bool],
        *,
        old_logprobs: Tensor | None = None,
        weigh_rows: bool = False,
        beside: Beside | None = None,
    ) -> None:
        """Take all updates on a rollout but the last one's optimiser step.

        Args:
            batch: Sampled and scored; gets ``policy_logprobs`` from before the first update.
            token_loss: Loss of tokens, weighted and divided by counts over all devices.
            needs_gradient: [R] whether a row has any.
            old_logprobs: Of all rows' tokens, under the policy that sampled; None: those of the
                first update's forward pass.
            weigh_rows: Whether a token's loss depends on others of its row.
            beside: Further loss on a micro-batch.
        """
        rows = self.rows(batch)
        loss = _RolloutLoss(token_loss, rows, old_logprobs, self.device)
        note = batch.statistics.mean
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean"):
            note(name, torch.empty(0))  # all ranks note it, signal or not
        for number in range(self.updates_per_rollout):
            if number:
                self.update()
            micro_batches = split_by_tokens(
                self.policy, rows, needs_gradient, self.micro_batch_tokens
            )
            collected = self.accumulate(
                rows, micro_batches, loss.weigh_for, weigh_rows=weigh_rows, beside=beside
            )
            if number == 0:
                batch.policy_logprobs = collected.logprobs
                if old_logprobs is None:
                    loss.old_logprobs = torch.cat(collected.logprobs)
                note("entropy", torch.cat(collected.entropies))
        share_of_rank = torch.tensor(self.updates_per_rollout / self.trainer.world_size)
        batch.statistics.share("loss", loss.total, share_of_rank)

    def note_clipped(self, batch: PromptBatch, ratio: Tensor, advantages: Tensor) -> None:
        """Note the shares of tokens that the clipped ratio, [K], leaves without gradient."""
        below, above = is_clipped(ratio, advantages, 1 - self.eps_low, 1 + self.eps_high)
        batch.statistics.mean("clip_ratio/low_mean", below.double())
        batch.statistics.mean("clip_ratio/high_mean", above.double())
