"""The scorers of a run: made once, checked before anything loads, taught, and called."""

import logging
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from grao_lightning.faults import Faults, UserError
from grao_lightning.metrics.outcomes import Estimate
from grao_lightning.rewards.preference import length_alone
from grao_lightning.rewards.probe import is_probed, probe_fault
from grao_lightning.rewards.protocol import (
    RewardFunction,
    RewardSpec,
    answer_fault,
    call_rewards,
    column_fault,
    scorer_statistics,
)

log = logging.getLogger(__name__)

_TOLD_FAILURES = {10**power for power in range(9)}

PairsOf = Callable[[str], tuple[list[str], list[str], list[str]]]  # split -> prompts and answers


class Scorers:
    """Holds what specs name; a class is constructed once however often it is called.

    Args:
        specs: Of all scorers, in training and in validation.

    Attributes:
        held_out_accuracy: By scorer that has learned, its share of validation pairs; and that of
            "length alone" beside.
    """

    def __init__(self, specs: Sequence[RewardSpec]) -> None:
        self._specs = list(specs)
        self._functions: dict[str, RewardFunction] = {}
        self._failures: Counter[str] = Counter()
        self.held_out_accuracy: dict[str, Estimate] = {}

    def faults(self) -> Faults:
        """Return what is wrong with the specs; imports what they name."""
        faults = Faults()
        labels = [spec.label for spec in self._specs]
        for label in sorted({label for label in labels if labels.count(label) > 1}):
            faults.add(
                f"scoring.rewards: {label!r} names two reward functions; give each a "
                "name of its own: name: in a config, RewardSpec(my_function, name=...) in Python"
            )
        for spec in self._specs:
            if not isinstance(spec.weight, int | float):
                faults.add(
                    f"scoring.rewards: the weight of {spec.label} must be a number; got "
                    f"{spec.weight!r}"
                )
            try:
                self._function(spec)
            except UserError as error:
                faults.add(str(error))
        return faults

    def column_faults(self, columns: Collection[str]) -> Faults:
        """Return which columns scorers ask for that the dataset does not have."""
        faults = Faults()
        faults.add(*(column_fault(self._function(spec), columns) for spec in self._specs))
        return faults

    def answer_faults(self, specs: Sequence[RewardSpec]) -> Faults:
        """Return which scorers cannot do without reference answers."""
        faults = Faults()
        faults.add(*(answer_fault(self._function(spec)) for spec in specs))
        return faults

    def learn(self, pairs_of: PairsOf) -> None:
        """Let those learn that can, from the train pairs, and measure them on the held-out ones.

        Args:
            pairs_of: Gives the pairs of "train" and of "validation".

        Raises:
            UserError: There is nothing to learn from.
        """
        for spec in self._specs:
            function = self._function(spec)
            if hasattr(function, "fit") and spec.label not in self.held_out_accuracy:
                self._teach(spec.label, function, pairs_of)

    def probe_faults(self, arguments: dict[str, list[Any]], where: str) -> Faults:
        """Return which of the user's own functions fail on a few rows, see `probe_fault`."""
        faults = Faults()
        for spec in self._specs:
            function = self._function(spec)
            if is_probed(function):
                faults.add(probe_fault(spec.label, function, arguments, where))
        return faults

    def scores(
        self,
        specs: Sequence[RewardSpec],
        arguments: dict[str, list[Any]],
        num_reference_answers: int,
    ) -> list[list[float]]:
        """Return the scores of some scorers, see `call_rewards`."""
        functions = [self._function(spec) for spec in specs]
        labels = {id(function): spec.label for function, spec in zip(functions, specs, strict=True)}

        def failed(function: RewardFunction, text: str, error: Exception) -> None:
            self._note_failure(labels[id(function)], text, error)

        return call_rewards(
            functions, arguments, num_reference_answers=num_reference_answers, failed=failed
        )

    def _note_failure(self, label: str, text: str, error: Exception) -> None:
        """Tell of the first exception of a scorer, and of the tenth, the hundredth and so on."""
        self._failures[label] += 1
        number = self._failures[label]
        if number not in _TOLD_FAILURES:
            return
        frame = traceback.extract_tb(error.__traceback__)[-1]
        log.warning(
            "%s raised an exception for %d texts so far, whose rewards are missing (the others of "
            "their batches are scored one by one); at %s, line %s: %s: %s; the text: %.200r",
            label,
            number,
            *(frame.filename, frame.lineno, type(error).__name__, error, text),
        )

    def statistics(self, specs: Sequence[RewardSpec]) -> dict[str, tuple[float, float | None]]:
        """Return what some scorers tell of themselves, see `scorer_statistics`."""
        return scorer_statistics({spec.label: self._function(spec) for spec in specs})

    def _function(self, spec: RewardSpec) -> RewardFunction:
        if spec.label not in self._functions:
            self._functions[spec.label] = spec.load()
        return self._functions[spec.label]

    def _teach(self, label: str, function: Any, pairs_of: PairsOf) -> None:
        pairs = pairs_of("train")
        if not pairs[0]:
            raise UserError(
                f"scoring.rewards: {label} learns from pairs of chosen and rejected answers, and "
                "data.train has none; use preference data or another reward"
            )
        function.fit(*pairs)
        held_out = pairs_of("validation")
        if held_out[0] and hasattr(function, "accuracy"):
            accuracy = function.accuracy(*held_out)
            self.held_out_accuracy[label] = accuracy
            log.info(
                "%s, given %d train pairs: held-out pair accuracy %.1f %% [%.1f, %.1f] on "
                "%d validation pairs",
                label,
                len(pairs[0]),
                *(100 * value for value in (accuracy.value, accuracy.low, accuracy.high)),
                len(held_out[0]),
            )
            self.held_out_accuracy["length alone"] = length_alone(pairs[1:], held_out[1:])


def scorer_arguments(
    prompts: Sequence[str],
    completions: Sequence[str],
    reference_answers: Sequence[str] | None,
    truncated: Sequence[bool],
    columns: Sequence[Mapping[str, Any]],
) -> dict[str, list[Any]]:
    """Return what scorers are called with, see `call_rewards`; one value of each a text.

    Args:
        prompts: As texts.
        completions: To be scored.
        reference_answers: To the same prompts; None: there are none.
        truncated: Whether the length limit ended a completion.
        columns: The dataset's others; a row that lacks one has None.
    """
    names = sorted({name for row in columns for name in row})
    return {
        **{name: [row.get(name) for row in columns] for name in names},
        "prompts": list(prompts),
        "completions": list(completions),
        **({} if reference_answers is None else {"reference_answers": list(reference_answers)}),
        "truncated": list(truncated),
    }
