"""What makes settings that a module passes on to its base visible: signature and documentation."""

import inspect
import re
from typing import (
    Any,
    get_origin,  # torch brings it
)

from typing_extensions import Unpack


def show_settings(cls: type) -> None:
    """Give a class signature and docstring of all its settings, those of its base among them.

    For classes whose ``__init__`` passes ``**settings: Unpack[...]`` on to the base; others keep
    their own. Each setting is documented once, by the class that has it.
    """
    init: Any = cls.__dict__.get("__init__")
    if init is None:  # it has those of its base
        return
    cls.__signature__ = None  # type: ignore[attr-defined] # nor that of its base
    own = inspect.signature(init)
    *parameters, passed = own.parameters.values()
    if get_origin(passed.annotation) is not Unpack:
        return
    # The command line's parser would take names and types from there, and lose the defaults.
    init.__annotations__[passed.name] = Any
    base = cls.__mro__[1]
    inherited = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(base).parameters.values()
    ]
    # On the class and not on `__init__`: Lightning reads its frame by the signature of that.
    cls.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[1:], *inherited], return_annotation=inspect.Signature.empty
    )
    cls.__doc__ = _with_settings(cls.__doc__ or "", passed.name, _settings_text(base))


def _with_settings(doc: str, name: str, settings: str) -> str:
    """Return a class docstring with the settings of the base in place of those passed on."""
    entry = re.compile(rf"^ {{8}}{name}:.*\n(?: {{12}}.*\n)*", re.MULTILINE)
    return entry.sub(lambda _: settings, doc, count=1)


def _settings_text(base: type) -> str:
    """Return the entries of the Args section of a class docstring."""
    _, _, after = (base.__doc__ or "").partition("    Args:\n")
    lines = []
    for line in after.splitlines(keepends=True):
        if not line.startswith(" " * 8):
            break
        lines.append(line)
    return "".join(lines)
