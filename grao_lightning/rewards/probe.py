"""Every reward function of the user's is tried on two rows before a model loads."""

import traceback
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng

from grao_lightning.faults import UserError
from grao_lightning.rewards.arguments import AsMessages, innermost
from grao_lightning.rewards.protocol import RewardFunction, call_rewards

_PACKAGE = __name__.partition(".")[0]


def is_probed(function: RewardFunction) -> bool:
    """Return whether a scorer is tried: ours are not, which may load models or ask judges."""
    inner = innermost(function)
    own = inner if hasattr(inner, "__name__") else type(inner)
    module = getattr(own, "__module__", "") or ""
    return module.partition(".")[0] != _PACKAGE


def probe_fault(
    label: str, function: RewardFunction, arguments: dict[str, list[Any]], where: str
) -> str | None:
    """Return what goes wrong when a scorer is called; it leaves no trace in random numbers.

    Args:
        label: Its name.
        function: As `RewardSpec.load` gives it.
        arguments: Of a few rows, see `call_rewards`.
        where: The rows come from, for the message.
    """
    error = _raised(function, arguments)
    if error is None:
        return None
    told = f"reward function {label} fails on the first rows of {where}"
    if isinstance(error, UserError):
        return f"{told}: {error}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    told += f": {frame.filename}, line {frame.lineno}: {type(error).__name__}: {error}"
    if not isinstance(function, AsMessages) and _raised(AsMessages(function), arguments) is None:
        return f"{told}; it reads conversations, as TRL's may: add format: messages to its entry"
    return f"{told}; completions and reference_answers are lists of texts: mend that line"


def _raised(function: RewardFunction, arguments: dict[str, list[Any]]) -> Exception | None:
    try:
        with isolate_rng():
            call_rewards([function], arguments)
    except Exception as error:  # a user's function may raise anything
        return error
    if hasattr(function, "statistics"):
        function.statistics()  # what it tells of itself is about the run
    return None
