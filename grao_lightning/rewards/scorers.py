"""The scorers of a run: made once, checked before anything loads, taught, and called."""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

from grao_lightning.faults import Faults, UserError
from grao_lightning.metrics.outcomes import Estimate
from grao_lightning.rewards.preference import length_alone
from grao_lightning.rewards.protocol import (
    RewardFunction,
    RewardSpec,
    answer_fault,
    call_rewards,
    column_fault,
    scorer_statistics,
)

log = logging.getLogger(__name__)

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

    def scores(
        self,
        specs: Sequence[RewardSpec],
        arguments: dict[str, list[Any]],
        num_reference_answers: int,
    ) -> list[list[float]]:
        """Return the scores of some scorers, see `call_rewards`."""
        functions = [self._function(spec) for spec in specs]
        return call_rewards(functions, arguments, num_reference_answers=num_reference_answers)

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
