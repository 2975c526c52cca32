"""``grao fit`` and ``grao validate``: LightningCLI with the three stages in their order."""

import logging
import warnings
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from grao_lightning.callbacks.clipping import ReferenceAwareClipping
from grao_lightning.callbacks.console import StepProgressBar
from grao_lightning.callbacks.panels import TensorBoardPanels
from grao_lightning.callbacks.sampling import GroupSampling
from grao_lightning.callbacks.scoring import GroupScoring
from grao_lightning.callbacks.summary import RunSummary
from grao_lightning.checks import check_run
from grao_lightning.data.datamodule import PromptDataModule
from grao_lightning.faults import UserError
from grao_lightning.modules.base import AlignmentModule

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


class GRAOCommandLine(LightningCLI):
    """One namespace a concern: model, data, sampling, scoring, clipping, checkpoint, trainer."""

    def __init__(self) -> None:
        super().__init__(
            AlignmentModule,
            PromptDataModule,
            subclass_mode_model=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "max_epochs": -1,
                "val_check_interval": 50,
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "use_distributed_sampler": False,
                "enable_model_summary": False,
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": "runs", "name": None},
                },
                "callbacks": [StepProgressBar(), TensorBoardPanels(), RunSummary()],
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the trainer methods offered, each with its arguments that are not options."""
        everything = LightningCLI.subcommands()
        return {name: everything[name] for name in ("fit", "validate")}

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
        parser.add_lightning_class_args(ModelCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(ModelCheckpoint, "last_checkpoint")
        parser.set_defaults(
            {
                "model": {"class_path": "grao_lightning.GRAOModule"},
                # Held out, never the training reward, which a policy learns to please.
                "best_checkpoint.monitor": "val/ras",
                "best_checkpoint.mode": "max",
                "best_checkpoint.filename": "best",
                "best_checkpoint.enable_version_counter": False,
                # Written as the run goes, when it is interrupted, and by `after_fit`.
                "last_checkpoint.every_n_train_steps": 50,
                "last_checkpoint.filename": "last",
                "last_checkpoint.save_on_exception": True,
                "last_checkpoint.enable_version_counter": False,
            }
        )
        parser.link_arguments("model.init_args.policy", "data.tokenizer")

    def _parse_ckpt_path(self) -> None:
        """Leave the command line in charge: LightningCLI would let a checkpoint's settings win."""

    def instantiate_classes(self) -> None:
        """Make the parts, then tell every fault before a model loads."""
        super().instantiate_classes()
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        self._summary = next(part for part in callbacks if isinstance(part, RunSummary))
        self._summary.config = yaml.safe_load(
            self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        )
        check_run(self.trainer, self.model, self.datamodule)
        checkpoint = self.config_init[self.subcommand].get("ckpt_path")
        if (
            checkpoint
            and checkpoint not in ("last", "best", "hpc")
            and not Path(checkpoint).exists()
        ):
            raise UserError(f"ckpt_path: no such file: {checkpoint}")

    def after_fit(self) -> None:
        """Keep the last step's weights, and validate it where ``val_check_interval`` did not."""
        last = self.trainer.checkpoint_callbacks[-1]
        assert isinstance(last, ModelCheckpoint) and last.dirpath is not None
        self.trainer.save_checkpoint(Path(last.dirpath) / "last.ckpt")
        if not self._summary.is_current(self.trainer):
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)


def run(arguments: Any = None) -> GRAOCommandLine:
    """Run ``fit`` or ``validate`` with the arguments of the process.

    Raises:
        UserError: A setting, a file or the combination of parts is wrong.
    """
    for message in _QUIET:
        warnings.filterwarnings("ignore", message=message)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets", "transformers", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    advertisements = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advertisements.addFilter(lambda record: "Tip: For seamless" not in record.getMessage())
    try:
        return GRAOCommandLine()
    except MisconfigurationException as error:
        raise UserError(str(error)) from None
