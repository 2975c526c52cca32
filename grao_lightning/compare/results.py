"""Finished runs -> figures by method and case, with their differences and curves."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from grao_lightning.compare.analysis import Crossed, crossed_mean, first_crossing, holm

#: Scalars of TensorBoard that a report draws.
_CURVES = (
    "val/ras",
    "train/num_tokens",
    "train/objective/exploration_share",
    "train/objective/imitation_share",
    "train/objective/regularizer_share",
)
_WORTH_OF_TIE = {"win": 1.0, "half": 0.5, "loss": 0.0}


@dataclass
class FinishedRun:
    """What a run left in its folder."""

    folder: Path

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Return summary.json."""
        content: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return content

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """Return the rows of answers.jsonl, by prompt."""
        with (self.folder / "answers.jsonl").open() as lines:
            return sorted(map(json.loads, lines), key=lambda row: row["index"])

    @property
    def base_ras(self) -> float:
        """Return RAS of the untrained base, NaN where there is none."""
        value = self.summary.get("base_ras", {}).get("value")
        return np.nan if value is None else float(value)

    def column(self, name: str) -> np.ndarray:
        """Return a column of the answers, [P] float; NaN where missing."""
        return np.array([row.get(name) for row in self.answers], dtype=float)

    @property
    def wins(self) -> np.ndarray:
        """Return what each prompt counts in RAS, [P]."""
        outcomes = self.column("outcome")
        return np.where(outcomes == 0, _WORTH_OF_TIE[self.summary["ties_as"]], (outcomes + 1) / 2)

    @cached_property
    def curves(self) -> dict[str, dict[int, float]]:
        """Return scalars by tag and step; after a resume the newer of two values counts."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found: dict[str, dict[int, tuple[float, float]]] = {tag: {} for tag in _CURVES}
        for file in sorted(self.folder.glob("events.out.tfevents.*")):
            events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
            for tag in set(_CURVES) & set(events.Tags()["scalars"]):
                for event in events.Scalars(tag):
                    # What a step measures, it measures before its own update.
                    step = event.step + tag.startswith("train/")
                    known = found[tag].get(step)
                    if known is None or event.wall_time >= known[0]:
                        found[tag][step] = (event.wall_time, event.value)
        return {
            tag: {step: value for step, (_, value) in sorted(points.items())}
            for tag, points in found.items()
        }


@dataclass
class Figures:
    """One method in one case, over all seeds.

    Attributes:
        seeds: How many.
        prompts: How many.
        ras: Share of wins against the reference answer.
        nag: Wins minus losses against the untrained base.
        ras_by_seed: One a seed.
        difference: RAS minus that of the method compared against, by prompt and seed.
        p_adjusted: Of that difference, Holm over the methods of a case.
        steps_to_level: Steps to 90 % of the case's best RAS.
        tokens_to_level: Sampled tokens to it.
    """

    settings: dict[str, Any]
    seeds: int
    prompts: int
    ras: Crossed
    nag: Crossed
    ras_by_seed: list[float]
    base_ras: float
    reward: float
    length: float
    base_length: float
    reference_answer_length: float
    sampled_tokens: float
    seconds_per_step: float
    difference: Crossed | None = None
    p_adjusted: float | None = None
    steps_to_level: float | None = None
    tokens_to_level: float | None = None
    curve: dict[str, list[float]] = field(default_factory=dict)
    shares: dict[str, list[float]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return the figures as JSON takes them."""
        content = asdict(self)
        for name in ("ras", "nag", "difference"):
            value = getattr(self, name)
            content[name] = None if value is None else value._asdict()
        return content


def figures_of(runs: Sequence[FinishedRun], settings: dict[str, Any]) -> Figures:
    """Return what the seeds of one method in one case come to.

    Raises:
        ValueError: The runs were validated on different prompts.
    """
    if len({tuple(row["index"] for row in run.answers) for run in runs}) > 1:
        raise ValueError(f"runs of different validation prompts: {[run.folder for run in runs]}")

    def mean(name: str) -> float:
        values = np.stack([run.column(name) for run in runs])
        present = values[~np.isnan(values)]
        return float(present.mean()) if len(present) else np.nan

    wins = np.stack([run.wins for run in runs])
    gains = np.stack([run.column("gain_outcome") for run in runs])
    return Figures(
        settings=settings,
        seeds=len(runs),
        prompts=wins.shape[1],
        ras=crossed_mean(wins, (0.0, 1.0)),
        nag=crossed_mean(gains),
        ras_by_seed=[float(np.nanmean(row)) for row in wins],
        base_ras=float(np.mean([run.base_ras for run in runs])),
        reward=mean("reward"),
        length=mean("length"),
        base_length=mean("base_length"),
        reference_answer_length=mean("reference_answer_length"),
        sampled_tokens=float(np.mean([run.summary["sampled_tokens"] for run in runs])),
        seconds_per_step=float(
            np.mean([run.summary["seconds_per_step"].get("step", np.nan) for run in runs])
        ),
        curve=_curve(runs),
        shares=_shares(runs),
    )


def compare_methods(
    runs: dict[str, Sequence[FinishedRun]], figures: dict[str, Figures], against: str
) -> None:
    """Fill in the differences, and the steps to 90 % of the best, of the methods of one case."""
    if against in runs:
        own = {run.summary["seed"]: run.wins for run in runs[against]}
        for name in runs:
            pairs = [
                run.wins - own[run.summary["seed"]]
                for run in runs[name]
                if run.summary["seed"] in own
            ]
            if name != against and pairs:
                figures[name].difference = crossed_mean(np.stack(pairs))
        p_values = {
            name: figure.difference.p for name, figure in figures.items() if figure.difference
        }
        for name, p in holm(p_values).items():
            figures[name].p_adjusted = p
    level = 0.9 * max(figure.ras.value for figure in figures.values())
    for figure in figures.values():
        curve = figure.curve
        figure.steps_to_level = first_crossing(curve["steps"], curve["ras"], level)
        if figure.sampled_tokens:
            figure.tokens_to_level = first_crossing(curve["tokens"], curve["ras"], level)


def _curve(runs: Sequence[FinishedRun]) -> dict[str, list[float]]:
    """Return the mean RAS of the seeds at each validation, and the least and the largest one.

    The untrained base stands at step 0 where the runs started from it.
    """
    by_run = [run.curves["val/ras"] for run in runs]
    steps = sorted(set.intersection(*(set(points) for points in by_run)))
    values = np.array([[points[step] for points in by_run] for step in steps])
    tokens = [
        float(np.mean([run.curves["train/num_tokens"].get(step, 0.0) for run in runs]))
        for step in steps
    ]
    return {
        "steps": list(map(float, steps)),
        "tokens": tokens,
        "ras": values.mean(axis=1).tolist(),
        "lowest": values.min(axis=1).tolist(),
        "highest": values.max(axis=1).tolist(),
    }


def _shares(runs: Sequence[FinishedRun]) -> dict[str, list[float]]:
    """Return the shares of the objective's terms by step, the mean of the seeds."""
    shares: dict[str, list[float]] = {}
    for tag in _CURVES[2:]:
        by_run = [run.curves[tag] for run in runs]
        if all(by_run):
            steps = sorted(set.intersection(*(set(points) for points in by_run)))
            name = tag.rpartition("/")[2].removesuffix("_share")
            shares["steps"] = [float(step) for step in steps]
            shares[name] = [
                float(np.nanmean([points[step] for points in by_run])) for step in steps
            ]
    return shares
