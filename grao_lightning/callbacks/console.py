"""What a user reads while it runs: a bar over the steps and one line a step."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from grao_lightning.sampling.draw import Progress

# column: name of the step's value, its format
_COLUMNS = {
    "loss": ("loss", "{:.3f}"),
    "accuracy": ("accuracy", "{:.0%}"),
    "margin": ("margin", "{:+.3f}"),
    "reward": ("reward", "{:.3f}"),
    "ras": ("ras", "{:.0%}"),
    "drift": ("kl", "{:.4f}"),
    "entropy": ("entropy", "{:.2f}"),
    "length": ("completions/mean_length", "{:.1f}"),
    "cut off": ("completions/clipped_ratio", "{:.0%}"),
    "dead groups": ("frac_reward_zero_std", "{:.0%}"),
}

# Between two looks at how far sampling is: shorter waits need none, and drawing takes time.
_SECONDS_BETWEEN = 0.2


class StepProgressBar(TQDMProgressBar):
    """One bar from the first step to ``max_steps``, and under a terminal or not one line a step.

    Args:
        every_n_steps: Print every so many lines; 0 = none.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps

    @property
    def is_disabled(self) -> bool:
        """Return whether no bar is drawn: in a log file it would be noise."""
        return super().is_disabled or not sys.stdout.isatty()

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Count steps: there are no epochs, the prompts are endless."""
        self.train_progress_bar.reset(total=trainer.max_steps)
        self.train_progress_bar.initial = trainer.global_step
        self.train_progress_bar.set_description("Training")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Advance the bar and print the step's line."""
        step = trainer.global_step
        self.train_progress_bar.n = step
        self.train_progress_bar.refresh()
        if self.every_n_steps and step % self.every_n_steps == 0 and trainer.is_global_zero:
            self.print(step_line(step, trainer.max_steps, pl_module.step_values))

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
        resting = bar.desc
        drawn_at = time.monotonic()

        def show(tokens: int, running: int) -> None:
            nonlocal drawn_at
            if time.monotonic() - drawn_at >= _SECONDS_BETWEEN:
                bar.set_description(
                    f"Sampling {tokens}/{longest} tokens, {running} of {num_rows} rows left"
                )
                drawn_at = time.monotonic()

        try:
            yield show
        finally:
            if bar.desc != resting:
                bar.set_description_str(resting)

    def print(self, *lines: Any, sep: str = " ", **_: Any) -> None:
        """Print above the bar, or plainly where no bar is drawn."""
        if self.is_disabled:
            print(*lines, sep=sep, flush=True)
        else:
            self.train_progress_bar.write(sep.join(map(str, lines)))


def step_line(step: int, max_steps: int, values: dict[str, float]) -> str:
    """Return the line of one step.

    Args:
        step: Steps taken so far.
        max_steps: Of the run.
        values: What the step measured, by tag without its ``train/``.
    """
    parts = [f"step {step:>{len(str(max_steps))}}/{max_steps}"]
    for column, (name, form) in _COLUMNS.items():
        if name in values and not (column == "loss" and "reward" in values):
            parts.append(f"{column} {form.format(values[name])}")
    parts.append(f"{values.get('step_time', 0.0):.2f} s/step")
    return " | ".join(parts)
