"""What the argument parser says about a config, in words that name setting, rule, value and fix."""

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from grao_lightning.command.signatures import module_names
from grao_lightning.faults import UserError
from grao_lightning.rewards.importing import config_files, load_object

_OURS = "grao_lightning."
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping such as {name: value}",
    "NoneType": "null",
}
_FORMS = {"RewardSpec": "entries such as {function: my_module.my_reward, weight: 1.0}"}
_SPECS = ("scoring.rewards", "scoring.judges")
_FUNCTION = re.compile(r"(?:[\w/-]+\.)+(?:py:)?\w+")  # its name, alone or in brackets or braces
_KEY = re.compile(r'Parser key "([\w.]+)"')
_CLASS = re.compile(r"given class_path '([\w.]+)'")
_UNKNOWN = re.compile(
    r"(?:Group '(?P<group>[\w.]+)' )?(?:does not accept option|Option) '(?P<name>[\w.]+)'"
)
_UNKNOWN_ARGUMENT = re.compile(r"unrecognized arguments: (\S+)")
_REQUIRED = re.compile(r"arguments are required: (?:fit\.|validate\.)?([\w.]+)")
_EXPECTED = re.compile(r"Expected an? (<class '.*?'>|typing\.Literal\[.*?\])")
_VALUE = re.compile(r"(?:Got|Given) value: (.*)")
_CHOICES = re.compile(r"Literal\[(.*)\]")
_NO_IMPORT = re.compile(r"given class_path '([\w.]+)':\s*(.*)|dot import path string: (.*)")
_FILE = re.compile(r"(?:.*/)?(\w+)\.py:(\w+)")  # as of a reward function
_CLASS_PATHS = re.compile(r"'class_path': '([\w.]+)'")
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")
_OF_CLASSES = ("model", "trainer.callbacks", "trainer.logger")
_NO_CLASS = re.compile(r"Not a valid subclass of (\w+)")
_NO_SUBCLASS = re.compile(r"Import path ([\w.]+) does not correspond to a subclass of (\w+)")


def explain(
    message: str,
    known: Iterable[str],
    arguments: list[str],
    example: str = "configs/quickstart.yaml",
) -> str:
    """Return one clear sentence for an error of the argument parser.

    Args:
        message: As the parser gives it, often over many lines.
        known: Dotted names of all settings.
        arguments: Of the command, to find the config files.
        example: A config that has all that must be set.
    """
    if fault := _config_file_fault(arguments):
        return fault
    owner = _owner(message)
    setting = _setting(message, owner)
    if owner is not None:
        known = [f"{setting}.{name}" for name in _parameters(_held(owner, setting))]
    if found := _UNKNOWN.search(message):
        return unknown_setting(".".join(filter(None, (setting, *found.groups()))), known)
    if found := _UNKNOWN_ARGUMENT.search(message):
        if not found[1].startswith("--"):
            return f"unexpected argument {found[1]!r}; settings are given as --name value"
        return unknown_setting(found[1][2:].partition("=")[0], known)
    if found := _REQUIRED.search(message):
        name = f"{setting}.{found[1]}" if setting else found[1]
        return f"{name} must be set; see {example} for an example"
    if setting in _SPECS and owner is None and not _NO_CLASS.search(message):
        return _no_specs(setting, message)
    if found := _NO_SUBCLASS.search(message):
        return f"{setting}.class_path must be a subclass of {found[2]}; got {found[1]}"
    if owner is None and (found := _NO_IMPORT.search(message)):
        path = found[1] or found[3]
        if setting == "model" and "." not in path.removeprefix(_OURS):
            return unknown_module(path)
        reason = f"cannot import {path!r}: {found[2] or 'give module.Class'}"
        return f"{setting}.class_path: {_import_fault(path) or reason}"
    got = f"; got {given[1]}" if (given := _VALUE.search(message)) else ""
    if given and (fault := _class_fault(setting, given[1])):
        return fault
    if found := _NO_CLASS.search(message):
        return f"{setting} must hold {_FORMS.get(found[1], 'class_path and init_args only')}{got}"
    expected = [_expected(text) for text in _EXPECTED.findall(message)]
    if owner is not None:  # that the whole class may be left out is not the point
        expected = expected[:1]
    if setting and expected:
        return f"{setting} must be {' or '.join(dict.fromkeys(expected))}{got}"
    return " ".join(message.split())


def _class_fault(setting: str, given: str) -> str | None:
    """Return that a class of the value cannot be imported; the parser would tell its type."""
    if file := _FILE.fullmatch(given):
        wanted = f"{file[1]}.{file[2]}"
        return f"{setting}.class_path must be module.Class; got {given}: write {wanted}"
    paths = _CLASS_PATHS.findall(given)
    if setting in _OF_CLASSES and _DOTTED.fullmatch(given):
        paths.append(given)
    reasons = filter(None, map(_import_fault, paths))
    return next((f"{setting}.class_path: {reason}" for reason in reasons), None)


def _import_fault(path: str) -> str | None:
    try:
        load_object(path)
    except UserError as error:
        return str(error)
    return None


