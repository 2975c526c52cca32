"""What must hold of a run as a whole; told together, before any model loads."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from grao_lightning.callbacks.clipping import ReferenceAwareClipping
from grao_lightning.callbacks.sampling import GroupSampling
from grao_lightning.callbacks.scoring import GroupScoring
from grao_lightning.faults import Faults

_STAGES = (GroupSampling, GroupScoring, ReferenceAwareClipping)


def check_run(trainer: Trainer, module: Any, data: Any) -> None:
    """Check module, data, callbacks and trainer, each by itself and against one another.

    Args:
        trainer: With its callbacks.
        module: An `AlignmentModule`.
        data: A `PromptDataModule`, or None where other loaders supply the batches.

    Raises:
        UserError: Lists every fault.
    """
    faults = Faults()
    faults.add(*module.faults())
    if hasattr(data, "faults"):
        faults.add(*data.faults(trainer.world_size))
    faults.add(*_stage_faults(trainer, module.reference_model_source is not None))
    faults.add(*_trainer_faults(trainer))
    faults.raise_if_any()


def _stage_faults(trainer: Trainer, has_reference_model: bool) -> Faults:
    faults = Faults()
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback for callback in callbacks if isinstance(callback, _STAGES)]
    wanted = ", ".join(stage.__name__ for stage in _STAGES)
    for stage in _STAGES:
        number = sum(isinstance(callback, stage) for callback in found)
        if number != 1:
            faults.add(
                f"trainer.callbacks must hold one {stage.__name__}; got {number}: pass {wanted}"
            )
    if not faults and not all(map(isinstance, found, _STAGES)):
        order = ", ".join(type(callback).__name__ for callback in found)
        faults.add(
            f"trainer.callbacks must come in the order {wanted}, since each fills what the next "
            f"one reads; got {order}"
        )
    for callback in found:
        if isinstance(callback, ReferenceAwareClipping):
            faults.add(*callback.faults(has_reference_model))
        else:
            faults.add(*callback.faults())
    return faults


def _trainer_faults(trainer: Trainer) -> Faults:
    faults = Faults()
    if trainer.state.fn == "fit" and trainer.max_steps < 0:
        faults.add("trainer.max_steps must be set, since the prompts are endless; got -1")
    strategy = type(trainer.strategy).__name__
    if "DeepSpeed" in strategy or "FSDP" in strategy or "ModelParallel" in strategy:
        faults.add(
            f"trainer.strategy must keep whole gradients on every device, or their norm is not "
            f"clipped; got {strategy}: use auto or ddp"
        )
    return faults
