"""What every module shares: one optimiser step a batch, in micro-batches, on all devices."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, TypedDict

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from grao_lightning.batch import PromptBatch, TokenRow
from grao_lightning.callbacks.phase import clock
from grao_lightning.callbacks.storage import use_whole_files
from grao_lightning.data.templates import template_change
from grao_lightning.faults import Faults, NamedSettings, UserError
from grao_lightning.language_model.adapter_folders import is_adapter
from grao_lightning.language_model.checkpoints import no_optimizer_states
from grao_lightning.language_model.frozen import FrozenModel
from grao_lightning.language_model.kept import packed_source
from grao_lightning.language_model.loading import (
    ModelSource,
    eos_ids,
    first_mismatch,
    has_tokenizer,
    source_name,
)
from grao_lightning.language_model.lora import LoRA, as_lora, as_primitives
from grao_lightning.language_model.offload import activations_on_host
from grao_lightning.language_model.precision import keeping_float32
from grao_lightning.language_model.recomputed import cheap_activations_recomputed
from grao_lightning.language_model.sharded import Sharding
from grao_lightning.language_model.tokenizing import (
    TokenizerSource,
    check_vocabulary,
    tokenizer_fault,
    tokenizer_of,
)
from grao_lightning.metrics.outcomes import Estimate
from grao_lightning.modules.adapted import AdaptedModule
from grao_lightning.modules.balance import Count, RouterBalance
from grao_lightning.modules.checks import check_run
from grao_lightning.modules.host_memory import give_back_memory
from grao_lightning.modules.optimizer import (
    OPTIMIZERS,
    OptimizerName,
    make_optimizer,
    optimizer_fault,
)
from grao_lightning.modules.settings import show_settings
from grao_lightning.randomness import run_seed
from grao_lightning.strategies.sharded import sharding_of

Schedule = Literal["constant", "linear", "cosine"]
Mode = Literal["min", "max"]
Charts = dict[str, list[str]]


class StepSettings(TypedDict, total=False):
    """Names and types of the settings of `StepModule`, for editors and type checkers."""

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    optimizer: OptimizerName
    master_weights: bool
    stochastic_rounding: bool
    schedule: Schedule
    warmup_steps: int
    micro_batch_tokens: int | None
    gradient_checkpointing: bool
    activation_offload: bool
    attn_implementation: str | None
    share_prompts: bool
    router_loss: float | None
    tokenizer: TokenizerSource | None
    lora: LoRA | None


class StepModule(NamedSettings, AdaptedModule):
    """Takes one optimiser step a batch and logs what it and validation measured.

    Optimisation is manual: a batch is split into micro-batches by tokens, and every loss is divided
    by a count over all devices, so that neither the split nor the number of devices changes the
    gradient. Subclasses load their model in ``configure_model``, set ``validation_metrics`` and
    write ``training_step``, which hands losses to `backward_part` and ends with `finish_step`.

    Args:
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Of AdamW, decoupled.
        betas: Of AdamW.
        optimizer: adamw, or with its moments in fewer bits (needs ``grao-lightning[low-bit]``):
            adamw_8bit (2 bytes a parameter; adamw has 8 in float32 and 4 in bfloat16), adamw_4bit
            (1 byte) or, on CUDA, adamw_fp8 (2). Compiled at the first step; slow on CPUs.
        master_weights: Keep float32 copies of the weights in the optimiser, which takes its steps
            on them: for ``trainer.precision=bf16-true``, where small steps round away otherwise.
        stochastic_rounding: For the same without copies: round the new weights up or down by
            chance, so that small steps arrive in the mean (needs ``grao-lightning[low-bit]``).
        schedule: Learning rate after warm-up: constant, or falling to 0 at ``trainer.max_steps``.
        warmup_steps: Steps of linear warm-up.
        micro_batch_tokens: Most padded tokens in one pass; lower it when memory runs out.
            null = 1024 on a CPU and 8192 elsewhere, or twice the longest row where that is more.
        gradient_checkpointing: Recompute activations in the backward pass.
        activation_offload: Let activations wait in the host's memory, on CUDA.
        attn_implementation: Of the Hugging Face models, such as flash_attention_2; prompts are
            then not shared.
        share_prompts: Read every prompt once for all that follows it, where the model allows it.
        router_loss: Weight of the loss that balances a mixture's experts, beside the method's own;
            its configuration's router_aux_loss_coef is one. Costs another forward pass. null = off.
        tokenizer: Hub name or folder, in Python also a loaded one; null = the model's own, of a
            model that is handed over that of the name it was loaded from.
        lora: Train adapters, not the weights: {rank, alpha, dropout, target_modules, base,
            quantize}. ``{}`` takes the defaults, see `LoRA`; null = train the weights.
    """

    #: Whether training reads sampled, scored groups (and not only the data's answers).
    trains_on_groups = False
    #: Whether training reads rejected answers.
    trains_on_pairs = False
    #: Whether training compares with, or learns from, the data's reference answers.
    needs_reference_answers = True
    #: Whether the step heeds the outward mask of `ReferenceAwareClipping`.
    heeds_outward_mask = False
    #: The models' settings as they were given, the trained one first; set before ``__init__``. A
    #: dict hides models from PyTorch, which would take each for a part of its own.
    _sources: dict[str, Any]
    #: Its charts on TensorBoard's custom-scalar page: title -> regular expressions of tags.
    charts: ClassVar[Charts] = {"loss": ["train/loss$"]}

    def __init__(
        self,
        learning_rate: float = 1e-6,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        optimizer: OptimizerName = "adamw",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        micro_batch_tokens: int | None = None,
        gradient_checkpointing: bool = False,
        activation_offload: bool = False,
        attn_implementation: str | None = None,
        share_prompts: bool = True,
        router_loss: float | None = None,
        tokenizer: TokenizerSource | None = None,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
        self._tokenizer_source = tokenizer
        self.lora = as_lora(lora)
        objects = self._as_primitives(tokenizer=tokenizer, lora=lora)
        self.save_hyperparameters(ignore=list(objects))
        self.save_hyperparameters(objects)
        self.automatic_optimization = False
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.optimizer = optimizer
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.micro_batch_tokens = micro_batch_tokens
        self.gradient_checkpointing = gradient_checkpointing
        self.activation_offload = activation_offload
        self.attn_implementation = attn_implementation
        self.share_prompts = share_prompts
        self.router_loss = router_loss
        self._router_losses: list[Tensor] = []  # of the updates on this batch
        self.reference_model_source: str | None = None
        self.reference_model: FrozenModel | None = None
        self.tokenizer: Any = None  # once `own_tokenizer` has loaded it
        self.validation_metrics: Any = None
        self.num_sampled_tokens = 0
        self.estimates: dict[str, Estimate] = {}
        self.step_values: dict[str, float] = {}
        self._base_is_start = False  # of validation's curves: measured untrained
        self._packed: Tensor | None = None

    def _as_primitives(self, *, tokenizer: Any, lora: Any) -> dict[str, Any]:
        """Return the settings that are objects as checkpoints keep them: no second copy of any."""
        sources = {**self._sources, "tokenizer": tokenizer}
        objects: dict[str, Any] = {
            name: source_name(source)
            for name, source in sources.items()
            if not isinstance(source, str | None)
        }
        return {**objects, "lora": as_primitives(lora)} if isinstance(lora, LoRA) else objects

    def __init_subclass__(cls, **options: Any) -> None:
        """Show all settings of a subclass."""
        super().__init_subclass__(**options)
        show_settings(cls)

    @property
    def trained_source(self) -> ModelSource:
        """Return where the trained model comes from, or the model that was handed over."""
        return next(iter(self._sources.values()))

    @property
    def sources(self) -> dict[str, ModelSource | None]:
        """Return the models' settings as they were given, the trained one's first."""
        return self._sources

    def own_tokenizer(self) -> Any:
        """Return the tokenizer, loaded on first use: the data needs it before there is a model.

        Raises:
            UserError: It cannot be loaded.
        """
        if self.tokenizer is None:
            source = self.trained_source
            if isinstance(source, str) and is_adapter(source) and not has_tokenizer(source):
                source = self.base_source
            self.tokenizer = tokenizer_of(self.source_setting, source, self._tokenizer_source)
        return self.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Return where the tokenizer comes from."""
        return source_name(self._tokenizer_source or self.trained_source)

    def eos_ids(self) -> tuple[int, ...]:
        """Return every token id that ends a sequence."""
        return eos_ids(self.base_source, self.own_tokenizer())

    def check_vocabulary(self) -> None:
        """Check that a model and a tokenizer that were brought together fit.

        Raises:
            UserError: The tokenizer has more tokens than the model.
        """
        if self._tokenizer_source is not None or not isinstance(self.trained_source, str):
            check_vocabulary(self.trained_model, self.tokenizer)

    @property
    def trained_model(self) -> Any:
        """Return the Hugging Face model that is trained."""
        raise NotImplementedError

    @property
    def source(self) -> str:
        """Return where the trained model comes from."""
        raise NotImplementedError

    @property
    def samples(self) -> bool:
        """Return whether validation samples completions, scores them and gives RAS."""
        return False

    @property
    def validation_monitor(self) -> tuple[str, Mode]:
        """Return the figure that says which of two checkpoints is better, and its better end."""
        return "val/loss", "min"

    @property
    def metric_sets(self) -> list[Any]:
        """Return what validation fills; a set has names, compute, reset and without_interval."""
        return [self.validation_metrics]

    @property
    def needs_reference_logprobs(self) -> bool:
        """Return whether every step reads ``batch.reference_model_logprobs``."""
        return False

    # -- set-up ------------------------------------------------------------------------------------

    def faults(self) -> Faults:
        """Return what is wrong with the settings, without loading a model."""
        faults = Faults()
        faults.at_least("model.learning_rate", self.learning_rate, 0)
        faults.at_least("model.weight_decay", self.weight_decay, 0)
        faults.at_least("model.warmup_steps", self.warmup_steps, 0)
        if self.micro_batch_tokens is not None:
            faults.at_least("model.micro_batch_tokens", self.micro_batch_tokens, 1)
        faults.one_of("model.optimizer", self.optimizer, OPTIMIZERS)
        faults.add(optimizer_fault(self.optimizer, self.master_weights, self.stochastic_rounding))
        if self.router_loss is not None and not self.router_loss > 0:
            faults.add(f"model.router_loss must be > 0 or null; got {self.router_loss}")
        faults.one_of("model.schedule", self.schedule, ("constant", "linear", "cosine"))
        faults.add(tokenizer_fault(self.trained_source, self._tokenizer_source))
        faults.add(*self.adapter_faults())
        for name in ("master_weights", "stochastic_rounding"):
            if getattr(self, name) and self.lora is not None:
                faults.add(
                    f"model.{name} must be false with model.lora, whose adapters are float32 "
                    "themselves; got true: remove it"
                )
        return faults

    def setup(self, stage: str) -> None:
        """Check the run as a whole; Lightning calls this before ``configure_model``."""
        self.check_run()
        use_whole_files(self.trainer)

    def check_run(self) -> None:
        """Tell all faults together; our data asks for it before it reads anything."""
        check_run(self.trainer, self, getattr(self.trainer, "datamodule", None))

    @property
    def sharding(self) -> Sharding | None:
        """Return how the strategy deals out weights over ranks, None where each holds them all."""
        return sharding_of(self._trainer)

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule by step."""
        # A fused AdamW unscales by itself, so under a gradient scaler the norm would be clipped too
        # late; there the plain one is used.
        trained = self._trained()
        sharded = {hasattr(parameter, "device_mesh") for parameter in trained}
        assert sharded == {self.sharding is not None}, "the optimiser holds parts, or all is whole"
        optimizer = make_optimizer(
            self.optimizer,
            trained,
            master_weights=self.master_weights,
            stochastic_rounding=self.stochastic_rounding,
            fused=self.trainer.precision != "16-mixed",
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=(self.betas[0], self.betas[1]),
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule_factor)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and cast; what transformers keeps in float32 stays so in half precision."""
        return super()._apply(keeping_float32(self.trained_model, fn), recurse)

    def on_fit_start(self) -> None:
        """Put the model in training mode: Hugging Face loads models in evaluation mode."""
        self.train()
        self.tell_learning_rate(self.learning_rate)

    # -- one step ----------------------------------------------------------------------------------

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
        batch.statistics.mean("learning_rate", float(optimizer.param_groups[0]["lr"]))
        if self._router_losses:
            batch.statistics.mean("router_loss", torch.stack(self._router_losses))
            self._router_losses = []
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()  # type: ignore[union-attr]
        self._log_step(batch)

    def router_balance(
        self, rows: Sequence[TokenRow], micro_batches: Sequence[Sequence[int]], count: Count
    ) -> RouterBalance | None:
        """Return what balances the experts in an update, see `RouterBalance`; None: it is off."""
        if self.router_loss is None:
            return None
        balance = RouterBalance(
            self.router_loss,
            rows,
            micro_batches,
            count,
            lambda values: self.reduce_over_ranks(values, "sum"),
        )
        self._router_losses.append(balance.value)
        return balance

    def global_sum(self, value: float) -> float:
        """Return the sum of a number over all ranks."""
        return self.reduce_over_ranks(torch.tensor([value], dtype=torch.double), "sum").item()

    def reduce_over_ranks(self, values: Tensor, operation: str) -> Tensor:
        """Return values over all ranks, where they are; ``operation`` is "sum" or "max"."""
        if self.trainer.world_size == 1:
            return values
        reduced = self.trainer.strategy.reduce(values.to(self.device), reduce_op=operation)
        return reduced.to(values.device)

    @property
    def owns_gradients(self) -> bool:
        """Return whether gradients may be added to weights by hand.

        Other strategies than that of one device wait in autograd to exchange them, and a gradient
        scaler multiplies the loss.
        """
        one = isinstance(self.trainer.strategy, SingleDeviceStrategy)
        return one and self.trainer.precision != "16-mixed"

    def kept_activations(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass, which decides what it keeps of its activations."""
        if self.activation_offload:
            return activations_on_host(self.trained_model)
        return cheap_activations_recomputed()

    def _trained(self) -> list[torch.nn.Parameter]:
        """Return the parameters that the optimiser holds."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def backward_part(self, loss: Any, *, is_last: bool) -> None:
        """Add the gradient of a micro-batch's loss, which is divided by counts over all devices."""
        strategy = self.trainer.strategy
        # Gradients of all but the last micro-batch stay local: one exchange a step.
        wait = nullcontext() if is_last else getattr(strategy, "block_backward_sync", nullcontext)()
        with wait:
            self.manual_backward(loss * self.trainer.world_size)  # DDP divides by it
        give_back_memory()

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
        if self.drops_out:  # a function of seed, step and rank, so that a resumed run goes on alike
            seeds = (run_seed(), self.trainer.global_step, self.global_rank)
            torch.manual_seed(hash(seeds) % 2**63)
        give_back_memory()
        self._update_started = clock(self.device)

    def _log_step(self, batch: PromptBatch) -> None:
        batch.seconds["update"] = clock(self.device) - self._update_started
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
        tagged = {f"train/{name}": value for name, value in values.items()}
        self.log_dict(tagged, logger=False, batch_size=1)
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every == 0:
            self._write(tagged, step - 1)  # measured before this step's own update

    # -- validation --------------------------------------------------------------------------------

    def on_validation_epoch_end(self) -> None:
        """Log every figure, and its interval under a group of its own."""
        self.estimates = self.validation_figures()
        if self._base_is_start and self.trainer.global_step > 0:
            start = {
                name.removeprefix("base_"): estimate
                for name, estimate in self.estimates.items()
                if name.startswith("base_")
            }
            self._write(self._tagged(start), 0)  # curves are drawn in the order of writing
            self._base_is_start = False  # one point is enough, also of a run that goes on
        self.log_validation(self._tagged(self.estimates))

    def log_validation(self, values: dict[str, float]) -> None:
        """Log figures that are the same on all ranks, at the number of steps taken.

        Args:
            values: By tag.
        """
        # Lightning has no other way to be told that ranks agree.
        self.log_dict(values, logger=False, batch_size=1, sync_dist=True)
        self._write(values, self.trainer.global_step)

    def validation_figures(self) -> dict[str, Estimate]:
        """Return what this validation measured, and forget it for the next one."""
        figures: dict[str, Estimate] = {}
        for metrics in self.metric_sets:
            figures |= metrics.compute()
            metrics.reset()
        return figures

    def _tagged(self, estimates: dict[str, Estimate]) -> dict[str, float]:
        bare = {name for metrics in self.metric_sets for name in metrics.without_interval}
        tagged = {f"val/{name}": estimate.value for name, estimate in estimates.items()}
        for name, estimate in estimates.items():
            if name not in bare:
                tagged[f"val_bounds/{name}_low"] = estimate.low
                tagged[f"val_bounds/{name}_high"] = estimate.high
        return tagged

    def _write(self, values: dict[str, float], step: int) -> None:
        """Hand values to the loggers: Lightning would add a curve of the epoch, which stays 0."""
        if self.trainer.sanity_checking:
            return
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=step)
            logger.save()

    # -- checkpoints -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what export needs beside the weights, how prompts were read, what was drawn."""
        adapters = self.told_of_adapters()
        if adapters is not None:
            checkpoint["adapters"] = adapters
        checkpoint["base_is_start"] = self._base_is_start
        if self._packed is None:
            try:
                self._packed = packed_source(self.trained_model, self.tokenizer)
            except Exception as error:  # tokenizers fail in many ways; the weights must not be lost
                rank_zero_warn(
                    f"the checkpoint keeps no configuration and tokenizer ({error}): grao export "
                    f"will need {self.source_setting}={self.source} where it is now"
                )
        if self._packed is not None:
            checkpoint["source_files"] = self._packed
        data = self._data()
        if hasattr(data, "template_in_use"):
            checkpoint["chat_template"] = data.template_in_use

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare how prompts were read with how they are read now.

        Raises:
            UserError: A run that goes on would read them otherwise, has no optimiser states, or
                trains other weights.
        """
        if self._goes_on_without_states(checkpoint):
            raise UserError(no_optimizer_states("ckpt_path", self.trainer.ckpt_path))
        self.check_adapters(checkpoint.get("adapters"))
        self._base_is_start = self._base_is_start and checkpoint.get("base_is_start", True)
        data = self._data()
        if "chat_template" not in checkpoint or not hasattr(data, "template_in_use"):
            return
        fault = template_change(checkpoint["chat_template"], data.template_in_use)
        if fault and self.trainer.state.fn == "fit":
            raise UserError(fault)
        if fault:
            rank_zero_warn(f"{fault}. The figures are those of prompts it has not learned to read")

    def _goes_on_without_states(self, checkpoint: dict[str, Any]) -> bool:
        trainer = self._trainer
        if trainer is None or trainer.state.fn != "fit":
            return False
        # Where the strategy loads them itself, it has done so.
        return trainer.strategy.lightning_restore_optimizer and (
            "optimizer_states" not in checkpoint
        )

    def _data(self) -> Any:
        """Return the DataModule; None where there is none, nor a trainer."""
        return getattr(self._trainer, "datamodule", None)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the weights; say which setting is at odds with the checkpoint where they differ."""
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            raise UserError(
                f"ckpt_path: the checkpoint is not of {self.source_setting}={self.source}; name "
                f"the {self.source_setting.rpartition('.')[2]} it was trained from: "
                f"{first_mismatch(error)}"
            ) from error
