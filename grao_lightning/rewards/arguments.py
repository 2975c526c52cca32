"""Callables with some of their arguments given by the config."""

import difflib
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from grao_lightning.faults import UserError

#: What every scorer is called with, as far as it names it.
BUILT_IN = ("prompts", "completions", "reference_answers", "truncated", "messages")


def name_of(function: Any) -> str:
    """Return the name of a callable, of a partial that of its function."""
    while isinstance(function, partial):
        function = function.func
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


class _WithArguments:
    """Calls a function with further arguments, and is like it in everything else."""

    def __init__(self, function: Any, arguments: dict[str, Any]) -> None:
        self.__wrapped__ = function
        self._arguments = arguments
        signature = inspect.signature(function)
        rest = [one for name, one in signature.parameters.items() if name not in arguments]
        self.__signature__ = signature.replace(parameters=rest)
        self.__name__ = name_of(function)

    def __call__(self, **given: Any) -> Any:
        return self.__wrapped__(**{**given, **self._arguments})

    def __getattr__(self, name: str) -> Any:
        if name == "__wrapped__":  # while it is copied or unpickled, before it is made
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)


class AsMessages:
    """Calls a function with conversations where it would get texts, as TRL's trainers do.

    Args:
        function: Gets as ``prompts`` lists of messages, as each of ``completions`` and
            ``reference_answers`` a list of one message, the assistant's.
    """

    def __init__(self, function: Any) -> None:
        self.__wrapped__ = function
        self.__name__ = name_of(function)
        signature = inspect.signature(function)
        parameters = dict(signature.parameters)
        if "prompts" in parameters:
            prompts = parameters.pop("prompts").replace(name="messages")
            parameters = {"messages": prompts, **parameters}
        self.__signature__ = signature.replace(
            parameters=sorted(parameters.values(), key=lambda one: one.kind)
        )

    def __call__(self, **given: Any) -> Any:
        messages = given.pop("messages", None)
        if messages is not None:
            given["prompts"] = messages
        for name in ("completions", "reference_answers"):
            if name in given:
                given[name] = [[{"role": "assistant", "content": text}] for text in given[name]]
        return self.__wrapped__(**given)

    def __getattr__(self, name: str) -> Any:
        if name == "__wrapped__":  # while it is copied or unpickled, before it is made
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)
