"""What must hold of a run as a whole; told together, before any model loads."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from grao_lightning.callbacks.checkpoint import LastCheckpoint
from grao_lightning.callbacks.clipping import ReferenceAwareClipping
from grao_lightning.callbacks.sampling import GroupSampling
from grao_lightning.callbacks.scoring import GroupScoring
from grao_lightning.display.vocabulary import figure_of
from grao_lightning.faults import Faults, UserError
from grao_lightning.strategies.sharded import ShardedStrategy

_STAGES = (GroupSampling, GroupScoring, ReferenceAwareClipping)
_MADE = "or make the Trainer with grao_lightning.make_trainer"
_QUANTIZED = ("32-true", "bf16-true", "bf16-mixed")
_WHOLE = ("32-true", "64-true")
_MONITORS = ("val/ras", "val/loss", "val/accuracy")  # of one module or another


def check_run(trainer: Trainer, module: Any, data: Any) -> None:
    """Raise one error that lists what `run_faults` finds.

    Raises:
        UserError: There are faults.
    """
    run_faults(trainer, module, data, trainer.state.fn).raise_if_any()


def run_faults(trainer: Trainer, module: Any, data: Any, command: str | None) -> Faults:
    """Return what is wrong with module, data, callbacks and trainer, also with one another.

    Args:
        trainer: With its callbacks.
        module: An `AlignmentModule`.
        data: A `PromptDataModule`, or None where other loaders supply the batches.
        command: "fit" or another method of the trainer.
    """
    faults = Faults()
    faults.add(*module.faults())
    if hasattr(data, "faults"):
        faults.add(*data.faults(trainer.world_size))
    faults.add(*_stage_faults(trainer, module))
    faults.add(*_trainer_faults(trainer, command))
    faults.add(*_offload_faults(trainer, module))
    faults.add(*_clipping_faults(trainer, module))
    faults.add(_temperature_fault(trainer, module, command))
    faults.add(*_precision_faults(trainer, module))
    faults.add(_quantization_fault(trainer, module))
    faults.add(*_sharding_faults(trainer, module))
    faults.add(*_monitor_faults(trainer, module))
    faults.add(*_last_checkpoint_faults(trainer))
    return faults


def check_pairs(data: Any, splits: Sequence[str], who: str) -> None:
    """Check that every row has a rejected answer.

    Args:
        data: A `PromptDataModule`; anything else is taken as it is.
        splits: That are read.
        who: Needs pairs, for the message.

    Raises:
        UserError: A row has none.
    """
    for split in splits:
        rows = getattr(data, "examples", {}).get(split, ())
        missing = sum(row.rejected_answer is None for row in rows)
        if missing:
            raise UserError(
                f"data.{split} must have a rejected answer in every row for {who}; {missing} of "
                f"{len(rows)} rows have none: use preference data, or name its columns with "
                "data.rename"
            )


def _stage_faults(trainer: Trainer, module: Any) -> Faults:
    faults = Faults()
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback for callback in callbacks if isinstance(callback, _STAGES)]
    wanted = ", ".join(stage.__name__ for stage in _STAGES)
    for stage in _STAGES:
        number = sum(isinstance(callback, stage) for callback in found)
        if number != 1:
            faults.add(
                f"trainer.callbacks must hold one {stage.__name__}; got {number}: pass {wanted}, "
                f"{_MADE}, which adds what is missing"
            )
    if not faults and not all(map(isinstance, found, _STAGES)):
        order = ", ".join(type(callback).__name__ for callback in found)
        faults.add(
            f"trainer.callbacks must come in the order {wanted}, since each fills what the next "
            f"one reads; got {order}: put them in order, {_MADE}, which does"
        )
    for callback in found:
        if isinstance(callback, ReferenceAwareClipping):
            drifts = not module.trains_on_groups or module.reference_model_source is not None
            faults.add(*callback.faults(drifts))
        elif module.samples and isinstance(callback, GroupScoring):
            faults.add(*callback.faults(trains=module.trains_on_groups))
        elif module.samples:  # else it has no part in the run
            faults.add(*callback.faults())
    return faults


def _temperature_fault(trainer: Trainer, module: Any, command: str | None) -> str | None:
    """Return that groups would hold the same completion many times."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    greedy = any(isinstance(part, GroupSampling) and part.temperature == 0 for part in callbacks)
    if not greedy or not module.trains_on_groups or command != "fit":
        return None
    return (
        "sampling.temperature must be > 0 where groups are trained on, or all completions of one "
        "are the same and teach nothing; got 0: set it to 0.7 or so"
    )


