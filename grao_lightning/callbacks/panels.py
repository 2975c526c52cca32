"""TensorBoard beyond scalars: the page of a method's charts, its settings, completions to read."""

import html
import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from grao_lightning.batch import PromptBatch
from grao_lightning.callbacks.clipping import ReferenceAwareClipping
from grao_lightning.callbacks.sampling import GroupSampling
from grao_lightning.callbacks.scoring import GroupScoring
from grao_lightning.callbacks.summary import RunSummary
from grao_lightning.data.encoding import batch_as_read
from grao_lightning.display.vocabulary import VALIDATION
from grao_lightning.metrics.pairs import ReliabilityBin
from grao_lightning.randomness import run_seed

# What is charted of validation with its interval, by tag without its ``val/``.
_WITH_INTERVAL = (
    *("ras", "nag", "reward", "length", "cut_off", "accuracy", "loss", "margin"),
    *("rewards/accuracies", "rewards/margins"),
)
# The columns that the table of hyper-parameters shows unless the user chooses others.
_FIRST_SETTINGS = (
    *("method", "model.learning_rate", "data.prompts_per_step"),
    *("sampling.group_size", "sampling.temperature"),
)
# What training on groups has whatever the method; lengths say what a reward was earned by.
_OF_GROUPS = {
    "reward": ["train/reward$", "train/reference_answer/reward"],
    "length": [f"train/completions/{end}_length" for end in ("mean", "min", "max")],
    "cut off": ["train/completions/cut_off"],
    "KL": ["train/kl$"],
    "entropy": ["train/entropy"],
    "dead groups": ["train/dead_groups"],
}


class TensorBoardPanels(Callback):
    """Writes the custom-scalar page, the table of hyper-parameters, and text panels.

    Those show prompts with their completions, or, for a reward model, its reliability curve.

    Args:
        every_n_steps: Steps between two text panels in training; 0 = none.
        num_prompts: Prompts in a panel.
        special_tokens: Show texts as token ids read, special tokens included.
    """

    def __init__(
        self, every_n_steps: int = 25, num_prompts: int = 2, special_tokens: bool = False
    ) -> None:
        self.every_n_steps = every_n_steps
        self.num_prompts = num_prompts
        self.special_tokens = special_tokens
        self._end: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the layout of the custom-scalar page, and the run's settings."""
        writer = _writer(trainer)
        if writer is not None:
            writer.add_custom_scalars(layout(pl_module))
            figure, _ = pl_module.validation_monitor
            # The table reads the figure's own curve: a value of ours would be a point in it.
            settings = run_settings(trainer, pl_module)
            experiment, start, self._end = hparams(settings, {figure: math.nan})
            _put_first(experiment, _FIRST_SETTINGS)
            for part in (experiment, start):
                writer.file_writer.add_summary(part)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Say in the table of hyper-parameters that the run came to its end."""
        writer = _writer(trainer)
        if writer is not None and self._end is not None:
            writer.file_writer.add_summary(self._end)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, *_: Any
    ) -> None:
        """Write the groups of this step."""
        due = self.every_n_steps and (trainer.global_step - 1) % self.every_n_steps == 0
        self._write(trainer, pl_module, "train/completions", batch, bool(due))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        *_: Any,
    ) -> None:
        """Write the first validation prompts with the answers of the policy and of the base."""
        self._write(trainer, pl_module, "val/completions", batch, batch_idx == 0)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write a reward model's reliability curve."""
        writer = _writer(trainer)
        has_curve = hasattr(pl_module, "reliability")
        if writer is not None and has_curve and not trainer.sanity_checking:
            table = reliability_table(pl_module.reliability)
            writer.add_text("val/reliability", table, trainer.global_step)

    def _write(
        self, trainer: Trainer, pl_module: Any, tag: str, batch: PromptBatch, due: bool
    ) -> None:
        writer = _writer(trainer)
        if writer is not None and due and batch.completions is not None:
            if self.special_tokens:
                batch = batch_as_read(batch, pl_module.tokenizer)
            writer.add_text(tag, completion_table(batch, self.num_prompts), trainer.global_step)


def layout(pl_module: Any) -> dict[str, dict[str, list[Any]]]:
    """Return the custom-scalar page: what validation measures, then what the method has.

    Args:
        pl_module: A `StepModule`.
    """
    names = {name for metrics in pl_module.metric_sets for name in metrics.names}
    validation: dict[str, list[Any]] = {}
    for name in _WITH_INTERVAL:
        if name in names:
            ends = [f"val_bounds/{name}_{end}" for end in ("low", "high")]
            validation[VALIDATION[name].label] = ["Margin", [f"val/{name}", *ends]]
    own = {**pl_module.charts, **(_OF_GROUPS if pl_module.trains_on_groups else {})}
    if "distinct" in names:
        own["distinct"] = ["val/distinct", "val/reference_answer_distinct"]
    method = type(pl_module).__name__.removesuffix("Module")
    return {
        # TensorBoard shows charts that have intervals from the last to the first.
        "validation": dict(reversed(validation.items())),
        method: {title: ["Multiline", tags] for title, tags in own.items()},
    }


