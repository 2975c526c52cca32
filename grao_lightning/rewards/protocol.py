"""How rewards are named, checked and called.

A reward function is any callable, sync or async, that takes by keyword those it names of

    prompts: list[str], completions: list[str], reference_answers: list[str],
    truncated: list[bool]   (the length limit ended the completion)

and of the dataset's other columns, each a list as long as the others. It returns one number a
completion in its own unit, higher = better, with None or NaN for "missing". It is called with the
completions of a whole batch at once, the reference answers among them: a reference answer is scored
like any completion.

A class is constructed with ``arguments`` and its instances are called. If they have a method
``fit(prompts, chosen, rejected)``, it is called once, on the train split's preference pairs.
"""

import asyncio
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grao_lightning.faults import UserError

RewardFunction = Callable[..., Any]
_BUILT_IN = ("prompts", "completions", "reference_answers", "truncated")


@dataclass
class RewardSpec:
    """One reward function of a weighted sum.

    Args:
        function: Import path of a function or class, such as ``my_package.my_module.my_reward``.
        weight: Factor of its scores in the sum.
        name: Its name in logs; by default the last part of ``function``.
        arguments: Arguments of the class, if it is one.
    """

    function: str
    weight: float = 1.0
    name: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return the name in logs."""
        return self.name or self.function.rpartition(".")[2]

    def load(self) -> RewardFunction:
        """Return the function, or an instance of the class.

        Raises:
            UserError: The path cannot be imported or its arguments do not fit.
        """
        module_name, _, attribute = self.function.replace(":", ".").rpartition(".")
        try:
            function: Any = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"scoring.rewards: cannot import {self.function!r} ({error}); give the path of a "
                "function or class as package.module.name, importable from the working directory"
            ) from None
        try:
            made: RewardFunction = (
                function(**self.arguments) if isinstance(function, type) else function
            )
            return made
        except (TypeError, ValueError, ImportError) as error:
            raise UserError(f"scoring.rewards: arguments of {self.function}: {error}") from None


def columns_asked_for(function: RewardFunction) -> tuple[set[str], bool]:
    """Return the dataset columns a reward function requires, and whether it takes any."""
    parameters = inspect.signature(function).parameters.values()
    required = {
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and parameter.name not in _BUILT_IN
    }
    return required, any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def call_rewards(
    functions: Sequence[RewardFunction], arguments: dict[str, list[Any]]
) -> list[list[float]]:
    """Return the scores of every function, NaN for missing; async functions run side by side.

    Args:
        functions: As `RewardSpec.load` gives them.
        arguments: prompts, completions, reference_answers and the dataset's other columns, each
            a list of equal length n.

    Returns:
        One list of n floats a function.

    Raises:
        UserError: A function asks for a column that is not there, or returns another number of
            scores than it got completions.
    """

    async def call(function: RewardFunction) -> list[float]:
        result = function(**_wanted(function, arguments))
        if inspect.isawaitable(result):
            result = await result
        scores = [math.nan if score is None else float(score) for score in result]
        if len(scores) != len(arguments["completions"]):
            raise UserError(
                f"reward function {_name(function)} must return one score a completion: got "
                f"{len(scores)} for {len(arguments['completions'])} completions"
            )
        return scores

    async def call_all() -> list[list[float]]:
        return list(await asyncio.gather(*(call(function) for function in functions)))

    # A thread of its own: the caller may sit in a running event loop, as in a notebook.
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(asyncio.run, call_all()).result()


def weighted_sum(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of reward functions, NaN where a needed score is missing.

    A function that scored no member of a group does not apply to it and is left out for that
    group. One that scored only some leaves the others missing: a partial sum cannot be compared
    with a whole one.

    Args:
        scores: [F, B, M] of F functions over the M members of B groups, NaN = missing.
        weights: F factors.

    Returns:
        [B, M].
    """
    applies = ~scores.isnan().all(dim=2, keepdim=True)  # [F, B, 1]
    factors = torch.tensor(weights, dtype=scores.dtype)[:, None, None]
    total = (scores * factors).where(applies, 0.0).sum(dim=0)
    return total.where(applies.any(dim=0), torch.nan)


def column_fault(function: RewardFunction, columns: Iterable[str]) -> str | None:
    """Return that a reward function asks for columns that the dataset does not have.

    Args:
        function: As `RewardSpec.load` gives it.
        columns: Of the dataset, besides prompts and answers.
    """
    missing = columns_asked_for(function)[0].difference(columns)
    if not missing:
        return None
    return (
        f"reward function {_name(function)} asks for column {', '.join(sorted(missing))}; the "
        f"dataset has {', '.join(sorted(columns)) or 'none'} besides prompts, completions and "
        "reference_answers: rename one with data.rename or drop the parameter"
    )


def _wanted(function: RewardFunction, arguments: dict[str, list[Any]]) -> dict[str, list[Any]]:
    fault = column_fault(function, arguments.keys() - set(_BUILT_IN))
    if fault:
        raise UserError(fault)
    if columns_asked_for(function)[1]:
        return arguments
    return {
        name: arguments[name]
        for name in inspect.signature(function).parameters
        if name in arguments
    }


def _name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)
