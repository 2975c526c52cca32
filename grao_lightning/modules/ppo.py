"""PPO: advantages by token from a value head on the policy's own states."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Unpack

from grao_lightning.batch import PromptBatch, TokenRow
from grao_lightning.faults import Faults, UserError
from grao_lightning.language_model.head import head_obstacle
from grao_lightning.language_model.logprobs import TokenLogprobs, at_least_float32, frozen_passes
from grao_lightning.language_model.sharded import shards_of
from grao_lightning.language_model.transfer import sent
from grao_lightning.modules.rollout import CLIPPED, RolloutModule, RolloutSettings, Tokens
from grao_lightning.modules.step import Charts
from grao_lightning.objectives.ppo import (
    adapted_kl_weight,
    clipped_value_loss,
    generalized_advantages,
    token_rewards,
)
from grao_lightning.objectives.ratio import clipped_loss, policy_ratio


@dataclass(frozen=True)
class _Rollout:
    """What the policy said before the first update; one [T] tensor a row each.

    Attributes:
        logprobs: Nats.
        values: Reward units.
        advantages: Whitened over the tokens of all devices, NaN in rows without a score.
        returns: Reward units.
        scored: Whether a row has a score.
        num_tokens: Of those that have, over all devices.
    """

    logprobs: list[Tensor]
    values: list[Tensor]
    advantages: list[Tensor]
    returns: list[Tensor]
    scored: list[bool]
    num_tokens: float


class PPOModule(RolloutModule):
    """Proximal Policy Optimization with a value head, generalised advantages and a KL reward.

    Source: arXiv 1707.06347; by token, with the KL reward, as in arXiv 2203.02155. The score is
    what `GroupScoring` compares: outcomes against the reference answer, or rewards. A value is read
    from the state that predicts a token, and its loss trains the policy's layers too.

    Args:
        value_weight: Weight of the value's loss.
        value_clip: A value may move so far from the old one, in reward units, before it stops to
            earn; null = no bound.
        discount: gamma of the generalised advantages.
        trace: lambda of the generalised advantages.
        kl_target: Nats per completion: the KL weight goes up while the drift from the reference
            model exceeds it and down while it does not; null = a fixed weight.
        kl_horizon: Completions over which the KL weight follows its error.
        rollout_settings: The settings of `RolloutModule` and `AlignmentModule`.
    """

    needs_spread = False
    group_scale = "none"
    charts: ClassVar[Charts] = {
        "loss": ["train/loss$"],
        **CLIPPED,
        "value loss": ["train/value/loss", "train/value/squared_error"],
        "value": ["train/value/mean", "train/value/return"],
        "KL weight": ["train/kl_weight"],
    }

    def __init__(
        self,
        value_weight: float = 0.5,
        value_clip: float | None = 0.2,
        discount: float = 1.0,
        trace: float = 0.95,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        **rollout_settings: Unpack[RolloutSettings],
    ) -> None:
        super().__init__(**rollout_settings)
        self.value_weight = value_weight
        self.value_clip = value_clip
        self.discount = discount
        self.trace = trace
        self.kl_target = kl_target
        self.kl_horizon = kl_horizon

    def faults(self) -> Faults:
        """Return what is wrong with the settings."""
        faults = super().faults()
        faults.at_least("model.value_weight", self.value_weight, 0)
        faults.between("model.discount", self.discount, 0, 1)
        faults.between("model.trace", self.trace, 0, 1)
        faults.at_least("model.kl_horizon", self.kl_horizon, 1)
        if self.value_clip is not None and not self.value_clip > 0:
            faults.add(f"model.value_clip must be > 0 or null; got {self.value_clip}")
        if self.kl_target is not None and not (self.kl_target > 0 and self.kl_weight > 0):
            faults.add(
                "model.kl_target must be > 0 and needs a model.kl_weight > 0 to start from; got "
                f"kl_target={self.kl_target}, kl_weight={self.kl_weight}"
            )
        return faults

    def configure_model(self) -> None:
        """Load the models and put a value head, all zeros, on the policy."""
        if self.policy is not None:
            return
        super().configure_model()
        policy: Any = self.policy
        if head_obstacle(policy) is not None:
            raise UserError(
                f"model.policy: {type(policy).__name__} turns states into logits in an unknown "
                "way, and PPO's value head needs the states; use another method or policy"
            )
        self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        shards = shards_of(policy)
        if shards is not None:
            shards.shard_beside(self.value_head)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Take the updates on a sampled and scored batch."""
        rollout = self._read_rollout(batch)
        low, high = 1 - self.eps_low, 1 + self.eps_high
        counts = [~advantages.isnan() for advantages in rollout.advantages]
        of_all, old_logprobs = torch.cat(rollout.advantages), torch.cat(rollout.logprobs)

        def token_loss(tokens: Tokens, logprobs: Tensor, old: Tensor) -> Tensor:
            advantages = tokens.of_tokens(of_all).nan_to_num(0.0)
            ratio = policy_ratio(logprobs, old, tokens.row)
            self.note_clipped(batch, ratio, advantages)
            return clipped_loss(ratio, advantages, low, high) / rollout.num_tokens

        def value_loss(numbers: list[int], computed: TokenLogprobs) -> Tensor:
            def of(values: list[Tensor]) -> Tensor:
                return torch.cat([computed.flat[:0], *[values[number] for number in numbers]])

            loss = clipped_value_loss(
                self._values(computed), of(rollout.values), of(rollout.returns), self.value_clip
            ).where(of(counts).bool(), 0.0)
            batch.statistics.mean("value/loss", loss)
            return self.value_weight * loss.sum() / rollout.num_tokens

        batch.statistics.mean("value/loss", torch.empty(0))  # all ranks note it
        self.learn(batch, token_loss, rollout.scored, old_logprobs=old_logprobs, beside=value_loss)
        self._adapt(batch, rollout)
        self.finish_step(batch)

    def _read_rollout(self, batch: PromptBatch) -> _Rollout:
        assert batch.compared is not None, "GroupScoring has not filled batch.compared"
        rows = self.rows(batch)
        logprobs, values = self._read(rows)
        lengths = [len(row) for row in logprobs]
        mask = pad_sequence([torch.ones_like(row) for row in logprobs], batch_first=True).bool()
        old_values = pad_sequence(values, batch_first=True)
        drift = torch.zeros_like(old_values)
        if self.kl_weight:
            assert batch.reference_model_logprobs is not None, "ReferenceAwareClipping fills it"
            pairs = zip(logprobs, batch.reference_model_logprobs, strict=True)
            drift = pad_sequence([own - frozen for own, frozen in pairs], batch_first=True)
        of_host = batch.compared[:, :-1].flatten()
        scored = (~of_host.isnan()).tolist()
        scores = sent(self.device, of_host)[0].to(old_values.dtype)
        rewards = token_rewards(scores.nan_to_num(0.0), drift, mask, self.kl_weight)
        advantages = generalized_advantages(
            rewards, old_values, mask, discount=self.discount, trace=self.trace
        )
        returns = advantages + old_values
        counted = mask & ~scores.isnan()[:, None]
        # Every row has a token, so a row counts if its score does.
        num_tokens = self.global_sum(sum(n for n, has in zip(lengths, scored, strict=True) if has))
        whitened = self._whitened(advantages, counted, max(num_tokens, 1.0))
        self._note_values(
            batch, *(part.where(counted, torch.nan) for part in (old_values, returns))
        )

        def unpadded(padded: Tensor) -> list[Tensor]:
            return [row[:length] for row, length in zip(padded, lengths, strict=True)]

        return _Rollout(
            logprobs, values, unpadded(whitened), unpadded(returns), scored, max(num_tokens, 1.0)
        )

    def _read(self, rows: list[TokenRow]) -> tuple[list[Tensor], list[Tensor]]:
        """Return log-probabilities and values of every row's tokens, without gradients."""
        logprobs, values = [torch.empty(0)] * len(rows), [torch.empty(0)] * len(rows)
        passes = frozen_passes(
            self.policy, rows, self.micro_batch_tokens, temperature=self.training_temperature
        )
        for numbers, computed in passes:
            of_rows = self._values(computed).detach().split(computed.lengths)
            for number, own, value in zip(numbers, computed.by_row(), of_rows, strict=True):
                logprobs[number], values[number] = own, value
        return logprobs, values

    def _values(self, computed: TokenLogprobs) -> Tensor:
        assert computed.states is not None, "configure_model refuses such models"
        return at_least_float32(self.value_head(computed.states)[:, 0])

    def _whitened(self, advantages: Tensor, counted: Tensor, number: float) -> Tensor:
        """Return advantages of mean 0 and variance 1 over ``number`` tokens, NaN where not counted.

        Nothing is read from the device.
        """

        def mean(values: Tensor) -> Tensor:
            return self.reduce_over_ranks(values.where(counted, 0.0).sum(), "sum") / number

        chosen = advantages.double()
        centre = mean(chosen)
        spread = mean((chosen - centre).square()).sqrt() + 1e-8
        return ((advantages - centre) / spread).where(counted, torch.nan)

    def _note_values(self, batch: PromptBatch, values: Tensor, returns: Tensor) -> None:
        note = batch.statistics.mean
        note("value/mean", values)
        note("value/return", returns)
        note("value/squared_error", (returns - values).square())
        note("kl_weight", self.kl_weight)

    def _adapt(self, batch: PromptBatch, rollout: _Rollout) -> None:
        if self.kl_target is None:
            return
        assert batch.reference_model_logprobs is not None
        pairs = zip(rollout.logprobs, batch.reference_model_logprobs, strict=True)
        drift = torch.stack([(own - frozen).sum() for own, frozen in pairs])
        number = self.global_sum(len(rollout.logprobs))
        kl = self.global_sum(sum(drift.tolist())) / number
        self.kl_weight = adapted_kl_weight(
            self.kl_weight, kl, self.kl_target, int(number), self.kl_horizon
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the KL weight, which a run adapts."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl_weight"] = self.kl_weight

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the KL weight where it adapts."""
        super().on_load_checkpoint(checkpoint)
        if self.kl_target is not None:
            self.kl_weight = checkpoint.get("kl_weight", self.kl_weight)
