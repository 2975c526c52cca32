"""What a run leaves: a table on the console and ``summary.json`` in its folder."""

import json
import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from grao_lightning.callbacks.scoring import GroupScoring
from grao_lightning.display.tables import without_nan
from grao_lightning.display.vocabulary import VALIDATION, Figure
from grao_lightning.files import write_whole
from grao_lightning.metrics.outcomes import Estimate
from grao_lightning.metrics.pairs import ReliabilityBin
from grao_lightning.randomness import run_seed

# The tables' rows, by tag without its ``val/``.
_ROWS = (
    *("ras", "nag", "reward", "length", "cut_off", "distinct"),
    *("loss", "rewards/accuracies", "rewards/margins"),
)
_PAIR_ROWS = (
    *("accuracy", "length_alone_accuracy", "loss", "margin"),
    *("calibration_error", "length_correlation"),
)


class RunSummary(Callback):
    """Prints the table after ``fit`` and ``validate`` and keeps ``summary.json`` up to date."""

    def __init__(self) -> None:
        #: The run's configuration, set by the CLI.
        self.config: dict[str, Any] = {}
        self._phase_seconds: dict[str, list[float]] = {}
        self._validated_step: int | None = None
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Ask for the run's folder, once and on all ranks: Lightning broadcasts it.

        Asked for by rank 0 alone it would hang; asked for as the last thing of a run, it leaves
        gloo's thread with a tensor to free while Python shuts down, which aborts the process.
        """
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Collect the wall time of each phase."""
        for name, value in pl_module.step_values.items():
            if name == "step_time" or (name.startswith("perf/") and name.endswith("_time")):
                phase = name.removeprefix("perf/").removesuffix("_time")
                self._phase_seconds.setdefault(phase, []).append(value)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep the newest figures; print them where validation is all there is."""
        if trainer.sanity_checking:
            return
        self._validated_step = trainer.global_step
        self._write(trainer, pl_module)
        if trainer.state.fn == "validate":
            self._print(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the table if the last step was validated; the CLI validates it otherwise."""
        self._write(trainer, pl_module)
        if self.is_current(trainer):
            self._print(trainer, pl_module)

    def is_current(self, trainer: Trainer) -> bool:
        """Return whether the newest figures are those of the last step."""
        return self._validated_step == trainer.global_step

    def _print(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            if hasattr(pl_module, "reliability"):
                print(pair_table(pl_module.estimates, pl_module.reliability))
            else:
                print(summary_table(pl_module.estimates, pl_module.ties_as, pl_module.gain))
            print(f"written: {self._folder}", flush=True)

    def _write(self, trainer: Trainer, pl_module: Any) -> None:
        peak = _peak_memory()  # of this process; ranks differ little
        path = self._folder / "summary.json"
        if not trainer.is_global_zero:
            return
        own = _of_scores(trainer, pl_module) if pl_module.samples else _of_pairs(pl_module)
        summary = {
            **{name: value._asdict() for name, value in pl_module.estimates.items()},
            **own,
            "validated_step": self._validated_step,
            "steps": trainer.global_step,
            "sampled_tokens": pl_module.num_sampled_tokens,
            "seconds_per_step": {
                name: sum(values) / len(values) for name, values in self._phase_seconds.items()
            },
            "peak_memory_bytes": peak,
            "seed": run_seed(),
            "world_size": trainer.world_size,
            "precision": trainer.precision,
            "config": self.config,
        }
        write_whole(path, json.dumps(without_nan(summary), indent=2, default=str) + "\n")


def _of_scores(trainer: Trainer, pl_module: Any) -> dict[str, Any]:
    scorers = [c for c in trainer.callbacks if isinstance(c, GroupScoring)]  # type: ignore[attr-defined]
    held_out = scorers[0].held_out_accuracy
    return {
        "ties_as": pl_module.ties_as,
        "nag_kind": pl_module.gain,
        "held_out_accuracy": {name: value._asdict() for name, value in held_out.items()},
    }


def _of_pairs(pl_module: Any) -> dict[str, Any]:
    if not hasattr(pl_module, "reliability"):
        return {}
    curve = [
        {"confidence": part.confidence, **part.accuracy._asdict(), "number": part.number}
        for part in pl_module.reliability
    ]
    return {"reliability": curve}


def summary_table(estimates: dict[str, Estimate], ties_as: str, gain: str) -> str:
    """Return the table of validation figures with their 95 % intervals.

    Args:
        estimates: By metric; those of the untrained base have the prefix ``base_``.
        ties_as: What a tie counts as in RAS.
        gain: Which NAG.
    """
    header = f"{'':16} {'policy':>8}  {'95 % interval':<18} {'base':>8}  {'reference answer':>16}"
    lines = ["", header, "-" * len(header)]
    for name in _ROWS:
        if name not in estimates:
            continue
        figure = VALIDATION[name]
        value, interval = _shown(figure, estimates[name])
        base, answer = (
            figure.shown(estimates[other].value) if other in estimates else ""
            for other in (f"base_{name}", f"reference_answer_{name}")
        )
        line = f"{figure.heading:16} {value:>8}  {interval:<18} {base:>8}  {answer:>16}"
        lines.append(line.rstrip())
    if "ras" in estimates:
        lines.append(f"RAS: wins over the reference answer, ties count as {ties_as}.")
    elif "reward" in estimates:
        lines.append("No RAS: the data has no reference answers.")
    if "nag" in estimates:
        meaning = {"wins": "share of wins over", "net": "wins minus losses against"}
        lines.append(f"NAG: {meaning[gain]} the untrained base.")
    return "\n".join([*lines, ""])


def pair_table(estimates: dict[str, Estimate], curve: Sequence[ReliabilityBin]) -> str:
    """Return the table of a reward model's figures on held-out pairs, and its reliability curve.

    Args:
        estimates: By metric.
        curve: Pairs by the confidence of the model.
    """
    header = f"{'held-out pairs':24} {'value':>8}  {'95 % interval':<18}"
    lines = ["", header, "-" * len(header)]
    for name in _PAIR_ROWS:
        if name in estimates:
            value, interval = _shown(VALIDATION[name], estimates[name])
            lines.append(f"{VALIDATION[name].heading:24} {value:>8}  {interval:<18}".rstrip())
    lines += ["", f"{'confidence %':24} {'right %':>8}  {'95 % interval':<18} {'pairs':>6}"]
    for part in curve:
        right, low, high = (f"{100 * figure:.1f}" for figure in part.accuracy)
        interval, confidence = f"[{low}, {high}]", f"{100 * part.confidence:.1f}"
        lines.append(f"{confidence:24} {right:>8}  {interval:<18} {part.number:>6}")
    lines += [
        "Accuracy: the chosen answer scores higher, ties count as half. Confidence: sigmoid of the",
        "difference in score. Length correlation: Spearman's, of differences of score and tokens.",
    ]
    return "\n".join([*lines, ""])


def _shown(figure: Figure, estimate: Estimate) -> tuple[str, str]:
    """Return a value and its interval as text, the latter empty where there is none."""
    value, low, high = map(figure.shown, estimate)
    return value, "" if math.isnan(estimate.low) else f"[{low}, {high}]"


def _peak_memory() -> int:
    """Return the largest memory in bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
