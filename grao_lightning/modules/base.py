"""What every alignment method shares: policy, reference model, ascent, RAS and NAG."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import Unpack

from grao_lightning.batch import PromptBatch, TokenRow
from grao_lightning.callbacks.scoring import GroupScoring
from grao_lightning.faults import Faults
from grao_lightning.language_model.before_training import BeforeTraining
from grao_lightning.language_model.fingerprint import fingerprint
from grao_lightning.language_model.frozen import FrozenModel, bare, inside
from grao_lightning.language_model.head import Weigh
from grao_lightning.language_model.loading import (
    ModelSource,
    load_model,
    model_fault,
    source_name,
)
from grao_lightning.language_model.logprobs import (
    MicroBatch,
    TokenLogprobs,
    evened_out,
    row_routing,
    split_by_tokens,
    token_logprobs,
)
from grao_lightning.language_model.routing import leave_out_router_logits
from grao_lightning.language_model.sharing import (
    share_prompts,
    shares_prompts,
    tell_dropout,
)
from grao_lightning.language_model.transfer import sent
from grao_lightning.language_model.trial import decoder_of
from grao_lightning.metrics.outcomes import GainKind, TiesAs
from grao_lightning.modules.balance import check_router_loss
from grao_lightning.modules.step import Mode, StepModule, StepSettings
from grao_lightning.modules.validation import MetricSet, ValidationMetrics
from grao_lightning.objectives.advantages import GroupScale, GroupStatistics
from grao_lightning.objectives.clipping import outward_mask
from grao_lightning.sampling.trial import decide_alike

WeighFor = Callable[[list[int]], Weigh]  # numbers of a micro-batch's rows -> their tokens' weights
Beside = Callable[[list[int], TokenLogprobs], Tensor]  # -> loss that is added to the weighted one


class AlignmentSettings(StepSettings, total=False):
    """Names and types of the settings of `AlignmentModule`, for editors and type checkers."""

    policy: ModelSource
    reference_model: ModelSource | None
    logprob_temperature: float | None
    ties_as: TiesAs
    gain: GainKind


class AlignmentModule(StepModule):
    """Holds policy and reference model; samples, and measures RAS and NAG in validation.

    Subclasses write ``training_step`` and call `ascend` and `finish_step` in it.

    Args:
        policy: Model to train: hub name, folder, ``.gguf`` file or ``embedded:keywords``; or
            the folder of an adapter (peft), which ``lora`` trains on, and which is merged into its
            model without. In Python also a loaded model of transformers, trained in place.
        reference_model: Frozen model for drift, clipping and NAG's untrained base: "policy" (a copy
            of the policy before training; with ``lora`` the policy itself without what is trained),
            another source or, in Python, model, or null (none of these then).
        logprob_temperature: Divides the logits in training. 1 trains the policy itself, whatever
            temperature samples it; null = the method's own choice: 1, and ``sampling.temperature``
            where a ratio to the policy that sampled is taken (GRPO, PPO).
        ties_as: What a tie counts as in RAS: win, half or loss.
        gain: Which NAG: "net" (wins minus losses against the untrained base) or "wins".
        step_settings: The settings of `StepModule`.
    """

    trains_on_groups = True
    #: Whether completions of equal reward in a group teach nothing.
    needs_spread = True
    #: What `GroupScoring` makes of a group's rewards unless it is told otherwise.
    group_statistics: GroupStatistics = "inside"
    group_scale: GroupScale = "population_std"

    def __init__(
        self,
        policy: ModelSource = "embedded:keywords",
        reference_model: ModelSource | None = "policy",
        logprob_temperature: float | None = None,
        ties_as: TiesAs = "loss",
        gain: GainKind = "net",
        **step_settings: Unpack[StepSettings],
    ) -> None:
        self._sources = {"policy": policy, "reference_model": reference_model}
        super().__init__(**step_settings)
        self.policy_source = source_name(policy)
        self.reference_model_source = (
            None if reference_model is None else source_name(reference_model)
        )
        self.logprob_temperature = logprob_temperature
        self.policy: Any = None
        self._fingerprint = ""  # of the reference model, where models were handed over
        self.ties_as = ties_as
        self.gain = gain
        has_base = reference_model is not None
        self.validation_metrics = ValidationMetrics(ties_as, gain, has_base=has_base)
        #: What a method measures on the data's answers, without sampling.
        self.answer_metrics: MetricSet | None = None
        self._base_is_start = reference_model == "policy"

    @property
    def training_temperature(self) -> float:
        """Return what divides the logits in training."""
        return 1.0 if self.logprob_temperature is None else self.logprob_temperature

    @property
    def source(self) -> str:
        """Return where the policy comes from."""
        return self.policy_source

    @property
    def trained_model(self) -> Any:
        """Return the policy."""
        return self.policy

    @property
    def samples(self) -> bool:
        """Return whether validation samples and scores: it needs a reward or judge to score by.

        Training on groups has one; other methods may do without.
        """
        trainer = self._trainer
        return self.trains_on_groups or (
            trainer is not None
            and any(part.scores for part in trainer.callbacks if isinstance(part, GroupScoring))  # type: ignore[attr-defined]
        )

    @property
    def validation_monitor(self) -> tuple[str, Mode]:
        """Return RAS where it is measured: held out, never the reward that training pleases.

        Data without reference answers has NAG instead, without a base the reward.
        """
        if not self.samples:
            return super().validation_monitor
        names = self.validation_metrics.names
        return f"val/{next(name for name in ('ras', 'nag', 'reward') if name in names)}", "max"

    @property
    def metric_sets(self) -> list[Any]:
        """Return RAS and its like where there are rewards, and the method's own figures."""
        own = [] if self.answer_metrics is None else [self.answer_metrics]
        return [self.validation_metrics, *own] if self.samples else own

    # -- set-up ------------------------------------------------------------------------------------

    def faults(self) -> Faults:
        """Return what is wrong with the settings, without loading a model."""
        faults = Faults()
        policy, reference_model = self._sources.values()
        faults.add(model_fault("model.policy", policy, is_policy=True, trained=True))
        if self.reference_model_source not in (None, "policy"):
            faults.add(
                model_fault("model.reference_model", reference_model, is_policy=True, trained=False)
            )
        if reference_model is policy and not isinstance(policy, str):
            faults.add(
                "model.reference_model must be another model than model.policy, since it is "
                'frozen; got the same: say reference_model="policy" for a frozen copy'
            )
        faults.add(*super().faults())
        if self.logprob_temperature is not None and not self.logprob_temperature > 0:
            faults.add(
                "model.logprob_temperature must be > 0, or null for the method's own choice; got "
                f"{self.logprob_temperature}"
            )
        return faults

    def configure_model(self) -> None:
        """Load tokenizer, policy and reference model; does nothing the second time."""
        if self.policy is not None:
            return
        self.own_tokenizer()
        self.policy = self._loaded("policy")
        self.check_vocabulary()
        with torch.no_grad():
            inside(self.policy, tell_dropout)
            check_router_loss(self.policy, decoder_of, self.router_loss)
        self.reference_model = self._frozen_model()
        if self.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable({"use_reentrant": False})
        if not all(isinstance(source, str | None) for source in self._sources.values()):
            before = isinstance(self.reference_model, BeforeTraining)
            frozen = bare(self.reference_model or self.policy)
            self._fingerprint = self._base_fingerprint if before else fingerprint(frozen)

    def _frozen_model(self) -> FrozenModel | None:
        """Return the reference model: the policy before training is within one with adapters."""
        if self.reference_model_source is None:
            return None
        if self.reference_model_source != "policy":
            return FrozenModel(self._loaded("reference_model"))
        if self.adapters is not None:
            return BeforeTraining(self.policy, self.adapters.start)
        # Parts on several ranks cannot be copied.
        copied = self._loaded("policy") if self.sharding else deepcopy(self.policy)
        decide_alike(self.policy, copied)
        return FrozenModel(copied)

    def _loaded(self, name: str) -> Any:
        """Return the model of a setting, with the attention asked for."""
        source, asked = self._sources[name], self.attn_implementation
        if name == "policy" and self.lora is not None:
            source = self.base_source  # its adapters are no part of it
        if isinstance(source, str):
            options: dict[str, Any] = {"attn_implementation": asked} if asked else {}
            options |= self.quantization() if name == "policy" else {}
            model = load_model(f"model.{name}", source, self.sharding, **options)
        else:
            model = source
            if asked or shares_prompts(model):  # as an earlier module left it
                model.set_attn_implementation(asked or "sdpa")
        leave_out_router_logits(model)
        if name == "policy":
            self.adapt(model)
        with torch.no_grad():
            inside(model, self._try_out)
        return model

    def _try_out(self, model: Any) -> None:
        """Find by trial how a model can be read."""
        # An attention that was asked for stays: sharing prompts would replace it.
        if self.share_prompts and self.attn_implementation is None:
            share_prompts(model)
        if self.sharding is not None:  # in the midst of a pass ranks could not try it
            token_logprobs(model, [])

    def _apply(self, fn: Any, recurse: bool = True) -> "AlignmentModule":
        """Move and cast the reference model along, which is no part of the module tree."""
        super()._apply(fn, recurse)
        if self.reference_model is not None:
            self.reference_model.follow(fn)
        return self

    # -- one step ----------------------------------------------------------------------------------

    def rows(self, batch: PromptBatch) -> list[TokenRow]:
        """Return the rows that a step trains on, completions first."""
        raise NotImplementedError

    def ascend(
        self, batch: PromptBatch, rows: Sequence[TokenRow], coefficients: Tensor
    ) -> "RowLogprobs":
        """Add the gradient of ``-sum_r c_r l(row_r)`` and return the rows' log-probabilities.

        Rows whose coefficient is 0 have no part in the gradient. Where the batch has
        ``outward_limits``, tokens that already left them are not pushed further.

        Args:
            batch: Gets ``policy_logprobs``; with outward limits ``reference_model_logprobs`` is
                read.
            rows: R prompts with their answers.
            coefficients: [R] on the host, derivative of the objective by each row's mean
                log-probability, already divided by counts over all devices.
        """
        if batch.outward_limits is not None:
            batch.statistics.mean("clip_ratio/outward", torch.empty(0))  # ranks without signal too
        collected = self.accumulate(
            rows,
            split_by_tokens(
                self.policy, rows, (coefficients != 0).tolist(), self.micro_batch_tokens
            ),
            lambda numbers: self._weigh(batch, rows, numbers, coefficients),
        )
        batch.policy_logprobs = collected.logprobs
        return collected

    def accumulate(
        self,
        rows: Sequence[TokenRow],
        micro_batches: Sequence[MicroBatch],
        weigh_for: WeighFor,
        *,
        weigh_rows: bool = False,
        beside: Beside | None = None,
    ) -> "RowLogprobs":
        """Add the gradient of ``-sum_t w_t log pi(t)``; return the rows' log-probabilities.

        Args:
            rows: R prompts with their answers.
            micro_batches: Each row in one of them.
            weigh_for: Gives the weights of a micro-batch's tokens, treated as constants.
            weigh_rows: Whether a token's weight depends on other tokens of the micro-batch.
            beside: Further loss on a micro-batch, such as the value's; also on one without rows.
        """
        collected = RowLogprobs(len(rows))
        if self.router_loss is not None:  # it counts every row
            micro_batches = [MicroBatch(part.numbers, True) for part in micro_batches]
        micro_batches = evened_out(self.policy, micro_batches)
        balance = self.router_balance(
            rows,
            [part.numbers for part in micro_batches],
            lambda chosen, shares: row_routing(self.policy, chosen, shares),
        )
        for at, micro_batch in enumerate(micro_batches, start=1):
            numbers = micro_batch.numbers
            weighs = micro_batch.needs_gradient and numbers
            with torch.set_grad_enabled(micro_batch.needs_gradient), self.kept_activations():
                computed = token_logprobs(
                    self.policy,
                    [rows[number] for number in numbers],
                    temperature=self.training_temperature,
                    weigh=weigh_for(numbers) if weighs else None,
                    weigh_rows=weigh_rows,
                    shares=None if balance is None else balance.shares(numbers),
                    into_grad=self.owns_gradients,
                )
            collected.add(numbers, computed)
            if micro_batch.needs_gradient:
                loss = computed.loss + (0.0 if beside is None else beside(numbers, computed))
                loss = loss + (0.0 if balance is None else balance.loss(computed.routing))
                self.backward_part(loss, is_last=at == len(micro_batches))
        return collected

    def _weigh(
        self,
        batch: PromptBatch,
        rows: Sequence[TokenRow],
        numbers: list[int],
        coefficients: Tensor,
    ) -> Weigh:
        """Return the weight of a token: its row's c_r over its row's length, 0 if masked out."""
        lengths = torch.tensor([len(rows[number].answer_ids) for number in numbers])
        by_token = coefficients[numbers].repeat_interleave(lengths)
        by_token, weights = sent(
            self.device, by_token, by_token / lengths.repeat_interleave(lengths)
        )
        limits, frozen = batch.outward_limits, batch.reference_model_logprobs
        if limits is None:
            return lambda part, logprobs: weights[part]
        assert frozen is not None, "outward_limits need reference_model_logprobs"
        frozen_logprobs = torch.cat([frozen[number] for number in numbers])

        def masked(part: slice, logprobs: Tensor) -> Tensor:
            counts = outward_mask(
                logprobs, frozen_logprobs[part], by_token[part], low=limits.low, high=limits.high
            )
            dropped = (~counts).double().where(by_token[part] != 0, torch.nan)
            batch.statistics.mean("clip_ratio/outward", dropped)
            return weights[part] * counts

        return masked

    # -- validation --------------------------------------------------------------------------------

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Take in one batch's outcomes; `GroupSampling` and `GroupScoring` have filled it."""
        if self.samples:
            self.validation_metrics.update(batch)

    # -- checkpoints -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the counters; the reference model is loaded from its source again."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["num_sampled_tokens"] = self.num_sampled_tokens
        if self._fingerprint:
            checkpoint["reference_model_fingerprint"] = self._fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters; see `StepModule.load_state_dict` for the weights."""
        super().on_load_checkpoint(checkpoint)
        self.num_sampled_tokens = checkpoint.get("num_sampled_tokens", 0)
        before = checkpoint.get("reference_model_fingerprint", self._fingerprint)
        if self.reference_model is not None and self._fingerprint not in ("", before):
            rank_zero_warn(
                "the reference model is not the one that the checkpoint was trained with, so drift "
                "and NAG are measured from another: hand over the base as it was before training "
                "(a model that was handed over is trained in place)"
            )


class RowLogprobs:
    """Detached log-probabilities and entropies of all rows of a step, in the order of the rows."""

    def __init__(self, num_rows: int) -> None:
        self.logprobs: list[Tensor] = [torch.empty(0)] * num_rows
        self.entropies: list[Tensor] = [torch.empty(0)] * num_rows

    def add(self, numbers: list[int], computed: TokenLogprobs) -> None:
        """Keep the tokens of the rows ``numbers``."""
        parts = zip(
            numbers,
            computed.flat.detach().split(computed.lengths),
            computed.entropy.split(computed.lengths),
            strict=True,
        )
        for number, logprobs, entropy in parts:
            self.logprobs[number], self.entropies[number] = logprobs, entropy

    @property
    def means(self) -> Tensor:
        """Return l(x) of every row, [R] nats per token."""
        return torch.stack([row.mean() for row in self.logprobs])