def _clipping_faults(trainer: Trainer, module: Any) -> Faults:
    faults = Faults()
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for clipping in (part for part in callbacks if isinstance(part, ReferenceAwareClipping)):
        if clipping.drift_target is not None and not module.trains_on_groups:
            faults.add(
                f"clipping.drift_target must be null with {type(module).__name__}, which samples "
                f"nothing to measure the drift on; got {clipping.drift_target}: remove it"
            )
        if module.needs_reference_logprobs and clipping.drift_every != 1:
            faults.add(
                f"model.kl_weight needs clipping.drift_every=1; got {clipping.drift_every}: remove "
                "it, or set model.kl_weight to 0"
            )
        if clipping.outward_mask and not module.heeds_outward_mask:
            faults.add(
                "clipping.outward_mask works on GRAOModule alone; got true with "
                f"{type(module).__name__}: remove it"
            )
    return faults


def _trainer_faults(trainer: Trainer, command: str | None) -> Faults:
    faults = Faults()
    if command == "fit" and trainer.max_steps < 0:
        faults.add(
            "trainer.max_steps must be set, since the prompts are endless; got -1: set it, as in "
            "max_steps=200"
        )
    if command == "fit" and _never_validates(trainer):
        faults.add(
            "trainer.val_check_interval must be a whole number of steps, since the prompts are "
            "endless and no epoch ends; got 1.0, with which nothing is validated: set it and "
            f"check_val_every_n_epoch=None, limit_val_batches=0 for no validation, {_MADE}"
        )
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        faults.add(
            "trainer.use_distributed_sampler must be False, since data.prompts_per_step is shared "
            f"by the devices already; got True: set it, {_MADE}"
        )
    if trainer.gradient_clip_val:
        faults.add(
            "trainer.gradient_clip_val must not be set, since ReferenceAwareClipping clips; got "
            f"{trainer.gradient_clip_val}: set clipping.max_norm instead"
        )
    if trainer.accumulate_grad_batches != 1:
        faults.add(
            "trainer.accumulate_grad_batches must be 1, since a step is one batch of groups; got "
            f"{trainer.accumulate_grad_batches}: raise data.prompts_per_step for larger steps, "
            "lower model.micro_batch_tokens to save memory"
        )
    strategy = type(trainer.strategy).__name__
    ours = isinstance(trainer.strategy, ShardedStrategy)
    if not ours and any(name in strategy for name in ("DeepSpeed", "FSDP", "ModelParallel")):
        faults.add(
            "trainer.strategy must be auto, ddp or fsdp2: others deal out weights or gradients in "
            f"ways that neither clipping nor sampling here knows; got {strategy}: use fsdp2, which "
            "deals them out too"
        )
    return faults


def _sharding_faults(trainer: Trainer, module: Any) -> Faults:
    """Return what does not go with weights that are dealt out over devices."""
    faults = Faults()
    if not isinstance(trainer.strategy, ShardedStrategy):
        return faults
    faults.add(*trainer.strategy.faults())
    if module.optimizer != "adamw" or module.stochastic_rounding:
        faults.add(
            "model.optimizer must be adamw, without model.stochastic_rounding, with "
            "trainer.strategy=fsdp2: its checkpoints have not been seen to hold moments of fewer "
            f"bits; got {module.optimizer}: remove the settings"
        )
    if module.activation_offload:
        faults.add(
            "model.activation_offload must be false with trainer.strategy=fsdp2, whose gathered "
            "weights it would take for activations; got true: use model.gradient_checkpointing"
        )
    if module.master_weights:
        faults.add(
            "model.master_weights must be false with trainer.strategy=fsdp2, whose checkpoints "
            "would lose them; got true: remove it and set trainer.precision=bf16-mixed, which "
            "keeps the weights in float32 and computes in bfloat16"
        )
    if module.lora is not None and module.lora.quantize is not None:
        faults.add(
            "model.lora.quantize must be null with trainer.strategy=fsdp2, which has not been seen "
            f"to deal out {module.lora.quantize} weights rightly; got {module.lora.quantize}: use "
            "ddp, or remove it"
        )
    if module.lora is not None and trainer.strategy.replicas > 1:
        faults.add(
            "trainer.strategy.replicas must be 1 with model.lora: peft takes parts of weights for "
            f"whole ones where there are several copies; got {trainer.strategy.replicas}"
        )
    for name, source in module.sources.items():
        if not isinstance(source, str | None):
            faults.add(
                f"model.{name} must be a name, folder or file with trainer.strategy=fsdp2, so that "
                f"every device reads its part alone; got a {type(source).__name__} that is whole: "
                "save it with save_pretrained(folder) and give the folder"
            )
    return faults


