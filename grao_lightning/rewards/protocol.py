"""How rewards are named, checked and called.

A scorer is any callable, sync or async, that takes by keyword those it names of

    prompts: list[str], completions: list[str], reference_answers: list[str],
    truncated: list[bool]   (the length limit ended the completion)

and of the dataset's other columns, each a list as long as the others. Where the data has prompts
alone, there are no reference_answers: they are not passed, and a scorer that cannot do without is
refused before training. It returns one number a
completion in its own unit, higher = better, with None or NaN for "missing". It is called with the
completions of a whole batch at once; where that raises an exception, with each by itself, and those
for which it still does are missing. What it may tell of itself, as attributes:

    unit: str                     of its scores, such as "log-odds"; for people
    range: tuple[float, float]    closed bounds of its scores; one outside is refused
    pairwise: bool                False: a reference answer is scored like any completion, and comes
                                  behind them. True: it compares each completion with the reference
                                  answer, > 0 = the completion is better, and is called with
                                  completions alone; the reference answer's own score is 0.
    statistics()                  -> {name: (sum, count)} since the last call, always the same
                                  names; logged as judge/name: the mean, or with None for the
                                  count the sum

A class is constructed with ``arguments`` and its instances are called; other callables are called
with them each time, and they hide columns of their names. If instances have a method
``fit(prompts, chosen, rejected)``, it is called once, on the train split's preference pairs.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import final

from grao_lightning.faults import NamedSettings, UserError
from grao_lightning.rewards.arguments import BUILT_IN, AsMessages, name_of, with_arguments
from grao_lightning.rewards.calling import Failed, call_all, call_one_by_one
from grao_lightning.rewards.importing import load_object

RewardFunction = Callable[..., Any]
TextFormat = Literal["text", "messages"]
_TOLD = (TypeError, ValueError, ImportError)  # their message says it all

if TYPE_CHECKING:
    FunctionSource = str | RewardFunction
else:  # what a config can hold: the command line's parser goes by it
    FunctionSource = str


@final  # or the command line's parser would have class_path and init_args for it
@dataclass
class RewardSpec(NamedSettings):
    """One reward function of a weighted sum.

    Args:
        function: A function or class by import path, such as ``my_module.my_reward``, or in a file,
            as in ``my_rewards.py:my_reward``, which is looked for in the working directory and
            beside the config. In Python also the function, class or instance itself.
        weight: Factor of its scores in the sum.
        name: Its name in logs; by default that of the function.
        arguments: Arguments of the class, or of every call of a function.
        format: "messages": it reads conversations as TRL's reward functions may: ``prompts`` are
            lists of messages, ``completions`` lists of one, the assistant's; "text": texts.
    """

    function: FunctionSource
    weight: float = 1.0
    name: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    format: TextFormat = "text"

    @property
    def label(self) -> str:
        """Return the name in logs."""
        if self.name:
            return self.name
        if isinstance(self.function, str):
            return re.split("[.:]", self.function)[-1]
        return name_of(self.function)

    def load(self) -> RewardFunction:
        """Return the function with its arguments, or an instance of the class.

        Raises:
            UserError: The path cannot be imported or its arguments do not fit.
        """
        if self.format not in get_args(TextFormat):
            raise UserError(
                f"scoring.rewards: format of {self.label} must be one of "
                f"{', '.join(get_args(TextFormat))}; got {self.format!r}"
            )
        function = self._callable()
        return AsMessages(function) if self.format == "messages" else function

    def _callable(self) -> RewardFunction:
        function: Any = self.function
        if isinstance(function, str):
            try:
                function = load_object(function)
            except UserError as error:
                raise UserError(f"scoring.rewards: {error}") from error.__cause__
        if not isinstance(function, type):
            return with_arguments(function, self.arguments, self.label)
        try:
            made = function(**self.arguments)
        except Exception as error:  # a class may do anything when it is made
            reason = str(error) if isinstance(error, _TOLD) else f"{type(error).__name__}: {error}"
            raise UserError(f"scoring.rewards: arguments of {self.label}: {reason}") from error
        if not callable(made):
            raise UserError(
                f"scoring.rewards: {self.label} must be a function or a class whose instances can "
                "be called; give it a method __call__(self, completions)"
            )
        return made


if TYPE_CHECKING:
    Rewards = Sequence[RewardSpec | RewardFunction | str | Mapping[str, Any]]
else:  # what a config can hold: the command line's parser goes by it
    Rewards = list[RewardSpec]


def reward_specs(setting: str, rewards: Rewards) -> list[RewardSpec]:
    """Return what a list of rewards names, each as a spec.

    Args:
        setting: Name of the setting, for messages.
        rewards: Functions, instances, specs, import paths, or mappings of a spec's fields.

    Raises:
        UserError: It is no list, or an entry is none of these.
        TypeError: A mapping has an unknown key.
    """
    if isinstance(rewards, str | Mapping | RewardSpec) or callable(rewards):
        raise UserError(f"{setting} must be a list; got {rewards!r:.60}: put it in brackets")
    return [_spec(setting, entry) for entry in rewards]


def _spec(setting: str, entry: Any) -> RewardSpec:
    if isinstance(entry, RewardSpec):
        return entry
    if isinstance(entry, Mapping) and "function" in entry:
        return RewardSpec(**entry)
    if isinstance(entry, str) or (callable(entry) and not isinstance(entry, Mapping)):
        return RewardSpec(entry)
    raise UserError(
        f"{setting} must hold reward functions, RewardSpec(function, weight=...), import paths or "
        f"mappings such as {{function: my_module.my_reward, weight: 1.0}}; got {entry!r:.60}"
    )


def columns_asked_for(function: RewardFunction) -> tuple[set[str], bool]:
    """Return the dataset columns a reward function requires, and whether it takes any."""
    parameters = inspect.signature(function).parameters.values()
    required = {
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and parameter.name not in BUILT_IN
    }
    return required, any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def is_pairwise(function: RewardFunction) -> bool:
    """Return whether a scorer compares completions with the reference answer."""
    return bool(getattr(function, "pairwise", False))


def call_rewards(
    functions: Sequence[RewardFunction],
    arguments: dict[str, list[Any]],
    *,
    num_reference_answers: int = 0,
    failed: Failed | None = None,
) -> list[list[float]]:
    """Return the scores of every scorer, NaN for missing; async ones run beside the others.

    Args:
        functions: As `RewardSpec.load` gives them.
        arguments: prompts, completions, reference_answers (unless there are none) and the
            dataset's other columns, each a list of equal length n.
        num_reference_answers: How many of the n, the last ones, are the reference answers
            themselves. Pairwise scorers are not called with those and give them 0.
        failed: Told of every text for which a scorer raises an exception when it is called with
            that one alone; its score is missing. None: what is raised is raised.

    Returns:
        One list of n floats a scorer.

    Raises:
        UserError: A scorer asks for a column that is not there, or returns what are no scores:
            another number of them, no numbers, infinite ones or some outside its range.
    """
    number = len(arguments["completions"])
    compared = number - num_reference_answers

    def chosen(function: RewardFunction) -> dict[str, list[Any]]:
        wanted = _wanted(function, arguments)
        if is_pairwise(function):
            wanted = {name: values[:compared] for name, values in wanted.items()}
        return wanted

    calls = [(function, chosen(function)) for function in functions]
    found = call_all(calls)
    scores = []
    for (function, asked), result in zip(calls, found, strict=True):
        if isinstance(result, Exception):
            if failed is None or isinstance(result, UserError):
                raise result
            result = call_one_by_one(function, asked, failed)
        own = [0.0] * num_reference_answers if is_pairwise(function) else []
        scores.append(_checked(function, result, number - len(own)) + own)
    return scores


def scorer_statistics(
    functions: Mapping[str, RewardFunction],
) -> dict[str, tuple[float, float | None]]:
    """Return what scorers tell of themselves since they were last asked, (sum, count) by name.

    Args:
        functions: By label. The label is part of the name where several tell something.
    """
    telling = {
        label: function for label, function in functions.items() if hasattr(function, "statistics")
    }
    return {
        f"judge/{label}/{name}" if len(telling) > 1 else f"judge/{name}": figure
        for label, function in telling.items()
        for name, figure in function.statistics().items()
    }


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


def answer_fault(function: RewardFunction) -> str | None:
    """Return that a scorer cannot do without reference answers."""
    parameter = inspect.signature(function).parameters.get("reference_answers")
    if is_pairwise(function):
        told, fix = "compares with reference answers", "use another"
    elif parameter is not None and parameter.default is parameter.empty:
        told, fix = "asks for reference_answers", "use another, give the parameter a default"
    else:
        return None
    return (
        f"reward function {name_of(function)} {told}, and the dataset has none: {fix}, or add a "
        "column completion to the data"
    )


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
        f"reward function {name_of(function)} asks for column {', '.join(sorted(missing))}; the "
        f"dataset has {', '.join(sorted(columns)) or 'none'} besides prompts, completions and "
        "reference_answers: rename one with data.rename or drop the parameter"
    )


def _wanted(function: RewardFunction, arguments: dict[str, list[Any]]) -> dict[str, list[Any]]:
    fault = column_fault(function, arguments.keys() - set(BUILT_IN))
    if "reference_answers" not in arguments:
        fault = fault or answer_fault(function)
    if fault:
        raise UserError(fault)
    if columns_asked_for(function)[1]:
        return arguments
    return {
        name: arguments[name]
        for name in inspect.signature(function).parameters
        if name in arguments
    }


def _checked(function: RewardFunction, scores: Iterable[Any], number: int) -> list[float]:
    """Return scores as floats, NaN = missing, if they are what was asked for."""
    try:
        floats = [math.nan if score is None else float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"reward function {name_of(function)} must return a list of numbers, None for a "
            f"missing one: {error}"
        ) from error
    if len(floats) != number:
        raise UserError(
            f"reward function {name_of(function)} must return one score a completion: got "
            f"{len(floats)} for {number} completions"
        )
    low, high = getattr(function, "range", None) or (-math.inf, math.inf)
    for score in floats:
        if math.isinf(score) or score < low or score > high:
            raise UserError(
                f"reward function {name_of(function)} must return finite scores in [{low}, "
                f"{high}], None for a missing one; got {score}"
            )
    return floats
