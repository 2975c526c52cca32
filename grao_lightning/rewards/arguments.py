"""Callables as scorers are called: with arguments of the config, or with conversations."""

import difflib
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from grao_lightning.data.encoding import conversation_of
from grao_lightning.data.turns import Message
from grao_lightning.faults import UserError

#: What every scorer is called with, as far as it names it.
BUILT_IN = ("prompts", "completions", "reference_answers", "truncated")


def innermost(function: Any) -> Any:
    """Return the callable below partials and the wrappers of this file."""
    while True:
        if isinstance(function, partial):
            function = function.func
        elif isinstance(function, _Wrapped):
            function = function.__wrapped__
        else:
            return function


def name_of(function: Any) -> str:
    """Return the name of a callable, of a partial that of its function."""
    function = innermost(function)
    name: str = getattr(function, "__name__", type(function).__name__)
    return name.strip("<>")  # as of a lambda


def with_arguments(function: Any, arguments: Mapping[str, Any], label: str) -> Any:
    """Return a callable that is called with further arguments each time.

    Args:
        function: A function, a partial or an instance that can be called.
        arguments: By name; empty: the callable itself is returned.
        label: Its name, for messages.

    Raises:
        UserError: It takes no argument of a name, or that one is not the config's to give.
    """
    if not arguments:
        return function
    parameters = inspect.signature(function).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    named = [
        name
        for name, one in parameters.items()
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and name not in BUILT_IN
    ]
    for name in arguments:
        if name in BUILT_IN:
            raise UserError(
                f"scoring.rewards: arguments of {label} must not hold {name}, which comes from the "
                "data: remove it"
            )
        if name not in named and not takes_any:
            close = difflib.get_close_matches(name, named, n=1)
            meant = f"did you mean {close[0]}?" if close else "remove it, or add the parameter"
            raise UserError(
                f"scoring.rewards: arguments of {label} must be parameters of it "
                f"({', '.join(named) or 'it has none besides those of the data'}); got {name}: "
                f"{meant}"
            )
    return _WithArguments(function, dict(arguments))


class _Wrapped:
    """Is like the callable it wraps in everything but how that is called."""

    def __init__(self, function: Any) -> None:
        self.__wrapped__ = function
        self.__name__ = name_of(function)

    def __getattr__(self, name: str) -> Any:
        if name == "__wrapped__":  # while it is copied or unpickled, before it is made
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)


class _WithArguments(_Wrapped):
    """Calls a function with further arguments."""

    def __init__(self, function: Any, arguments: dict[str, Any]) -> None:
        super().__init__(function)
        self._arguments = arguments
        signature = inspect.signature(function)
        rest = [one for name, one in signature.parameters.items() if name not in arguments]
        self.__signature__ = signature.replace(parameters=rest)

    def __call__(self, **given: Any) -> Any:
        return self.__wrapped__(**{**given, **self._arguments})


class AsMessages(_Wrapped):
    """Calls a function with conversations where it would get texts, as TRL's trainers do.

    Args:
        function: Gets as ``prompts`` lists of messages, as each of ``completions`` and
            ``reference_answers`` a list of one message, the assistant's.
    """

    def __call__(self, **given: Any) -> Any:
        if "prompts" in given:
            given["prompts"] = [_conversation(text) for text in given["prompts"]]
        for name in ("completions", "reference_answers"):
            if name in given:
                given[name] = [[{"role": "assistant", "content": text}] for text in given[name]]
        return self.__wrapped__(**given)


def _conversation(prompt: str) -> list[Message]:
    turns = conversation_of(prompt)
    return [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