def _offload_faults(trainer: Trainer, module: Any) -> Faults:
    faults = Faults()
    device = trainer.strategy.root_device.type
    if module.activation_offload and device != "cuda":
        faults.add(
            "model.activation_offload must be false where activations are in the host's memory "
            f"already; got true with trainer.accelerator={device}: remove it, or recompute them by "
            "model.gradient_checkpointing=true"
        )
    return faults


def _quantization_fault(trainer: Trainer, module: Any) -> str | None:
    """Return that a run computes in a precision in which few-bit weights are not multiplied."""
    precision = str(trainer.precision)
    if module.lora is None or module.lora.quantize is None or precision in _QUANTIZED:
        return None
    return (
        f"trainer.precision must be one of {', '.join(_QUANTIZED)} with model.lora.quantize="
        f"{module.lora.quantize}; got {precision}"
    )


def _never_validates(trainer: Trainer) -> bool:
    """Return whether a validation is wanted, and left to the end of an epoch, which never comes."""
    interval = trainer.val_check_interval
    return trainer.limit_val_batches != 0 and isinstance(interval, float) and interval == 1.0


def _precision_faults(trainer: Trainer, module: Any) -> Faults:
    faults = Faults()
    precision = str(trainer.precision)
    if module.master_weights and (precision.endswith("-mixed") or precision in _WHOLE):
        faults.add(
            "model.master_weights must be false where the weights are float32 or wider themselves; "
            f"got true with trainer.precision={precision}: remove it, or set "
            "trainer.precision=bf16-true"
        )
    if module.stochastic_rounding and (precision != "bf16-true" or module.lora is not None):
        what = precision if module.lora is None else f"{precision} and model.lora"
        faults.add(
            "model.stochastic_rounding must be false where what is trained is not bfloat16 and no "
            f"step rounds away; got true with trainer.precision={what}: remove it"
        )
    dtype = getattr(module.trained_source, "dtype", None)
    small = dtype in (torch.bfloat16, torch.float16) and module.lora is None
    if small and precision not in ("bf16-true", "16-true"):
        faults.add(
            f"{module.source_setting} must have float32 weights with trainer.precision="
            f"{precision}, since small steps round away in {str(dtype)[6:]}; got "
            "that: load it with dtype=torch.float32, or set trainer.precision=bf16-true and "
            "model.master_weights=true"
        )
    return faults


def _monitor_faults(trainer: Trainer, module: Any) -> Faults:
    """Return likely typos, which would end the run at its first validation, and wrong ends."""
    faults = Faults()
    names = [name for metrics in module.metric_sets for name in metrics.names]
    known = [f"val/{name}" for name in names]
    known += [f"val_bounds/{name}_{end}" for name in names for end in ("low", "high")]
    for callback in trainer.checkpoint_callbacks:
        monitor = getattr(callback, "monitor", None)
        close = difflib.get_close_matches(monitor or "", known, n=1)
        if monitor in _MONITORS and monitor not in known:
            faults.add(
                f"best_checkpoint.monitor must be a figure of {type(module).__name__}; got "
                f"{monitor}: remove it, and {module.validation_monitor[0]} decides"
            )
        elif close and monitor not in known:  # a figure unlike ours may be logged by the user
            faults.add(f"checkpoint monitor {monitor!r} is not logged; did you mean {close[0]}?")
        else:
            faults.add(_direction_fault(callback))
    return faults


def _last_checkpoint_faults(trainer: Trainer) -> Faults:
    faults = Faults()
    for last in trainer.checkpoint_callbacks:
        if not isinstance(last, LastCheckpoint):
            continue
        if last.export_every is not None:
            faults.at_least("last_checkpoint.export_every", last.export_every, 1)
        if last.save_weights_only:
            faults.add(
                "last_checkpoint.save_weights_only must be false, since a run goes on from it with "
                "its optimiser's states; got true: remove it, or set best_checkpoint."
                "save_weights_only"
            )
    return faults


def _direction_fault(checkpoint: Any) -> str | None:
    """Return that a checkpoint would keep the worst instead of the best."""
    monitor = getattr(checkpoint, "monitor", None)
    figure = figure_of(monitor or "")
    better = {"higher": "max", "lower": "min"}.get(figure.better if figure else "")
    if better is None or checkpoint.mode == better:
        return None
    return (
        f"best_checkpoint.mode must be {better} with monitor={monitor}, or the worst checkpoint is "
        f"kept; got {checkpoint.mode}"
    )
