"""The Trainer of a run, for the command line and for Python: the same settings and callbacks."""

import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from grao_lightning.callbacks.answers import ValidationAnswers
from grao_lightning.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from grao_lightning.callbacks.clipping import ReferenceAwareClipping
from grao_lightning.callbacks.console import StepProgressBar
from grao_lightning.callbacks.last_step import ValidateLastStep
from grao_lightning.callbacks.panels import TensorBoardPanels
from grao_lightning.callbacks.sampling import GroupSampling
from grao_lightning.callbacks.scoring import GroupScoring
from grao_lightning.callbacks.summary import RunSummary
from grao_lightning.display.logs import drop_needless_notes, show_notes
from grao_lightning.faults import refuse_unknown

#: What is set unless the user sets it.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "val_check_interval": 50,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
LOGGER_DEFAULTS: dict[str, Any] = {"save_dir": "runs", "name": None, "default_hp_metric": False}
LAST_CHECKPOINT_DEFAULTS: dict[str, Any] = {
    # Written as the run goes, when it is interrupted, and at its end.
    "every_n_train_steps": 50,
    "filename": "last",
    "save_on_exception": True,
    "enable_version_counter": False,
}
_QUIET = (
    # Manual optimisation: the checkpoint is taken after the step, whatever the note says.
    ".*pre-optimization.*",
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*exists and is not empty.*",
    ".*The dirpath has changed.*",
    ".*no pre-optimization state was saved.*",
    # The reference model is frozen and evaluates: that is what it is for.
    ".*module\\(s\\) in eval mode at the start of training.*",
)


def standard_callbacks() -> list[Callback]:
    """Return what every run shows and keeps, besides its stages and checkpoints."""
    return [
        StepProgressBar(),
        TensorBoardPanels(),
        RunSummary(),
        ValidationAnswers(),
        ValidateLastStep(),
    ]


def quiet_notes() -> None:
    """Silence Lightning's notes that do not hold of such runs."""
    for message in _QUIET:
        warnings.filterwarnings("ignore", message=message)


def make_trainer(
    callbacks: Sequence[Callback] = (), *, max_steps: int, **trainer_settings: Any
) -> Trainer:
    """Return a Trainer as ``grao fit`` makes it, for ``trainer.fit(module, datamodule=data)``.

    It validates every 50 steps and after the last one, keeps ``best.ckpt`` (see
    `BestCheckpoint`) and ``last.ckpt``, logs to TensorBoard under ``runs/`` and leaves
    ``summary.json`` and ``answers.jsonl`` beside: see ``trainer.log_dir``.

    Args:
        callbacks: The stages whose settings are not the defaults (`GroupSampling`, `GroupScoring`,
            `ReferenceAwareClipping`, in any order) and your own callbacks. One of a class that the
            command line has takes the place of that one: ``ModelCheckpoint(monitor="val/reward",
            mode="max", filename="best")`` for instance that of ``best.ckpt``.
        max_steps: Of the run.
        trainer_settings: Of `lightning.Trainer`, such as ``val_check_interval``, ``devices``,
            ``precision`` or ``logger``; they go before the defaults.

    Raises:
        TypeError: A keyword is none of `lightning.Trainer`'s.
    """
    refuse_unknown("make_trainer", Trainer, trainer_settings)
    quiet_notes()
    drop_needless_notes()
    show_notes()
    settings = {**TRAINER_DEFAULTS, **trainer_settings}
    if settings.get("logger") in (None, True):
        settings["logger"] = TensorBoardLogger(**LOGGER_DEFAULTS)
    standard: list[Callback] = [
        GroupSampling(),
        GroupScoring(),
        ReferenceAwareClipping(),
        *standard_callbacks(),
    ]
    if settings.get("enable_progress_bar") is False:
        standard = [part for part in standard if not isinstance(part, StepProgressBar)]
    if settings.get("enable_checkpointing") is not False:
        standard += [
            BestCheckpoint(),
            LastCheckpoint(**LAST_CHECKPOINT_DEFAULTS),
        ]
    return Trainer(callbacks=_joined(callbacks, standard), max_steps=max_steps, **settings)


def _joined(given: Sequence[Callback], standard: Sequence[Callback]) -> list[Callback]:
    """Return all callbacks, the user's own ones first, each standard one unless it is given."""
    own, chosen = list(given), []
    for part in standard:
        same = [one for one in own if _takes_the_place_of(one, part)]
        own = [one for one in own if one not in same]
        chosen += same or [part]
    return [*own, *chosen]


def _takes_the_place_of(given: Callback, standard: Callback) -> bool:
    # `LastCheckpoint` is a `ModelCheckpoint` too, but not another best one.
    if isinstance(given, LastCheckpoint) != isinstance(standard, LastCheckpoint):
        return False
    kind = ModelCheckpoint if isinstance(standard, BestCheckpoint) else type(standard)
    return isinstance(given, kind)
