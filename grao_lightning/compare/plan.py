"""What a comparison consists of: a YAML file -> cases, methods, trials, studies."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from grao_lightning import __version__
from grao_lightning.faults import Faults, UserError

_Block = TypeVar("_Block", bound=Any)  # a dataclass of settings

Settings = dict[str, Any]  # dotted name -> value, as on the command line of ``grao fit``

#: What a sweep may choose by; the higher the better.
METRICS = ("ras", "nag", "reward")
_KNOWN = (
    *("output", "jobs", "seeds", "against", "cases", "methods", "sweep", "studies"),
    "keep_checkpoints",
)


@dataclass(frozen=True)
class Method:
    """A config of ``grao fit`` and what is changed in it."""

    config: Path = Path()
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """Trials of each method, decided on seeds that the table does not use.

    Attributes:
        seeds: Of the trials.
        metric: One of `METRICS`.
        trials: By method, the settings to choose from; as many for every method.
        case: The one that decides for all; None: each case for itself.
    """

    seeds: list[int] = field(default_factory=list)
    metric: str = "ras"
    trials: dict[str, list[Settings]] = field(default_factory=dict)
    case: str | None = None


@dataclass(frozen=True)
class Entry:
    """One row of a study."""

    method: str = ""
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A table of its own: methods with further settings, in one case."""

    case: str = ""
    entries: dict[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One ``grao fit``.

    Attributes:
        label: To be read by people.
        config: Its config file.
        settings: What is changed in it.
        seed: Its seed.
    """

    label: str
    config: Path
    settings: Settings
    seed: int

    @property
    def name(self) -> str:
        """Return its folder's name: the label and a digest of all that decides the result."""
        whole = [self.config.read_text(), sorted(self.settings.items()), self.seed, __version__]
        digest = hashlib.sha256(json.dumps(whole, default=str).encode()).hexdigest()[:10]
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.label).strip('-')}-{digest}"

    @property
    def arguments(self) -> list[str]:
        """Return the arguments of ``grao fit``."""
        # A class comes before its settings, or it would drop them.
        changed = [
            f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in sorted(self.settings.items(), key=lambda item: item[0].count("."))
        ]
        return ["--config", str(self.config), f"--seed_everything={self.seed}", *changed]


@dataclass(frozen=True)
class Plan:
    """All of it; see `configs/compare_keywords.yaml`.

    With ``keep_checkpoints`` a finished run of the table keeps its checkpoints.
    """

    output: Path
    jobs: int
    seeds: list[int]
    against: str
    cases: dict[str, Settings]
    methods: dict[str, Method]
    sweep: Sweep | None
    studies: dict[str, Study]
    keep_checkpoints: bool = False

    def run(self, method: str, case: str, seed: int, *more: Settings) -> Run:
        """Return a run of a method in a case."""
        chosen = self.methods[method]
        settings: Settings = {}
        for changes in (self.cases[case], chosen.settings, *more):
            settings |= changes
        return Run(f"{method} {case} seed {seed}", chosen.config, settings, seed)

    def trials(self) -> dict[tuple[str, str], list[list[Run]]]:
        """Return the runs of each (method, case) that is swept: by trial, by seed."""
        if self.sweep is None:
            return {}
        cases = [self.sweep.case] if self.sweep.case else list(self.cases)
        return {
            (method, case): [
                [self.run(method, case, seed, trial) for seed in self.sweep.seeds]
                for trial in trials
            ]
            for method, trials in self.sweep.trials.items()
            for case in cases
        }

    def table(self, chosen: dict[tuple[str, str], Settings]) -> dict[tuple[str, str], list[Run]]:
        """Return the runs of each (method, case), by seed.

        Args:
            chosen: Settings that the sweep chose.
        """
        return {
            (method, case): [
                self.run(method, case, seed, self._chosen(chosen, method, case))
                for seed in self.seeds
            ]
            for method in self.methods
            for case in self.cases
        }

    def study(self, name: str, chosen: dict[tuple[str, str], Settings]) -> dict[str, list[Run]]:
        """Return the runs of each entry of a study, by seed."""
        study = self.studies[name]
        return {
            label: [
                self.run(
                    entry.method,
                    study.case,
                    seed,
                    self._chosen(chosen, entry.method, study.case),
                    entry.settings,
                )
                for seed in self.seeds
            ]
            for label, entry in study.entries.items()
        }

    def _chosen(self, chosen: dict[tuple[str, str], Settings], method: str, case: str) -> Settings:
        decided = self.sweep.case if self.sweep and self.sweep.case else case
        return chosen.get((method, decided), {})


