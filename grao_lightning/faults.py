"""Config faults: collected from every part, told together before any model loads."""

import difflib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any


class UserError(ValueError):
    """What a user can mend: a setting, a file, their combination. Shown without traceback."""


class NamedSettings:
    """Tells a misspelt keyword of a constructor, and which one was meant."""

    if not TYPE_CHECKING:  # editors and type checkers look at `__init__` alone

        def __new__(cls, *_: Any, **keywords: Any) -> Any:
            """Refuse unknown keywords before anything is made."""
            refuse_unknown(cls.__name__, cls, keywords)
            return super().__new__(cls)


class Faults(list[str]):
    """Messages, each naming the setting, the rule, the value and the fix."""

    def add(self, *messages: str | None) -> None:
        """Keep the messages that are not None."""
        self.extend(message for message in messages if message)

    def at_least(self, setting: str, value: float, minimum: float, reason: str = "") -> None:
        """Note a value below its minimum."""
        if self._is_number(setting, value) and value < minimum:
            self.add(f"{setting} must be >= {minimum}{reason and ': ' + reason}; got {value}")

    def between(self, setting: str, value: float, low: float, high: float) -> None:
        """Note a value outside [low, high]."""
        if self._is_number(setting, value) and not low <= value <= high:
            self.add(f"{setting} must lie in [{low}, {high}]; got {value}")

    def _is_number(self, setting: str, value: Any) -> bool:
        """Return whether it is one, or note that: in Python no parser has looked at it."""
        if isinstance(value, int | float):
            return True
        self.add(f"{setting} must be a number; got {value!r}")
        return False

    def one_of(self, setting: str, value: str, valid: Iterable[str]) -> None:
        """Note a value that is no valid choice."""
        if value not in valid:
            self.add(f"{setting} must be one of {', '.join(valid)}; got {value!r}")

    def raise_as_one(self) -> None:
        """Raise one error in one line, for arguments whose owner the catcher names.

        Raises:
            UserError: There are faults.
        """
        if self:
            raise UserError("; ".join(self))

    def raise_if_any(self, where: str = "in the configuration") -> None:
        """Raise one error that lists all faults, if there are any.

        Args:
            where: They are, for the headline.

        Raises:
            UserError: There are faults.
        """
        if self:
            count = "1 fault" if len(self) == 1 else f"{len(self)} faults"
            raise UserError("\n  - ".join([f"{count} {where}:", *self]))


def extra_fault(what: str, packages: Sequence[str], extra: str) -> str | None:
    """Return that optional packages are missing, and how they are installed.

    Args:
        what: Needs them.
        packages: By the names that are imported.
        extra: Of grao-lightning, which brings them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{what} needs {' and '.join(missing)}: pip install 'grao-lightning[{extra}]'"


def refuse_unknown(name: str, called: Callable[..., Any], keywords: Iterable[str]) -> None:
    """Refuse keywords that a call does not have, naming the likeliest one that was meant.

    Args:
        name: Of what is called, for the message.
        called: Has the parameters.
        keywords: Of the call.

    Raises:
        TypeError: One is unknown.
    """
    parameters = inspect.signature(called).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for keyword in keywords:
        if keyword not in parameters:
            close = difflib.get_close_matches(keyword, parameters, n=1, cutoff=0.7)
            meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(parameters)}"
            raise TypeError(f"{name}() has no keyword {keyword!r}; {meant}")
