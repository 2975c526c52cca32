"""What every method shares: models, micro-batches, the optimiser, validation, logging."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from grao_lightning.advantages import GroupScale, GroupStatistics
from grao_lightning.batch import PromptBatch, TokenRow
from grao_lightning.checks import check_run
from grao_lightning.faults import Faults, UserError
from grao_lightning.head import Weigh
from grao_lightning.logprobs import (
    MicroBatch,
    TokenLogprobs,
    split_by_tokens,
    token_logprobs,
)
from grao_lightning.metrics import Estimate, GainKind, TiesAs
from grao_lightning.models import first_mismatch, load_model, load_tokenizer, source_fault
from grao_lightning.modules.validation import ValidationMetrics
from grao_lightning.objectives.clipping import outward_mask
from grao_lightning.optimizer import MasterWeightsAdamW
from grao_lightning.sharing import share_prompts

log = logging.getLogger(__name__)

Schedule = Literal["constant", "linear", "cosine"]
WeighFor = Callable[[list[int]], Weigh]  # numbers of a micro-batch's rows -> their tokens' weights
Beside = Callable[[list[int], TokenLogprobs], Tensor]  # -> loss that is added to the weighted one


class AlignmentModule(LightningModule):
    """Holds policy and reference model and takes one optimiser step a batch.

    Optimisation is manual: a batch is split into micro-batches by tokens, and every loss is divided
    by a count over all devices, so that neither the split nor the number of devices changes the
    gradient. Subclasses write ``training_step`` and call `ascend` and `finish_step` in it.

    Args:
        policy: Model to train: hub name, folder, ``.gguf`` file or ``embedded:keywords``.
        reference_model: Frozen model for drift, clipping and NAG's untrained base: "policy" (a copy
            of the policy before training), another source, or null (none of these then).
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Of AdamW, decoupled.
        betas: Of AdamW.
        master_weights: Keep float32 copies of the weights in the optimiser, which takes its steps
            on them: for ``trainer.precision=bf16-true``, where small steps round away otherwise.
        schedule: Learning rate after warm-up: constant, or falling to 0 at ``trainer.max_steps``.
        warmup_steps: Steps of linear warm-up.
        micro_batch_tokens: Most padded tokens in one forward pass; lower it when memory runs out.
        logprob_temperature: Divides the logits in training. 1 trains the policy itself, whatever
            temperature samples it.
        gradient_checkpointing: Recompute activations in the backward pass.
        attn_implementation: Of the Hugging Face models, such as flash_attention_2; prompts are
            then not shared.
        share_prompts: Read every prompt once for all that follows it, where the model allows it.
        ties_as: What a tie counts as in RAS: win, half or loss.
        gain: Which NAG: "net" (wins minus losses against the untrained base) or "wins".
    """

    #: Whether training reads sampled, scored groups (and not only the data's answers).
    trains_on_groups = True
    #: Whether training reads rejected answers.
    trains_on_pairs = False
    #: Whether completions of equal reward in a group teach nothing.
    needs_spread = True
    #: Whether the step heeds the outward mask of `ReferenceAwareClipping`.
    heeds_outward_mask = False
    #: What `GroupScoring` makes of a group's rewards unless it is told otherwise.
    group_statistics: GroupStatistics = "inside"
    group_scale: GroupScale = "population_std"

    def __init__(
        self,
        policy: str = "embedded:keywords",
        reference_model: str | None = "policy",
        learning_rate: float = 1e-6,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        master_weights: bool = False,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        micro_batch_tokens: int = 8192,
        logprob_temperature: float = 1.0,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        share_prompts: bool = True,
        ties_as: TiesAs = "loss",
        gain: GainKind = "net",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.policy_source = policy
        self.reference_model_source = reference_model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.master_weights = master_weights
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.micro_batch_tokens = micro_batch_tokens
        self.logprob_temperature = logprob_temperature
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.share_prompts = share_prompts
        self.policy: Any = None
        self.reference_model: Any = None
        self.tokenizer: Any = None
        self.num_sampled_tokens = 0
        self.ties_as = ties_as
        self.gain = gain
        has_base = reference_model is not None
        self.validation_metrics = ValidationMetrics(ties_as, gain, has_base=has_base)
        self.estimates: dict[str, Estimate] = {}
        self.step_values: dict[str, float] = {}

    @property
    def needs_reference_logprobs(self) -> bool:
        """Return whether every step reads ``batch.reference_model_logprobs``."""
        return False

    # -- set-up ------------------------------------------------------------------------------------

    def faults(self) -> Faults:
        """Return what is wrong with the settings, without loading a model."""
        faults = Faults()
        faults.add(source_fault("model.policy", self.policy_source))
        if self.reference_model_source not in (None, "policy"):
            faults.add(source_fault("model.reference_model", self.reference_model_source))
        faults.at_least("model.learning_rate", self.learning_rate, 0)
        faults.at_least("model.weight_decay", self.weight_decay, 0)
        faults.at_least("model.warmup_steps", self.warmup_steps, 0)
        faults.at_least("model.micro_batch_tokens", self.micro_batch_tokens, 1)
        faults.one_of("model.schedule", self.schedule, ("constant", "linear", "cosine"))
        if not self.logprob_temperature > 0:
            faults.add(f"model.logprob_temperature must be > 0; got {self.logprob_temperature}")
        return faults

    def setup(self, stage: str) -> None:
        """Check the run as a whole; Lightning calls this before ``configure_model``."""
        check_run(self.trainer, self, getattr(self.trainer, "datamodule", None))

    def configure_model(self) -> None:
        """Load tokenizer, policy and reference model; does nothing the second time."""
        if self.policy is not None:
            return
        options = {}
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        self.tokenizer = load_tokenizer("model.policy", self.policy_source)
        self.policy = load_model("model.policy", self.policy_source, **options)
        # An attention that was asked for stays: sharing prompts would replace it.
        share = self.share_prompts and self.attn_implementation is None
        if share:
            share_prompts(self.policy)
        if self.reference_model_source == "policy":
            self.reference_model = deepcopy(self.policy)
        elif self.reference_model_source is not None:
            self.reference_model = load_model(
                "model.reference_model", self.reference_model_source, **options
            )
            if share:
                share_prompts(self.reference_model)
        if self.reference_model is not None:
            self.reference_model.requires_grad_(False).eval()
        if self.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable({"use_reentrant": False})

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule by step."""
        # A fused AdamW unscales by itself, so under a gradient scaler the norm would be clipped too
        # late; there the plain one is used.
        fused = self.trainer.precision != "16-mixed"
        adamw = MasterWeightsAdamW if self.master_weights else torch.optim.AdamW
        optimizer = adamw(
            self._trained(),
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=(self.betas[0], self.betas[1]),
            fused=fused,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule_factor)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_fit_start(self) -> None:
        """Put the policy in training mode: Hugging Face loads models in evaluation mode."""
        self.policy.train()

    def train(self, mode: bool = True) -> "AlignmentModule":
        """Set the mode of the policy; the reference model always evaluates."""
        super().train(mode)
        if self.reference_model is not None:
            self.reference_model.eval()
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
            coefficients: [R] derivative of the objective by each row's mean log-probability,
                already divided by counts over all devices.
        """
        coefficients = coefficients.to(self.device)
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
            beside: Further loss on a micro-batch, such as the value's.
        """
        collected = RowLogprobs(len(rows))
        for at, micro_batch in enumerate(micro_batches, start=1):
            numbers = micro_batch.numbers
            with torch.set_grad_enabled(micro_batch.needs_gradient):
                computed = token_logprobs(
                    self.policy,
                    [rows[number] for number in numbers],
                    temperature=self.logprob_temperature,
                    weigh=weigh_for(numbers) if micro_batch.needs_gradient else None,
                    weigh_rows=weigh_rows,
                )
            collected.add(numbers, computed)
            if micro_batch.needs_gradient:
                loss = computed.loss + (0.0 if beside is None else beside(numbers, computed))
                self._backward(loss, is_last=at == len(micro_batches))
        if not any(part.needs_gradient for part in micro_batches):
            # Ranks must meet in the same collectives, signal or not.
            self._backward(sum(p.sum() * 0.0 for p in self._trained()), is_last=True)
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
        by_token = coefficients[numbers].repeat_interleave(lengths.to(self.device))
        weights = by_token / lengths.repeat_interleave(lengths).to(self.device)
        limits, frozen = batch.outward_limits, batch.reference_model_logprobs
        if limits is None:
            return lambda part, logprobs: weights[part]
        assert frozen is not None, "outward_limits need reference_model_logprobs"
        frozen_logprobs = torch.cat([frozen[number] for number in numbers])

        def masked(part: slice, logprobs: Tensor) -> Tensor:
            counts = outward_mask(
                logprobs, frozen_logprobs[part], by_token[part], low=limits.low, high=limits.high
            )
            pushed = by_token[part] != 0
            batch.statistics.mean("clip_ratio/outward", (~counts[pushed]).double())
            return weights[part] * counts

        return masked

    def update(self) -> None:
        """Take an optimiser step that is not the last one on this batch: the trainer counts one."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        inner = optimizer.optimizer
        self.trainer.strategy.optimizer_step(inner, lambda: None, model=self)
        inner.zero_grad(set_to_none=True)

    def finish_step(self, batch: PromptBatch) -> None:
        """Take the batch's last optimiser step and log what its stages noted."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert not isinstance(optimizer, list) and scheduler is not None
        batch.statistics.mean("learning_rate", optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()  # type: ignore[union-attr]
        self._log_step(batch)

    def global_sum(self, value: float) -> float:
        """Return the sum of a number over all ranks."""
        return self.reduce_over_ranks(torch.tensor([value], dtype=torch.double), "sum").item()

    def reduce_over_ranks(self, values: Tensor, operation: str) -> Tensor:
        """Return values over all ranks; ``operation`` is "sum" or "max"."""
        if self.trainer.world_size == 1:
            return values
        reduced = self.trainer.strategy.reduce(values.to(self.device), reduce_op=operation)
        return reduced.cpu()

    def _trained(self) -> list[torch.nn.Parameter]:
        """Return the parameters that the optimiser holds."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _backward(self, loss: Any, *, is_last: bool) -> None:
        strategy = self.trainer.strategy
        # Gradients of all but the last micro-batch stay local: one exchange a step.
        wait = nullcontext() if is_last else getattr(strategy, "block_backward_sync", nullcontext)()
        with wait:
            self.manual_backward(loss * self.trainer.world_size)  # DDP divides by it

    def _schedule_factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        falling_steps = max(1, self.trainer.max_steps - self.warmup_steps)
        left = max(0.0, 1 - (step - self.warmup_steps) / falling_steps)
        if self.schedule == "linear":
            return left
        return 0.5 * (1 - torch.cos(torch.tensor(left * torch.pi)).item())

    # -- logging -----------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Start the clock of the update; callbacks have sampled and scored by now."""
        self._update_started = time.perf_counter()

    def _log_step(self, batch: PromptBatch) -> None:
        batch.seconds["update"] = time.perf_counter() - self._update_started
        for phase, seconds in batch.seconds.items():
            batch.statistics.mean(f"perf/{phase}_time", seconds)
        values = batch.statistics.reduced(self.reduce_over_ranks)
        if batch.completions is not None:
            sampled = self.global_sum(batch.completions.lengths.sum().item())
            self.num_sampled_tokens += int(sampled)
            values["num_tokens"] = float(self.num_sampled_tokens)
            values["perf/tokens_per_second"] = sampled / sum(batch.seconds.values())
        values["step_time"] = sum(batch.seconds.values())
        self.step_values = values
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=1)

    # -- validation --------------------------------------------------------------------------------

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Take in one batch's outcomes; `GroupSampling` and `GroupScoring` have filled it."""
        self.validation_metrics.update(batch)

    def on_validation_epoch_end(self) -> None:
        """Log every metric with its interval."""
        self.estimates = self.validation_metrics.compute()
        self.validation_metrics.reset()
        for name, estimate in self.estimates.items():
            ends = {"": estimate.value, "_low": estimate.low, "_high": estimate.high}
            self.log_dict({f"val/{name}{end}": value for end, value in ends.items()}, batch_size=1)

    # -- checkpoints -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the reference model out: it is loaded from its source again."""
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith("reference_model.")]:
            del state[name]
        checkpoint["num_sampled_tokens"] = self.num_sampled_tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters; see `load_state_dict` for the weights."""
        self.num_sampled_tokens = checkpoint.get("num_sampled_tokens", 0)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the policy; the reference model keeps the weights of its own source."""
        if self.reference_model is not None:
            own = self.reference_model.state_dict(prefix="reference_model.")
            state_dict = {**own, **state_dict}
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            raise UserError(
                f"ckpt_path: the checkpoint is not of model.policy={self.policy_source}; name the "
                f"policy it was trained from: {first_mismatch(error)}"
            ) from error


class RowLogprobs:
    """Detached log-probabilities and entropies of all rows of a step, in the order of the rows."""

    def __init__(self, num_rows: int) -> None:
        self.logprobs: list[Tensor] = [torch.empty(0)] * num_rows
        self.entropies: list[Tensor] = [torch.empty(0)] * num_rows

    def add(self, numbers: list[int], computed: TokenLogprobs) -> None:
        """Keep the tokens of the rows ``numbers``."""
        lengths = computed.lengths.tolist()
        parts = zip(
            numbers,
            computed.flat.detach().split(lengths),
            computed.entropy.split(lengths),
            strict=True,
        )
        for number, logprobs, entropy in parts:
            self.logprobs[number], self.entropies[number] = logprobs, entropy

    @property
    def means(self) -> Tensor:
        """Return l(x) of every row, [R] nats per token."""
        return torch.stack([row.mean() for row in self.logprobs])
