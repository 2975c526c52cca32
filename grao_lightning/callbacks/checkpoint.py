"""The checkpoint a run goes on from."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Where a validation follows the step, saves after it: a resumed run has not lost it.

    Lightning saves between the two, and a run that goes on from there skips that validation, so
    that its curve lacks a point. Loggers are flushed beforehand, for what they hold in memory is
    lost with a process that is killed.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is due, unless a validation follows."""
        if self._is_due(trainer) and not _validation_follows(trainer):
            _flush(trainer)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save what was put off."""
        if trainer.state.fn == "fit" and self._is_due(trainer):
            _flush(trainer)
            super().on_train_batch_end(trainer, pl_module, None, None, 0)
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the last step, on which no interval need fall."""
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step and self.dirpath is not None:
            _flush(trainer)
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _is_due(self, trainer: Trainer) -> bool:
        every, step = self._every_n_train_steps, trainer.global_step
        return bool(every and step and step % every == 0)


def _validation_follows(trainer: Trainer) -> bool:
    interval = trainer.val_check_batch
    if not trainer.enable_validation:
        return False
    if trainer.should_stop:  # as `ValidateLastStep` asks for it
        return True
    if interval is None or interval == float("inf"):
        return False
    return bool((trainer.fit_loop.epoch_loop.total_batch_idx + 1) % interval == 0)


def _flush(trainer: Trainer) -> None:
    for logger in trainer.loggers:
        flush = getattr(getattr(logger, "experiment", None), "flush", None)
        if flush is not None and trainer.is_global_zero:
            flush()
