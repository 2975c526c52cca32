"""The config of ``grao judge-check``: parsed as that of ``grao fit``, its faults told together."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from grao_lightning.command.parse_errors import explain
from grao_lightning.data.datamodule import PromptDataModule
from grao_lightning.faults import Faults, UserError, extra_fault
from grao_lightning.judge_check.judging import NO_PAIRS, Pairs, TrainPairs, read_pairs
from grao_lightning.rewards.protocol import RewardFunction, RewardSpec, column_fault

_EXAMPLE = "configs/judge_check.yaml"
_EMBEDDED = "embedded:keywords"
#: Settings of data that say where rows come from; the others are about training.
_SOURCES = (
    *("train", "validation", "subset", "data_dir", "train_split", "validation_split", "rename"),
)


@dataclass
class Settings:
    """What is judged by whom.

    Args:
        scorers: Entries like those of ``scoring.rewards``. A negative weight means that lower
            scores are better; its size is of no matter.
        pairs: How many validation pairs are judged, from the first; null = all.
        pairs_at_once: Pairs that a scorer is called with. A judge that asks a server works on
            these at the same time.
        output: Folder of report.md, report.png, results.json and pairs.csv, which are replaced.
    """

    scorers: list[RewardSpec]
    pairs: int | None = None
    pairs_at_once: int = 64
    output: str = "runs/judge-check"


@dataclass
class Plan:
    """All that is needed to begin.

    Attributes:
        settings: As they were given.
        functions: The scorers, in the order of ``settings.scorers``.
        pairs: To be judged.
        train: To learn from; maybe none.
        held_out: Whether ``pairs`` are others than ``train``.
        config: All settings, those of the data among them.
        without_effect: Settings that were given and mean nothing here.
    """

    settings: Settings
    functions: list[RewardFunction]
    pairs: Pairs
    train: TrainPairs
    held_out: bool
    config: dict[str, Any]
    without_effect: list[str]


def read_plan(arguments: Sequence[str]) -> Plan:
    """Return what the arguments and their config file ask for.

    Raises:
        UserError: A setting is unknown or of the wrong kind; or there are faults, all of which
            are told.
    """
    parser = make_parser()
    config = _parse(parser, list(arguments))
    settings = Settings(
        **{one.name: config[one.name] for one in fields(Settings) if one.name != "scorers"},
        scorers=[RewardSpec(**spec.as_dict()) for spec in config.scorers],
    )
    data = PromptDataModule(**config.data.as_dict())
    faults = Faults()
    faults.add(*_setting_faults(settings))
    functions = list(_loaded(settings.scorers, faults))
    learning = any(hasattr(function, "fit") for function in functions)
    data_faults = data.faults()
    data_faults.add(_train_fault(config.data, data, learning=learning))
    faults.add(*data_faults)
    pairs, train = Pairs([], [], [], []), NO_PAIRS
    if not data_faults:
        number = settings.pairs if settings.pairs is None else max(1, settings.pairs)
        try:
            train, pairs = data.preference_pairs("train"), read_pairs(data, number)
        except UserError as error:
            faults.add(str(error))
        else:
            faults.add(*_pair_faults(pairs, train, functions))
    faults.raise_if_any()
    return Plan(
        settings,
        functions,
        pairs,
        train,
        held_out=not data.validates_on_train_rows,
        config={name: part for name, part in config.as_dict().items() if name != "config"},
        without_effect=_without_effect(parser, config),
    )


def make_parser() -> ArgumentParser:
    """Return the parser of all settings."""
    # Errors come to `_parse`; an abbreviation would be a typo that passes.
    parser = ArgumentParser(
        prog="grao judge-check", exit_on_error=False, allow_abbrev=False, add_help=False
    )
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Settings)
    parser.add_class_arguments(PromptDataModule, "data")
    return parser


def _parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    try:
        config = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        known = [action.dest for action in parser._actions]
        raise UserError(explain(str(error), known, arguments, _EXAMPLE)) from None
    if not isinstance(config.data, Namespace):
        raise UserError(
            f"data must hold settings, each on a line of its own below it; got {config.data!r}: "
            f"see {_EXAMPLE} for an example"
        )
    return config


def _setting_faults(settings: Settings) -> Faults:
    faults = Faults()
    faults.add(extra_fault("grao judge-check", ("matplotlib", "scipy"), "compare"))
    if settings.pairs is not None:
        faults.at_least("pairs", settings.pairs, 1)
    faults.at_least("pairs_at_once", settings.pairs_at_once, 1)
    output = Path(settings.output)
    blocking = next((part for part in (output, *output.parents) if part.exists()), None)
    if blocking is not None and not blocking.is_dir():
        faults.add(f"output must be a folder; got {settings.output}, and {blocking} is a file")
    if not settings.scorers:
        faults.add(
            "scorers must name at least one scorer; got none: add an entry such as {function: "
            "my_package.my_module.my_reward}"
        )
    labels = [spec.label for spec in settings.scorers]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        faults.add(f"scorers: {label!r} names two scorers; give each a name")
    for spec in settings.scorers:
        if not (spec.weight < 0 or spec.weight > 0):
            faults.add(
                f"scorers: the weight of {spec.label} must be > 0 (higher is better) or < 0 (lower "
                f"is better); got {spec.weight}"
            )
    return faults


def _loaded(specs: Sequence[RewardSpec], faults: Faults) -> Iterator[RewardFunction]:
    """Give the scorers that can be made; what is wrong with the others is a fault each."""
    for spec in specs:
        try:
            function = spec.load()
        except UserError as error:
            faults.add(str(error).replace("scoring.rewards: ", "scorers: ", 1))
        else:
            yield function


def _train_fault(settings: Namespace, data: PromptDataModule, *, learning: bool) -> str | None:
    """Return that scorers would learn from other data than is meant, or from what is judged."""
    if settings.train == _EMBEDDED and settings.validation not in (None, _EMBEDDED):
        return (
            f"data.train must be set beside data.validation, since scorers and the guess by length "
            f"learn from it; got {_EMBEDDED}, the default, with data.validation="
            f"{settings.validation}"
        )
    if learning and data.validates_on_train_rows:
        return (
            f"data.validation must be held out from data.train where a scorer learns; got "
            f"{settings.train} for both, and files have no splits: name another file"
        )
    return None


def _pair_faults(pairs: Pairs, train: TrainPairs, functions: Sequence[RewardFunction]) -> Faults:
    faults = Faults()
    if not len(pairs):
        faults.add(
            "data.validation must have rows with a chosen and a rejected answer; got none: use "
            "preference data, or name its columns with data.rename"
        )
        return faults
    columns = {name for row in pairs.columns for name in row}
    faults.add(*(column_fault(function, columns) for function in functions))
    if not train[0] and any(hasattr(function, "fit") for function in functions):
        faults.add(
            "data.train must have rows with a chosen and a rejected answer for the scorers that "
            "learn from them; got none: use preference data"
        )
    return faults


def _without_effect(parser: ArgumentParser, config: Namespace) -> list[str]:
    return [
        f"data.{name}"
        for name, value in sorted(config.data.as_dict().items())
        if name not in _SOURCES and value != parser.get_default(f"data.{name}")
    ]
