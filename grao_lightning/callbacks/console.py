"""What a user reads while it runs: a bar on a terminal, lines in a log, one line a validation."""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from grao_lightning.display.vocabulary import TRAINING, VALIDATION, Figure
from grao_lightning.metrics.outcomes import Estimate
from grao_lightning.sampling.draw import Progress

# What a line shows of a step, as far as it has room; by tag without its ``train/``.
_OF_STEP = (
    *("reward", "ras", "accuracy", "rewards/accuracies", "margin", "rewards/margins"),
    *("completions/mean_length", "completions/cut_off", "dead_groups", "kl", "entropy"),
)
# What it shows of a validation, without ``val/``; the first has its interval.
_OF_VALIDATION = (
    *("ras", "nag", "length", "distinct", "accuracy", "loss", "rewards/accuracies"),
    *("margin", "rewards/margins", "reward"),
)

# The figures of a validation that come before the interval of its first.
_MUST_BE_SEEN = ("ras", "nag", "length", "distinct", "accuracy", "loss")

#: Longest line: a terminal of 80 columns wraps what fills it.
WIDTH = 79
# What the bar itself takes of a line, a few blocks of its own included.
_BAR_WIDTH = 47

# Between two looks at how far sampling is: shorter waits need none, and drawing takes time.
_SECONDS_BETWEEN = 0.2


class StepProgressBar(TQDMProgressBar):
    """One bar from the first step to ``max_steps`` on a terminal; elsewhere a line now and then.

    A line tells of every validation in either case.

    Args:
        every_n_seconds: Where no bar is drawn, print a step's line when so many seconds have passed
            since the last one, and those of the first and the last step; 0 = every step.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

    def __init__(self, every_n_seconds: float = 5.0) -> None:
        super().__init__()
        self.every_n_seconds = every_n_seconds
        self._next_line = 0.0

    @property
    def is_disabled(self) -> bool:
        """Return whether no bar is drawn: in a log file it would be noise."""
        return super().is_disabled or not sys.stdout.isatty()

    def init_validation_tqdm(self) -> Tqdm:
        """Return a bar that takes the training bar's place while it is there."""
        if self._train_progress_bar is not None:
            self.train_progress_bar.clear()
        return Tqdm(
            desc="Validation",
            position=2 * self.process_position,
            disable=self.is_disabled,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Count steps: there are no epochs, the prompts are endless."""
        self.train_progress_bar.reset(total=trainer.max_steps)
        self.train_progress_bar.initial = trainer.global_step
        self.train_progress_bar.set_description("Training")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Advance the bar, or print the step's line where it is due."""
        step, values = trainer.global_step, pl_module.step_values
        if not self.is_disabled:
            room = shutil.get_terminal_size().columns - _BAR_WIDTH
            self.train_progress_bar.n = step
            self.train_progress_bar.set_postfix_str(_fitting(_shown_of_step(values), room))
            return
        due = time.monotonic() >= self._next_line or step == trainer.max_steps
        if due and trainer.is_global_zero:
            self.print(step_line(step, trainer.max_steps, values))
            self._next_line = time.monotonic() + self.every_n_seconds

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last step's figures behind the bar."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *batch: Any, **options: Any
    ) -> None:
        """Begin the bar of a validation; there is one loader, and nobody asks for its number."""
        super().on_validation_batch_start(trainer, pl_module, *batch, **options)
        if not trainer.sanity_checking:
            self.val_progress_bar.set_description("Validation")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print what a validation in training found; `RunSummary` prints the others' table."""
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero:
            return
        step = trainer.global_step
        self.print(validation_line(step, trainer.max_steps, pl_module.estimates))

    @contextmanager
    def sampling(self, num_rows: int, longest: int) -> Iterator[Progress | None]:
        """Give what shows, in place of the bar's description, how far sampling is; then clear it.

        Args:
            num_rows: Completions to be sampled.
            longest: Most tokens of a completion.
        """
        bar = self.train_progress_bar if self.trainer.training else self.val_progress_bar
        if bar.disable:
            yield None
            return
        resting, figures = bar.desc, bar.postfix
        drawn_at = time.monotonic()

        def show(tokens: int, running: int) -> None:
            nonlocal drawn_at
            if time.monotonic() - drawn_at >= _SECONDS_BETWEEN:
                bar.postfix = None  # both have no room in one line
                bar.set_description(
                    f"Sampling {tokens}/{longest} tokens, {running} of {num_rows} rows left"
                )
                drawn_at = time.monotonic()

        try:
            yield show
        finally:
            if bar.desc != resting:
                bar.postfix = figures
                bar.set_description_str(resting)

    def print(self, *lines: Any, sep: str = " ", **_: Any) -> None:
        """Print above the bar, or plainly where no bar is drawn."""
        if self.is_disabled:
            print(*lines, sep=sep, flush=True)
        else:
            self.train_progress_bar.write(sep.join(map(str, lines)))


def step_line(step: int, max_steps: int, values: Mapping[str, float]) -> str:
    """Return the line of one step, of at most `WIDTH` characters.

    Args:
        step: Steps taken so far.
        max_steps: Of the run.
        values: What the step measured, by tag without its ``train/``.
    """
    seconds = f"  {values.get('step_time', 0.0):.2f} s"
    room = WIDTH - len(seconds)
    return _fitting([_head("step", step, max_steps), *_shown_of_step(values)], room) + seconds


def validation_line(step: int, max_steps: int, estimates: Mapping[str, Estimate]) -> str:
    """Return the line of one validation, of at most `WIDTH` characters.

    Args:
        step: Steps taken so far.
        max_steps: Of the run.
        estimates: What it measured, by tag without its ``val/``.
    """
    names = [name for name in _OF_VALIDATION if name in estimates]
    parts = [_part(VALIDATION[name], estimates[name].value) for name in names]
    head = _head("val", step, max_steps)
    for name in names[:1]:  # its interval, unless that takes the room of what must be seen
        _, low, high = map(VALIDATION[name].shown, estimates[name])
        line = _fitting([head, f"{parts[0]} [{low}, {high}]", *parts[1:]], WIDTH)
        shown = dict(zip(names, parts, strict=True))
        if all(part in line for name, part in shown.items() if name in _MUST_BE_SEEN):
            return line
    return _fitting([head, *parts], WIDTH)


def _shown_of_step(values: Mapping[str, float]) -> list[str]:
    # A loss made of advantages says little: where there are rewards they are shown instead.
    names = [name for name in _OF_STEP if name in values]
    if "reward" not in values and "loss" in values:
        names.insert(0, "loss")
    return [_part(TRAINING[name], values[name]) for name in names]


def _part(figure: Figure, value: float) -> str:
    return f"{figure.label} {figure.shown(value)}{'%' if figure.unit == 'share' else ''}"


def _head(what: str, step: int, max_steps: int) -> str:
    return f"{what:4} {step:>{len(str(max_steps))}}/{max_steps}"


def _fitting(parts: Iterable[str], room: int) -> str:
    """Return the parts in a line, without those for which there is no room."""
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        if len(longer) <= room:
            line = longer
    return line
