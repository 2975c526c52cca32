"""The best checkpoint, the one to go on from, and the moments at which a run may be stopped."""

import logging
import signal
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from grao_lightning.callbacks import folders, stopping
from grao_lightning.callbacks.stopping import Stopped
from grao_lightning.display.vocabulary import figure_of
from grao_lightning.files import remove
from grao_lightning.strategies.sharded import ShardedStrategy

log = logging.getLogger(__name__)

_VALIDATION = "epoch_loop.val_loop.batch_progress"
# As if its first batch had just been begun: Lightning goes back and runs the whole of it.
_BEGUN = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights with the best figure of all validations.

    Every run that validates leaves one: where a figure is NaN or a tie, the first weights stay.
    `ValidateLastStep` has the last step validated.

    Args:
        monitor: The figure; null = the module's own (``validation_monitor``): val/ras, or what
            stands for it where RAS is not measured.
        mode: Whether "max" or "min" is better; null = the figure's better end, of one of yours min
            for a loss or an error, else max.
        filename: Without its ending.
        enable_version_counter: Whether a file of that name stays, and this one gets a number.
        save_on_train_epoch_end: False, since epochs do not end here; null = Lightning's own choice,
            which with ``val_check_interval=1`` is to wait for it.
        export: Whether the weights also lie beside as a Hugging Face folder, ``best`` beside
            ``best.ckpt``, as ``grao export`` writes it.
        settings: The settings of Lightning's ``ModelCheckpoint``, among them
            ``save_weights_only``: without the optimiser's states it takes a third of the room, and
            no run can go on from it.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["max", "min"] | None = None,
        filename: str | None = "best",
        enable_version_counter: bool = False,
        save_on_train_epoch_end: bool | None = False,
        export: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(
            monitor=monitor,
            mode=mode or _better(monitor),
            filename=filename,
            enable_version_counter=enable_version_counter,
            save_on_train_epoch_end=save_on_train_epoch_end,
            **settings,
        )
        self._given = {"monitor": monitor, "mode": mode}
        self.export = export

    @property
    def state_key(self) -> str:
        """Return the name of the state in checkpoints, by what was set and not by what was found.

        What a run logs is not known yet when its checkpoint is loaded.
        """
        return self._generate_state_key(**self._given)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was best; a file that is gone is not."""
        kept = state_dict["best_k_models"]
        if all(Path(path).exists() for path in kept):
            super().load_state_dict(state_dict)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save if this validation's figure is the best."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._find_figure(trainer)
        super().on_validation_end(trainer, pl_module)

    def consider(self, trainer: Trainer) -> None:
        """Save if the figure of a validation outside of ``fit`` is the best."""
        self._find_figure(trainer)
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        folders.wait()

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Wait until the folder lies there."""
        folders.wait()

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if self.export:
            folders.write_behind(trainer, _folder_of(filepath))

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if self.export and trainer.is_global_zero:
            folders.wait()
            remove(_folder_of(filepath))

    def _find_figure(self, trainer: Trainer) -> None:
        if self.monitor is not None:
            return
        module: Any = trainer.lightning_module
        figure, mode = module.validation_monitor
        if figure not in trainer.callback_metrics:
            rank_zero_warn(
                f"{self.filename}.ckpt holds the newest weights, since {figure} is not logged; set "
                "best_checkpoint.monitor"
            )
            return
        self.monitor, self.mode = figure, self._given["mode"] or mode
        if figure != "val/ras":
            log.info("%s.ckpt: the best is that of %s", self.filename, figure)


