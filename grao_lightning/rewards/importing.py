"""Functions and classes by name: of installed modules, and of the user's own files.

Own modules are looked for in the working directory and beside the config files, behind all that is
installed: a file named ``random.py`` or ``datasets.py`` there breaks nothing. Where an installed
module hides such a file, that is said. Imports nothing heavy.
"""

import difflib
import hashlib
import importlib
import importlib.util
import itertools
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from grao_lightning.faults import UserError

log = logging.getLogger(__name__)

_PACKAGE = __name__.partition(".")[0]
_NOTE = "own modules: "
_folders: list[Path] = []  # of own modules, in the order in which they are searched


def config_files(arguments: Sequence[str]) -> list[str]:
    """Return the config files that arguments name."""
    following = zip(arguments, [*arguments[1:], ""], strict=False)
    return [value for name, value in following if name in ("-c", "--config")] + [
        name.partition("=")[2] for name in arguments if name.startswith("--config=")
    ]


def find_own_modules(arguments: Sequence[str]) -> None:
    """Let imports find modules in the working directory and beside the config files.

    Args:
        arguments: Of the command.
    """
    here = Path.cwd()
    if sys.path and sys.path[0] in ("", str(here)):  # `python -m` puts it before all others
        del sys.path[0]
    _search(here)
    for file in map(Path, config_files(arguments)):
        _search(file.expanduser().resolve().parent)
        for folder in _noted(file.expanduser()):
            _search(folder)


def own_modules_note() -> str:
    """Return a line for the config that a run leaves, so that it finds its modules from there."""
    return f"{_NOTE}{os.pathsep.join(map(str, _own_folders()))}"


@contextmanager
def own_modules(arguments: Sequence[str]) -> Iterator[None]:
    """Find own modules for a while, and forget them: the next run may have others of their name.

    Args:
        arguments: Of the command.
    """
    path, folders, before = list(sys.path), list(_folders), set(sys.modules)
    find_own_modules(arguments)
    try:
        yield
    finally:
        for name in sys.modules.keys() - before:
            if name.partition(".")[0] not in before and _is_own(sys.modules[name]):
                del sys.modules[name]
        sys.path[:], _folders[:] = path, folders


def load_object(path: str) -> Any:
    """Return a function or class by ``package.module.name`` or ``folder/file.py:name``.

    Args:
        path: A file is looked for in the working directory and beside the config files.

    Raises:
        UserError: There is none; the message says what was looked for, where, and the fix.
    """
    file, _, name = path.partition(":") if ".py:" in path or path.endswith(".py") else ("", "", "")
    if file:
        module = _module_of_file(path, file)
    else:
        module_name, _, name = path.replace(":", ".").rpartition(".")
        module = _module_by_name(path, module_name)
    found = getattr(module, name, None) if name else None
    hidden = "" if file else _hidden_file(module.__name__)
    if not callable(found):
        raise UserError(f"cannot import {path!r}: {hidden or _lack(module, name, found)}")
    if hidden:
        log.warning("%s: %s", path, hidden)
    return found


def _hidden_file(module_name: str) -> str:
    """Return that an installed module hides an own file of its name, and the fix, or nothing."""
    top = module_name.partition(".")[0]
    own, spec = _own_files(top), _spec(top)
    if not own or spec is None or _is_file(spec.origin, own):
        return ""
    return (
        f"the installed module {top} ({spec.origin or 'a folder'}) hides {own[0]}: rename that "
        f"file; a reward function may be named as {own[0].name}:its_name instead"
    )


def _module_by_name(path: str, name: str) -> ModuleType:
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise UserError(
            f"cannot import {path!r}: give the path of a function or class as module.name, or as "
            "my_rewards.py:name"
        )
    if not _hidden_file(name):
        _refuse_two(path, _own_files(name.partition(".")[0]))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failure(path, error) from error  # another one, which the module imports
        raise UserError(_not_found(path, error.name)) from None
    except (Exception, SystemExit) as error:  # a user's file may do anything
        raise _failure(path, error) from error


def _module_of_file(path: str, file: str) -> ModuleType:
    places = _own_folders()
    found = [place for folder in places if (place := folder / Path(file).expanduser()).is_file()]
    if not found:
        at = list(dict.fromkeys((folder / Path(file).expanduser()).parent for folder in places))
        names = [place.name for folder in at for place in folder.glob("*.py")]
        raise UserError(
            f"cannot import {path!r}: no such file: {file} (looked in {', '.join(map(str, at))})"
            f"{_meant(Path(file).name, names) or '; give its path'}"
        )
    _refuse_two(path, found)
    source = found[0].resolve()
    _search(source.parent)  # for what it imports from beside it
    spec = _spec(source.stem) if source.stem.isidentifier() else None
    try:
        if spec is not None and _is_file(spec.origin, [source]):
            return importlib.import_module(source.stem)  # once, however it is named
        return _imported_apart(source)
    except (Exception, SystemExit) as error:
        raise _failure(path, error) from error


