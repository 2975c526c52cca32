"""Scorers -> their scores of chosen and rejected answers, a batch of pairs at a time."""

import inspect
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grao_lightning.callbacks.stopping import Stopped
from grao_lightning.data.datamodule import PromptDataModule
from grao_lightning.data.encoding import conversation_text
from grao_lightning.faults import UserError
from grao_lightning.rewards.protocol import RewardFunction, RewardSpec, call_rewards, is_pairwise

Statistics = dict[str, tuple[float, float | None]]  # name -> (sum, count); None: a total
TrainPairs = tuple[list[str], list[str], list[str]]  # prompts, chosen, rejected
NO_PAIRS: TrainPairs = ([], [], [])


@dataclass(frozen=True)
class Pairs:
    """Pairs of answers to the same prompt, one of which people preferred.

    Attributes:
        prompts: P texts.
        chosen: The preferred answers.
        rejected: The others.
        columns: Of each pair, what else the dataset says.
    """

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    columns: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longer_by(self) -> np.ndarray:
        """Return the length of the chosen minus that of the rejected answer, [P] characters."""
        return np.array([len(c) - len(r) for c, r in zip(self.chosen, self.rejected, strict=True)])


def read_pairs(data: PromptDataModule, number: int | None) -> Pairs:
    """Return the first so many pairs of the validation split, or all.

    Raises:
        UserError: The source cannot be read.
    """
    rows = [
        (conversation_text(row.prompt), row.reference_answer, row.rejected_answer, row.columns)
        for row in data.read("validation")
        if row.reference_answer is not None and row.rejected_answer is not None
    ][:number]
    prompts, chosen, rejected, columns = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Pairs(list(prompts), list(chosen), list(rejected), list(columns))


@dataclass
class Judged:
    """What one scorer said.

    Attributes:
        spec: Of the scorer.
        pairwise: Whether it compares the two answers; `chosen` are then its verdicts and
            `rejected` the 0 that they are compared with.
        unit: Of its scores, if it tells.
        sees_chosen: Whether it scores by the reference answer, which is the chosen one.
        chosen: [P] scores of the chosen answers, NaN = missing.
        rejected: [P] scores of the rejected answers, NaN = missing.
        asked: Pairs that it was called with, from the first; all, unless it failed.
        seconds: Of scoring these.
        fit_seconds: Of learning from the train split's pairs; None where it does not learn.
        statistics: What it tells of itself.
        error: What it failed with.
        interrupted: Number of the signal that ended it; 0: none.
    """

    spec: RewardSpec
    pairwise: bool
    unit: str
    sees_chosen: bool
    chosen: np.ndarray
    rejected: np.ndarray
    asked: int = 0
    seconds: float = 0.0
    fit_seconds: float | None = None
    statistics: Statistics = field(default_factory=dict)
    error: str | None = None
    interrupted: int = 0

    @property
    def label(self) -> str:
        """Return the scorer's name."""
        return self.spec.label

    @property
    def differences(self) -> np.ndarray:
        """Return [P] > 0 where the scorer prefers the chosen answer, NaN where missing."""
        difference: np.ndarray = self.chosen - self.rejected
        return -difference if self.spec.weight < 0 else difference

    @property
    def seconds_per_pair(self) -> float:
        """Return the mean time of scoring a pair, learning left out."""
        return self.seconds / self.asked if self.asked else float("nan")


def judge(
    spec: RewardSpec,
    function: RewardFunction,
    train: TrainPairs,
    pairs: Pairs,
    pairs_at_once: int,
    progress: Callable[[int], None],
) -> Judged:
    """Return what a scorer says of all pairs, or of those before the batch that it fails at.

    Args:
        spec: Of the scorer.
        function: As `RewardSpec.load` gives it.
        train: What it learns from, if it does.
        pairs: To be judged.
        pairs_at_once: Size of a batch.
        progress: Called with the number of pairs done, after each batch.
    """
    missing = np.full(len(pairs), np.nan)
    pairwise = is_pairwise(function)
    found = Judged(
        spec,
        pairwise=pairwise,
        unit=str(getattr(function, "unit", "") or ""),
        sees_chosen=not pairwise and "reference_answers" in inspect.signature(function).parameters,
        chosen=missing,
        rejected=missing.copy(),
    )
    try:
        _judge(found, function, train, pairs, pairs_at_once, progress)
    except (Stopped, KeyboardInterrupt) as ended:  # what has been scored is worth keeping
        found.error = "interrupted"
        found.interrupted = getattr(ended, "number", signal.SIGINT)
    except Exception as error:  # a scorer may do anything; what the others said is worth keeping
        found.error = (
            str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        )
        if os.environ.get("GRAO_TRACEBACK"):
            traceback.print_exc()
    return found


def _judge(
    found: Judged,
    function: Any,
    train: TrainPairs,
    pairs: Pairs,
    pairs_at_once: int,
    progress: Callable[[int], None],
) -> None:
    """Fill in what a scorer says, batch by batch: a failure leaves what came before it."""
    if hasattr(function, "fit"):
        started = time.perf_counter()
        function.fit(*train)
        found.fit_seconds = time.perf_counter() - started
    try:
        for start in range(0, len(pairs), pairs_at_once):
            batch = slice(start, start + pairs_at_once)
            started = time.perf_counter()
            scores = _scores(function, pairs, batch, found.pairwise)
            found.chosen[batch], found.rejected[batch] = scores
            found.seconds += time.perf_counter() - started
            found.asked = min(batch.stop, len(pairs))
            progress(found.asked)
    finally:
        if hasattr(function, "statistics"):
            found.statistics = function.statistics()


def _scores(
    function: RewardFunction, pairs: Pairs, batch: slice, pairwise: bool
) -> tuple[Sequence[float], Sequence[float]]:
    """Return the scores of a batch's chosen and of its rejected answers."""
    chosen, rejected = pairs.chosen[batch], pairs.rejected[batch]
    number = len(chosen)
    copies = 1 if pairwise else 2
    names = {name for row in pairs.columns for name in row}
    arguments: dict[str, list[Any]] = {
        **{name: [row.get(name) for row in pairs.columns[batch]] * copies for name in names},
        "prompts": pairs.prompts[batch] * copies,
        "completions": chosen if pairwise else chosen + rejected,
        "reference_answers": rejected if pairwise else chosen * 2,
        "truncated": [False] * number * copies,
    }
    (scores,) = call_rewards([function], arguments)
    return (scores, [0.0] * number) if pairwise else (scores[:number], scores[number:])