def run_settings(trainer: Trainer, pl_module: Any) -> dict[str, int | float | str]:
    """Return all settings that a run's result hangs on, by dotted name.

    Args:
        trainer: With its callbacks; `RunSummary` holds the command line's whole configuration.
        pl_module: A `StepModule`.
    """
    summaries = [part for part in trainer.callbacks if isinstance(part, RunSummary)]  # type: ignore[attr-defined]
    config = summaries[0].config if summaries else {}
    chosen: dict[str, Any] = {
        "method": type(pl_module).__name__,
        "model": dict(pl_module.hparams),
        "seed": run_seed(),
        "precision": trainer.precision,
        "max_steps": trainer.max_steps,
        "world_size": trainer.world_size,
    }
    for name, part in _parts(trainer, pl_module):
        chosen[name] = config.get(name) or _public(part)
    return _flat("", chosen)


def completion_table(batch: PromptBatch, num_prompts: int) -> str:
    """Return Markdown: for each of the first prompts its reference answer and its completions.

    Args:
        batch: Sampled and scored.
        num_prompts: At most so many prompts.
    """
    assert batch.completions is not None and batch.rewards is not None
    group_size = batch.completions.group_size
    parts = []
    for number in range(min(num_prompts, len(batch))):
        lines = ["| | reward | advantage | text |", "|---|---|---|---|"]
        rewards = batch.rewards[number]
        advantages = rewards * torch.nan if batch.advantages is None else batch.advantages[number]
        texts = batch.completions.texts[number * group_size : (number + 1) * group_size]
        answers = []
        if batch.has_reference_answers:
            answers = [("reference answer", -1, batch.reference_answers[number])]
        answers += [(f"completion {at + 1}", at, text) for at, text in enumerate(texts)]
        for label, at, text in answers:
            advantage = "" if advantages[at].isnan() else f"{advantages[at]:+.2f}"
            lines.append(f"| {label} | {rewards[at]:.3f} | {advantage} | {_cell(text)} |")
        if batch.base_completions is not None and batch.base_rewards is not None:
            reward, text = batch.base_rewards[number], batch.base_completions.texts[number]
            lines.append(f"| untrained base | {reward:.3f} | | {_cell(text)} |")
        parts.append(f"**prompt** {_cell(batch.prompts[number])}\n\n" + "\n".join(lines))
    return "\n\n---\n\n".join(parts)


def reliability_table(curve: Sequence[ReliabilityBin]) -> str:
    """Return Markdown: how often the model is right where it is how sure.

    Args:
        curve: Pairs by the confidence of the model.
    """
    lines = ["| confidence | right | 95 % interval | pairs |", "|---|---|---|---|"]
    for part in curve:
        right, low, high = (f"{figure:.1%}" for figure in part.accuracy)
        lines.append(f"| {part.confidence:.1%} | {right} | {low} to {high} | {part.number} |")
    return "\n".join(lines)


def _put_first(experiment: Any, names: Sequence[str]) -> None:
    """Mark settings in TensorBoard's record of an experiment: it sorts by this, then by name."""
    metadata = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(metadata.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in names
    metadata.content = content.SerializeToString()


def _parts(trainer: Trainer, pl_module: Any) -> list[tuple[str, Any]]:
    """Return what takes part in a run beside the module, under the names of its settings."""
    kinds: dict[str, type[Callback]] = {"clipping": ReferenceAwareClipping}
    if pl_module.samples:
        kinds |= {"sampling": GroupSampling, "scoring": GroupScoring}
    found = [("data", getattr(trainer, "datamodule", None))]
    for name, kind in kinds.items():
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found += [(name, part) for part in callbacks if isinstance(part, kind)]
    return [(name, part) for name, part in found if part is not None]


def _public(part: Any) -> dict[str, Any]:
    """Return the attributes that a part keeps its settings in."""
    return {name: value for name, value in vars(part).items() if not name.startswith("_")}


def _flat(prefix: str, value: Any) -> dict[str, int | float | str]:
    """Return settings by dotted name; what TensorBoard's table has no type for becomes text."""
    if isinstance(value, dict):
        inner = [
            _flat(f"{prefix}.{name}" if prefix else name, part) for name, part in value.items()
        ]
        return {name: part for settings in inner for name, part in settings.items()}
    plain = isinstance(value, int | float | str) and not isinstance(value, bool)
    return {prefix: value if plain else str(value)}


def _cell(text: str) -> str:
    """Return a text as one Markdown table cell."""
    return html.escape(text.strip()).replace("|", "&#124;").replace("\n", "<br>")


def _writer(trainer: Trainer) -> Any:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            return logger.experiment
    return None
