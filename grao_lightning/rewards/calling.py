"""How scorers are called: async ones beside the others, and one by one where a call fails."""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from grao_lightning.faults import UserError

Call = tuple[Callable[..., Any], Mapping[str, Sequence[Any]]]
#: (scorer, the text it was called with, what it raised)
Failed = Callable[[Any, str, Exception], None]


def call_all(calls: Sequence[Call]) -> list[Any]:
    """Return what every callable returns, or the exception it raises.

    Args:
        calls: Callables, sync or async, each with its arguments by name.
    """
    # A thread of its own: the caller may sit in a running event loop, as in a notebook.
    with ThreadPoolExecutor(max_workers=1) as executor:

        def awaited(started: dict[int, Any]) -> Future[dict[int, Any]]:
            return executor.submit(asyncio.run, _gathered(started))

        asynchronous = {at for at, (function, _) in enumerate(calls) if _is_async(function)}
        beside = awaited({at: _called(*calls[at]) for at in sorted(asynchronous)})
        found = {at: _called(*call) for at, call in enumerate(calls) if at not in asynchronous}
        late = {at: result for at, result in found.items() if inspect.isawaitable(result)}
        found |= awaited(late).result() | beside.result()
    return [found[at] for at in range(len(calls))]


def call_one_by_one(
    function: Callable[..., Any], arguments: Mapping[str, Sequence[Any]], failed: Failed
) -> list[Any]:
    """Return the scores of texts that a callable is asked for singly, NaN where it raises.

    Args:
        function: A scorer.
        arguments: Lists of one length, by name.
        failed: Told of every text for which it raises an exception.

    Raises:
        UserError: It raises one, which is about settings.
    """
    rows = [
        {name: [value] for name, value in zip(arguments, values, strict=True)}
        for values in zip(*arguments.values(), strict=True)
    ]
    scores = []
    for row in rows:
        (result,) = call_all([(function, row)])
        if isinstance(result, UserError):
            raise result
        if isinstance(result, Exception):
            failed(function, str(row.get("completions", [""])[0]), result)
            result = [math.nan]
        scores.extend(result)
    return scores


def _called(function: Callable[..., Any], arguments: Mapping[str, Sequence[Any]]) -> Any:
    try:
        return function(**arguments)
    except Exception as error:  # a user's function may raise anything
        return error


def _is_async(function: Any) -> bool:
    function = inspect.unwrap(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )


async def _gathered(started: dict[int, Awaitable[Any]]) -> dict[int, Any]:
    early = {at: one for at, one in started.items() if isinstance(one, Exception)}
    late = {at: one for at, one in started.items() if at not in early}
    results = await asyncio.gather(*late.values(), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Exception):
            raise result
    return {**early, **dict(zip(late, results, strict=True))}
