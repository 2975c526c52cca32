"""``grao fit`` and ``grao validate``: LightningCLI with the three stages in their order."""

import importlib
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import lightning.pytorch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from grao_lightning.callbacks.checkpoint import (
    BestCheckpoint,
    LastCheckpoint,
    StopBetweenSteps,
    kill_launched,
)
from grao_lightning.callbacks.clipping import ReferenceAwareClipping
from grao_lightning.callbacks.console import StepProgressBar
from grao_lightning.callbacks.sampling import GroupSampling
from grao_lightning.callbacks.scoring import GroupScoring
from grao_lightning.callbacks.stopping import Stopped
from grao_lightning.callbacks.summary import RunSummary
from grao_lightning.command.help import chosen_module, help_text, trainer_text
from grao_lightning.command.parse_errors import explain
from grao_lightning.command.resume import resume_advice
from grao_lightning.command.trainer import (
    LAST_CHECKPOINT_DEFAULTS,
    LOGGER_DEFAULTS,
    TRAINER_DEFAULTS,
    quiet_notes,
    standard_callbacks,
)
from grao_lightning.data.datamodule import PromptDataModule
from grao_lightning.display.logs import configure_logging
from grao_lightning.faults import Faults, UserError
from grao_lightning.files import put_back
from grao_lightning.language_model.checkpoints import checkpoint_fault
from grao_lightning.modules import MODULES
from grao_lightning.modules.checks import run_faults
from grao_lightning.modules.step import StepModule
from grao_lightning.rewards.importing import own_modules_note

# Imported all, so that each is known by its short name, as in `--model GRPOModule`.
for _path in MODULES.values():
    importlib.import_module(_path)