class LastCheckpoint(ModelCheckpoint):
    """Where a validation follows the step, saves after it: a resumed run has not lost it.

    Lightning saves between the two, and a run that goes on from there skips that validation, so
    that its curve lacks a point. Loggers are flushed beforehand, for what they hold in memory is
    lost with a process that is killed.

    A run that a signal asks to stop is saved at the end of its step, on all ranks together; then
    `StopBetweenSteps` ends it.

    Args:
        dirpath: Folder; null = that of the run.
        export_every: Steps after which the weights are also written as a Hugging Face folder,
            ``step_200`` beside ``last.ckpt``, as ``grao export`` writes it, and those of the last
            step; all of them stay. null = none.
        settings: The settings of Lightning's ``ModelCheckpoint``.

    Attributes:
        written: The checkpoint that this process wrote last.
        stop: Number of the signal that asked any rank to stop, once the step is saved; 0: none.
    """

    written: Path | None = None
    stop = 0
    _validating = False
    _cut_off = False
    _exported_step = 0

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        export_every: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(dirpath=dirpath, **settings)
        self.export_every = export_every

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Let signals wait for the end of a step."""
        super().on_train_start(trainer, pl_module)
        stopping.listen_again()  # Lightning has put its own handler there
        stopping.before_dying(lambda: kill_launched(trainer))
        stopping.defer(True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is due or the run shall stop, unless a validation follows."""
        if not _validation_follows(trainer):
            self._save_if_due(trainer, pl_module)
        if self.export_every and trainer.global_step % self.export_every == 0:
            self._export(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Let a signal end a validation that is no part of a run at once."""
        super().on_validation_start(trainer, pl_module)
        self._validating = trainer.state.fn == "fit" and not trainer.sanity_checking
        if not self._validating:
            stopping.listen_again()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop a run that is asked to; several ranks go on, as their batches may differ in number.

        Raises:
            Stopped: After this batch.
        """
        if self._validating and trainer.world_size == 1 and stopping.asked():
            raise Stopped(stopping.asked(), in_order=True)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save what was put off."""
        if self._validating:
            self._validating = False
            self._save_if_due(trainer, pl_module)
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the last step, on which no interval need fall, and let signals end what follows.

        Raises:
            Stopped: During the last step.
        """
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step and self.dirpath is not None:
            self._save(trainer)
        if self.export_every:
            self._export(trainer)
        stopping.defer(False)
        self.stop = _asked_of_any(trainer)
        if self.stop:
            raise Stopped(self.stop, in_order=True)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Wait until the newest folder lies there."""
        folders.wait()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save, unless a signal came in the middle of something, or the run is kept already."""
        stopping.defer(False)
        if trainer.state.fn != "fit":
            return
        self._cut_off = self._validating
        if not isinstance(exception, Stopped):
            if not self._should_save_on_exception(trainer) or _all_can_save(trainer):
                super().on_exception(trainer, pl_module, exception)
        elif exception.in_order and self._should_save_on_exception(trainer):
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Let a run that was cut off in a validation begin it anew, or half of it would count."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._cut_off:
            progress = checkpoint["loops"]["fit_loop"][_VALIDATION]
            progress["total"] |= _BEGUN
            progress["current"] |= _BEGUN

    def _save_if_due(self, trainer: Trainer, pl_module: Any) -> None:
        if self._is_due(trainer):
            _flush(trainer)
            super().on_train_batch_end(trainer, pl_module, None, None, 0)
        self.stop = _asked_of_any(trainer)
        if self.stop and self._should_save_on_exception(trainer):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        _flush(trainer)
        name = self.format_checkpoint_name(self._monitor_candidates(trainer))
        self._save_checkpoint(trainer, name)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.written = Path(filepath)

    def _export(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self._exported_step or self.dirpath is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._exported_step = step
        folders.write_behind(trainer, Path(self.dirpath) / f"step_{step}")

    def _is_due(self, trainer: Trainer) -> bool:
        every, step = self._every_n_train_steps, trainer.global_step
        return bool(every and step and step % every == 0)


class StopBetweenSteps(Callback):
    """Ends a run that was asked to stop before its next step begins; the first of all callbacks.

    Not when the last step is saved: Lightning logs its figures only after that.

    Args:
        last: Of the run.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self._last = last

    def on_train_batch_start(self, *_: Any) -> None:
        """Stop where it is asked for.

        Raises:
            Stopped: The step before has been saved.
        """
        if self._last.stop:
            raise Stopped(self._last.stop, in_order=True)


def kill_launched(trainer: Trainer) -> None:
    """Kill the ranks that this process has launched; they may wait for it in vain."""
    kill = getattr(trainer.strategy.launcher, "kill", None)
    if kill is not None:
        kill(signal.SIGKILL)


def _asked_of_any(trainer: Trainer) -> int:
    """Return the number of the signal that asked any rank to stop, or 0."""
    if trainer.world_size == 1 or not stopping.listens():
        return stopping.asked()
    told = torch.tensor(float(stopping.asked()), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(told, reduce_op="max"))


def _all_can_save(trainer: Trainer) -> bool:
    """Return whether all ranks that a checkpoint needs have come to save it."""
    strategy = trainer.strategy
    if not isinstance(strategy, ShardedStrategy) or strategy.is_joined(trainer.global_step):
        return True
    log.warning(
        "rank %s failed alone, and no rank can save without the others: the newest checkpoint is "
        "the one before",
        trainer.global_rank,
    )
    return False


def _folder_of(filepath: str) -> Path:
    return Path(filepath).with_suffix("")


def _better(monitor: str | None) -> Literal["max", "min"]:
    figure = figure_of(monitor or "")
    if figure is not None:
        return "min" if figure.better == "lower" else "max"
    name = (monitor or "").removesuffix("_low").removesuffix("_high")
    return "min" if name.endswith(("loss", "error")) else "max"


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