def _imported_apart(source: Path) -> ModuleType:
    """Return the module of a file whose name belongs to another module."""
    name = f"own_{hashlib.sha256(str(source).encode()).hexdigest()[:8]}_{source.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# -- what is told ----------------------------------------------------------------------------------


def _not_found(path: str, missing: str) -> str:
    places = _own_folders()
    top, _, rest = missing.partition(".")
    if rest:
        return f"cannot import {path!r}: {top} has no module {rest}; give module.name"
    names = [file.stem for folder in places for file in folder.glob("*.py")]
    return (
        f"cannot import {path!r}: no {top}.py in {' or '.join(map(str, places))}, and no installed "
        f"package {top}{_meant(top, names) or ': put it there, or give its name in full'}"
    )


def _lack(module: ModuleType, name: str, found: Any) -> str:
    where = module.__file__ or module.__name__
    if found is not None:
        return f"{name} must be a function or class in {where}; got {found!r:.60}"
    defined = getattr(module, "__all__", None) or [
        other
        for other, value in vars(module).items()
        if callable(value) and not other.startswith("_")
        if getattr(value, "__module__", None) == module.__name__
    ]
    what = f"has no {name!r}" if name else "must be followed by :name"
    listed = ", ".join(defined[:20]) or "no function or class"
    return f"{where} {what}; it defines {listed}{_meant(name, defined)}"


def _meant(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f": did you mean {close[0]}?" if close else ""


def _refuse_two(path: str, files: Sequence[Path]) -> None:
    """Refuse what could be either of two files.

    Raises:
        UserError: The files differ.
    """
    if len({file.read_bytes() for file in files}) > 1:
        raise UserError(
            f"cannot import {path!r}: it may be {' or '.join(map(str, files))}, which differ: "
            f"give the whole path, as in {files[0]}:name"
        )


def _failure(path: str, error: BaseException) -> UserError:
    """Return what went wrong in a file that is imported, and in which line."""
    if isinstance(error, SyntaxError):
        place, reason = f"{error.filename}, line {error.lineno}", error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [
            frame
            for frame in frames
            if frame.filename != __file__ and any(_below(frame.filename, at) for at in _folders)
        ]
        frame = (own or frames)[-1]
        place = f"{frame.filename}, line {frame.lineno}"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    fix = f"install {error.name}" if isinstance(error, ModuleNotFoundError) else "mend that line"
    return UserError(f"cannot import {path!r}: {place}: {reason}; {fix}")


# -- where things lie ------------------------------------------------------------------------------


def _noted(config: Path) -> list[Path]:
    """Return the folders that a config names, as `own_modules_note` has written them."""
    try:
        with config.open() as lines:
            head = list(itertools.islice(lines, 3))
    except (OSError, UnicodeDecodeError):  # which the parser tells
        return []
    noted = [line.strip().partition(_NOTE)[2] for line in head if line.startswith(f"# {_NOTE}")]
    return [Path(folder) for line in noted for folder in line.split(os.pathsep)]


def _search(folder: Path) -> None:
    if folder not in _folders:
        _folders.append(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()


def _own_folders() -> list[Path]:
    """Return the folders; outside the command line, in a notebook, the working directory."""
    return list(dict.fromkeys(_folders)) or [Path.cwd()]


def _own_files(top: str) -> list[Path]:
    """Return the files that a module may be, one a folder of own modules."""
    if top == _PACKAGE:  # its checkout is a usual working directory
        return []
    found = []
    for folder in _own_folders():
        files = (folder / top / "__init__.py", folder / f"{top}.py")  # as Python looks for them
        found += [file for file in files if file.is_file()][:1]
    return found


def _spec(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # some modules that are loaded have none
        return None


def _is_own(module: Any) -> bool:
    return any(_below(getattr(module, "__file__", None) or "", folder) for folder in _folders)


def _is_file(origin: str | None, files: Sequence[Path]) -> bool:
    return origin is not None and Path(origin).exists() and any(map(Path(origin).samefile, files))


def _below(file: str, folder: Path) -> bool:
    return Path(file).is_relative_to(folder) and "site-packages" not in file