class GRAOCommandLine(LightningCLI):
    """One namespace a concern: model, data, sampling, scoring, clipping, checkpoint, trainer.

    Args:
        command: "fit" or "validate".
    """

    def __init__(self, command: str) -> None:
        self._command = command
        super().__init__(
            StepModule,
            PromptDataModule,
            subclass_mode_model=True,
            auto_configure_optimizers=False,  # the module's own settings make its optimiser
            # Errors come to `parse_arguments`; an abbreviation would be a typo that passes.
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                **TRAINER_DEFAULTS,
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": LOGGER_DEFAULTS,
                },
                "callbacks": standard_callbacks(),
            },
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the one command that runs, since a parser takes a while to make."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose saved config says where the user's own modules lie."""
        header = [f"lightning.pytorch=={lightning.pytorch.__version__}", own_modules_note()]
        return super().init_parser(**kwargs, dump_header=header)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and tell what is wrong in one sentence instead of a screenful of usage."""
        if "--help-all" in sys.argv:
            module = chosen_module(sys.argv[2:])
            print(help_text(self._command, module, whole=True), end="")
            print(trainer_text(self._parser(self._command)), end="")
            sys.exit()
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            known = [action.dest for action in self._parser(self._command)._actions]
            raise UserError(explain(str(error), known, sys.argv[1:])) from None

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "validate":
            parser.set_defaults({"verbose": False})  # RunSummary prints a better table
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the three stages, in their order, and the checkpoints."""
        parser.add_lightning_class_args(GroupSampling, "sampling")
        parser.add_lightning_class_args(GroupScoring, "scoring")
        parser.add_lightning_class_args(ReferenceAwareClipping, "clipping")
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.set_defaults(
            {
                "model": {"class_path": "grao_lightning.GRAOModule"},
                **{f"last_checkpoint.{k}": v for k, v in LAST_CHECKPOINT_DEFAULTS.items()},
            }
        )
        parser.link_arguments("model", "data.tokenizer", compute_fn=_tokenizer_source)

    def _parse_ckpt_path(self) -> None:
        """Leave the command line in charge: LightningCLI would let a checkpoint's settings win."""

    def instantiate_classes(self) -> None:
        """Make the parts, then tell every fault before a model loads."""
        self._check_config()
        super().instantiate_classes()
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks.insert(0, StopBetweenSteps(self._last_checkpoint))
        self._summary = next(part for part in callbacks if isinstance(part, RunSummary))
        self._summary.config = yaml.safe_load(
            self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        )
        self.model.trainer = self.trainer  # which knows whether there are rewards
        faults = run_faults(self.trainer, self.model, self.datamodule, self._command)
        faults.add(self._checkpoint_fault(self.config_init[self._command].get("ckpt_path")))
        faults.raise_if_any()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; what it refuses is a fault in its settings."""
        settings = self.config[self._command].trainer
        if not settings.logger:  # such a run has no folder: it would write over ./config.yaml
            self.save_config_callback = None
        if settings.enable_progress_bar is False:
            callbacks = self.trainer_defaults["callbacks"]
            callbacks[:] = [part for part in callbacks if not isinstance(part, StepProgressBar)]
        given = self.config_init[self._command].trainer.callbacks or []
        kinds = {type(part) for part in (given if isinstance(given, list) else [given])}
        callbacks = self.trainer_defaults["callbacks"]  # each gives way to one of the user's
        callbacks[:] = [part for part in callbacks if type(part) not in kinds]
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise UserError(f"trainer: {error}") from None

    def _check_config(self) -> None:
        faults = Faults()
        config = self.config[self._command]
        for section in ("trainer", "data", *self._parser(self._command).callback_keys):
            content = config.get(section)
            if not isinstance(content, Namespace):
                got = "nothing" if content is None else repr(content)
                faults.add(
                    f"{section} must hold settings, each on a line of its own below it; got {got}: "
                    f"add them, or remove {section} for its defaults"
                )
        faults.raise_if_any()
        if config.trainer.enable_checkpointing is False:
            faults.add(
                "trainer.enable_checkpointing must not be false, since a run is there for its last "
                "checkpoint; remove it"
            )
        faults.raise_if_any()

    def _checkpoint_fault(self, source: str | None) -> str | None:
        if source is None:
            return None
        if source == "last" and self._command == "fit":
            folder = self.config[self._command].last_checkpoint.dirpath
            if folder:
                put_back(Path(folder) / "last.ckpt")
                return None
            return (
                "ckpt_path=last looks in last_checkpoint.dirpath, which is not set; set it to a "
                "folder that stays the same from run to run, or give the checkpoint's path"
            )
        return checkpoint_fault("ckpt_path", source, goes_on=self._command == "fit")

    def _run_subcommand(self, subcommand: str) -> None:
        """Run, and when it is stopped say how to go on."""
        try:
            super()._run_subcommand(subcommand)
        except Stopped as stopped:
            if not stopped.in_order:
                kill_launched(self.trainer)
            elif not self.trainer.is_global_zero:
                sys.exit(0)  # Lightning kills all ranks, the first too, when one seems to fail
            if subcommand == "fit":
                written = self._last_checkpoint.written
                stopped.advice = resume_advice(written, sys.argv)
            raise

    @property
    def _last_checkpoint(self) -> LastCheckpoint:
        last = self.trainer.checkpoint_callbacks[-1]
        assert isinstance(last, LastCheckpoint)
        return last

    def after_fit(self) -> None:
        """Validate where no step was left to take, whose end `ValidateLastStep` would have seen."""
        if not self._summary.is_current(self.trainer):
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            for part in callbacks:
                if isinstance(part, BestCheckpoint):
                    part.consider(self.trainer)


def _tokenizer_source(model: dict[str, Any]) -> Any:
    """Return the source of the tokenizer: the trained model's, unless it is set."""
    settings = model["init_args"]
    return settings.get("tokenizer") or settings.get("policy", settings.get("backbone"))


def run(command: str) -> GRAOCommandLine:
    """Run a command with the arguments of the process.

    Args:
        command: "fit" or "validate".

    Raises:
        UserError: A setting, a file or the combination of parts is wrong.
    """
    quiet_notes()
    configure_logging()
    try:
        return GRAOCommandLine(command)
    except MisconfigurationException as error:
        raise UserError(str(error)) from None