def _no_specs(setting: str, message: str) -> str:
    """Return how reward functions are named, where a config names them as Python may."""
    value, path = _VALUE.search(message), _NO_IMPORT.search(message)
    given = (value and value[1]) or (path and (path[1] or path[3])) or ""
    name = _FUNCTION.search(given)
    got, fix = f"; got {given}", f": write [{{function: {name[0]}}}]" if name else ""
    return f"{setting} must be a list of {_FORMS['RewardSpec']}{got if given else ''}{fix}"


def unknown_module(name: str) -> str:
    """Return that there is no such module, with the likeliest one that was meant.

    >>> unknown_module("GRPOModul").partition("?")[0]
    "model: no module 'GRPOModul'; did you mean GRPOModule"
    """
    names = module_names()
    folded = {known.lower(): known for known in names}
    short = name.removeprefix(_OURS).lower()
    close = difflib.get_close_matches(short, folded, n=1) or difflib.get_close_matches(
        f"{short}module", folded, n=1
    )
    hint = f"did you mean {folded[close[0]]}? There" if close else "there"
    known = ", ".join(names)
    return f"model: no module {name!r}; {hint} are {known}, and package.module.Class of your own"


def settings_before_parsing(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the sections of config files, and what the command line says of the module.

    Raises:
        UserError: A file cannot be read.
    """
    fault = _config_file_fault(arguments)
    if fault:
        raise UserError(fault)
    found: dict[str, Any] = {}
    for path in config_files(arguments):
        found |= yaml.safe_load(Path(path).expanduser().read_text())
    given = zip(arguments, [*arguments[1:], ""], strict=False)
    for name, value in (
        *given,
        *((name, value) for name, equals, value in (a.partition("=") for a in arguments) if equals),
    ):
        if name in ("--model", "--model.class_path"):
            found["model"] = value
    return found


def unknown_setting(name: str, known: Iterable[str]) -> str:
    """Return that there is no such setting, with the likeliest one that was meant.

    >>> unknown_setting("sampling.grup_size", ["sampling.group_size", "sampling.top_k"])
    'unknown setting sampling.grup_size; did you mean sampling.group_size?'
    """
    known = list(known)
    section = name.rpartition(".")[0]
    beside = [other for other in known if other.rpartition(".")[0] == section]
    # A neighbour's setting of the same name is less likely than one of the same section.
    close = difflib.get_close_matches(name, beside or known, n=1, cutoff=0.8)
    if close:
        return f"unknown setting {name}; did you mean {close[0]}?"
    if not beside:
        section, beside = "", sorted({other.partition(".")[0] for other in known})
    names = ", ".join(other.removeprefix(f"{section}.") for other in beside)
    return f"unknown setting {name}; there are {names}{section and ' in ' + section}"


def _owner(message: str) -> type | None:
    """Return the class whose arguments a message is about, if there is one."""
    found = _CLASS.search(message)
    module, _, name = found[1].rpartition(".") if found else ("", "", "")
    try:
        owner: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return owner if inspect.isclass(owner) else None


def _setting(message: str, owner: type | None) -> str:
    """Return the dotted name of the setting that a message is about, or nothing."""
    keys = _KEY.findall(message)
    # The fields of a dataclass stand at its own level, the arguments of a class under init_args.
    if owner is not None and not is_dataclass(owner):
        keys.insert(1, "init_args")
    return ".".join(keys)


def _expected(text: str) -> str:
    choices = _CHOICES.search(text)
    if choices:
        return f"one of {choices[1].replace(chr(39), '')}"
    name = text.removeprefix("<class '").removesuffix("'>")
    return _TYPES.get(name, name)


def _held(owner: type, setting: str) -> type:
    """Return the dataclass that an argument of a class holds, the class itself if it holds none."""
    argument = inspect.signature(owner).parameters.get(setting.partition("init_args.")[2])
    kinds = () if argument is None else (argument.annotation, *get_args(argument.annotation))
    return next((kind for kind in kinds if inspect.isclass(kind) and is_dataclass(kind)), owner)


def _parameters(owner: type) -> list[str]:
    """Return the arguments of a class, those of its bases among them."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    package = owner.__module__.partition(".")[0]
    names = [
        parameter.name
        for base in inspect.getmro(owner)
        if base.__module__.partition(".")[0] == package
        for parameter in inspect.signature(base).parameters.values()
        if parameter.kind not in kinds
    ]
    return list(dict.fromkeys(names))


def _config_file_fault(arguments: Sequence[str]) -> str | None:
    """Return what is wrong with the first config file that cannot be read."""
    for path in config_files(arguments):
        try:
            content = yaml.safe_load(Path(path).expanduser().read_text())
        except OSError as error:
            return f"--config: cannot read {path}: {error.strerror}"
        except UnicodeDecodeError:
            return f"--config: {path} is no YAML file in UTF-8"
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            return f"{path}{where}: broken YAML: {error.problem}"
        if not isinstance(content, dict):
            return f"{path} must hold settings as `name: value`; got {content!r:.60}"
    return None