def read_plan(path: str, output: str | None = None, jobs: int | None = None) -> Plan:
    """Return the plan of a YAML file.

    Args:
        path: The file; config files in it are found from the working directory.
        output: Instead of the file's.
        jobs: Instead of the file's.

    Raises:
        UserError: The file cannot be read or has faults, all of which are told.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config: {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config: {path} must hold settings; got {type(content).__name__}")
    faults = Faults()
    _note_unknown("", content, _KNOWN, faults)
    content |= {
        name: value for name, value in (("output", output), ("jobs", jobs)) if value is not None
    }
    for name in ("output", "seeds", "cases", "methods"):
        if not content.get(name):
            faults.add(f"{name} must be set; got nothing")
    for name in ("cases", "methods", "studies"):
        _part(name, content.get(name) or {}, None, faults)
    faults.raise_if_any(f"in {path}")
    plan = _plan(content, faults)
    faults.raise_if_any(f"in {path}")
    _check(plan, faults)
    faults.raise_if_any(f"in {path}")
    return plan


def _plan(content: dict[str, Any], faults: Faults) -> Plan:
    methods = _blocks("methods", content["methods"], Method, faults)
    studies = _blocks("studies", content.get("studies"), Study, faults)
    for name, study in studies.items():
        entries = _blocks(f"studies.{name}.entries", study.entries, Entry, faults)
        studies[name] = replace(study, entries=entries)
    sweep = content.get("sweep")
    if sweep is not None:
        sweep = _block("sweep", sweep, Sweep, faults)
        _part("sweep.trials", sweep.trials, None, faults)
    return Plan(
        output=Path(content["output"]),
        jobs=content.get("jobs", 1),
        seeds=content["seeds"],
        against=content.get("against", next(iter(methods))),
        cases={
            name: _part(f"cases.{name}", settings or {}, None, faults)
            for name, settings in content["cases"].items()
        },
        methods={name: replace(part, config=Path(part.config)) for name, part in methods.items()},
        sweep=sweep,
        studies=studies,
        keep_checkpoints=bool(content.get("keep_checkpoints", False)),
    )


def _blocks(where: str, content: Any, kind: type[_Block], faults: Faults) -> dict[str, _Block]:
    """Return the blocks of a part of the file, by name."""
    parts = _part(where, content or {}, None, faults)
    return {name: _block(f"{where}.{name}", part, kind, faults) for name, part in parts.items()}


def _block(where: str, content: Any, kind: type[_Block], faults: Faults) -> _Block:
    """Return settings as the dataclass that holds them; what is not set has its default."""
    part = _part(where, content, [field.name for field in fields(kind)], faults)
    return kind(**{name: value for name, value in part.items() if value is not None})


def _check(plan: Plan, faults: Faults) -> None:
    faults.at_least("jobs", plan.jobs, 1)
    for setting, seeds in (("seeds", plan.seeds), ("sweep.seeds", plan.sweep and plan.sweep.seeds)):
        if seeds is not None and not (
            isinstance(seeds, list) and all(isinstance(seed, int) for seed in seeds)
        ):
            faults.add(f"{setting} must be a list of whole numbers, such as [0, 1, 2]; got {seeds}")
            return
    if plan.against not in plan.methods:
        faults.add(_unknown("against", plan.against, plan.methods))
    for name, method in plan.methods.items():
        if not method.config.is_file():
            faults.add(
                f"methods.{name}.config: no such file: {method.config} (looked in {Path.cwd()})"
            )
    for name, study in plan.studies.items():
        if study.case not in plan.cases:
            faults.add(_unknown(f"studies.{name}.case", study.case, plan.cases))
        for label, entry in study.entries.items():
            if entry.method not in plan.methods:
                setting = f"studies.{name}.{label}.method"
                faults.add(_unknown(setting, entry.method, plan.methods))
    if plan.sweep is not None:
        _check_sweep(plan, plan.sweep, faults)


def _check_sweep(plan: Plan, sweep: Sweep, faults: Faults) -> None:
    faults.one_of("sweep.metric", sweep.metric, METRICS)
    shared = sorted(set(sweep.seeds) & set(plan.seeds))
    if shared or not sweep.seeds:
        faults.add(
            f"sweep.seeds must be others than the table's, or what is chosen flatters itself; got "
            f"{sweep.seeds} with seeds={plan.seeds}: use such as [100]"
        )
    if sweep.case is not None and sweep.case not in plan.cases:
        faults.add(_unknown("sweep.case", sweep.case, plan.cases))
    for name in sweep.trials:
        if name not in plan.methods:
            faults.add(_unknown("sweep.trials", name, plan.methods))
    numbers = {name: len(sweep.trials.get(name, ())) for name in plan.methods}
    if len(set(numbers.values())) > 1:
        found = ", ".join(f"{name} {number}" for name, number in numbers.items())
        faults.add(
            "sweep.trials must hold as many trials for every method, or the one with more is "
            f"favoured; got {found}"
        )


def _part(where: str, content: Any, known: Iterable[str] | None, faults: Faults) -> dict[str, Any]:
    """Return a part of the file, with ``known`` what it knows of it; empty where it is none."""
    if not isinstance(content, dict):
        faults.add(f"{where} must hold settings; got {content!r}")
        return {}
    if known is None:
        return content
    _note_unknown(f"{where}.", content, known, faults)
    return {name: value for name, value in content.items() if name in known}


def _note_unknown(where: str, content: Iterable[str], known: Iterable[str], faults: Faults) -> None:
    faults.add(*(_unknown(f"{where}{name}", name, known) for name in content if name not in known))


def _unknown(setting: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f": did you mean {close[0]}?" if close else ""
    return f"{setting} must be one of {', '.join(known)}; got {name!r}{hint}"
