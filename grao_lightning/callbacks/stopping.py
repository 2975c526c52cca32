"""Ctrl-C and SIGTERM: the first asks to stop, in training at the end of a step; a second kills.

Imports nothing heavy, since a command listens from its first moment. Lightning's own ways are
replaced: on SIGTERM it broadcasts from within the handler, which meets whatever the other ranks are
at, and on SIGINT it saves in the middle of a step.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: `timeout` and others send one signal twice, to the process and to its group: that is one wish.
_SECONDS_BETWEEN = 0.5
_NOTICE = b"\ngrao: stopping at the end of this step, to keep it; once more stops at once\n"


class Stopped(BaseException):
    """A signal asks this process to end; no Exception, so that nothing takes it for a failure.

    Attributes:
        number: Of the signal.
        in_order: Whether a step has just ended, on all ranks, so that a checkpoint may be taken.
        advice: For people: how to go on.
    """

    def __init__(self, number: int, *, in_order: bool = False, advice: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.in_order = in_order
        self.advice = advice

    @property
    def status(self) -> int:
        """Return the exit status, as shells have it."""
        return 128 + self.number


@dataclass
class _Listener:
    """What this process has been asked.

    Attributes:
        process: That listens; those forked from it leave signals to it.
        received: Number of the first signal, and when it came.
        deferred: Whether a step is under way, at whose end `stop_if_asked` is called.
        kill_others: Ends processes that would be left alone.
    """

    process: int
    received: tuple[int, float] | None = None
    deferred: bool = False
    kill_others: list[Callable[[], Any]] = field(default_factory=list)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if os.getpid() != self.process:  # a data worker: it ends with the process it works for
            if number == signal.SIGTERM:
                _die(number)
            return
        now = time.monotonic()
        if self.received is None:
            self.received = number, now
            if not self.deferred:
                raise Stopped(number)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                os.write(2, _NOTICE)  # print may be what was interrupted
        elif now - self.received[1] > _SECONDS_BETWEEN:
            for kill in self.kill_others:
                kill()
            _die(number)


_listener: _Listener | None = None


@contextmanager
def listening() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into `Stopped`, and let the second end the process.

    A signal that is ignored, as for commands in the background, stays so. Does nothing outside the
    main thread, which alone gets signals.
    """
    global _listener
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, kept = _listener, {number: signal.getsignal(number) for number in _SIGNALS}
    _listener = _Listener(os.getpid())
    listen_again()
    try:
        yield
    finally:
        _listener = before
        for number, handler in kept.items():
            signal.signal(number, handler)


def listen_again() -> None:
    """Put our handlers in the place of those that have replaced them."""
    if _listener is not None:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _listener)


def defer(deferred: bool) -> None:
    """Say whether the first signal waits for `asked` to be looked at, or raises `Stopped` at once.

    Args:
        deferred: Whether it waits.
    """
    if _listener is not None:
        _listener.deferred = deferred


def before_dying(kill_others: Callable[[], Any]) -> None:
    """Have something called before a second signal kills this process."""
    if _listener is not None:
        _listener.kill_others.append(kill_others)


def listens() -> bool:
    """Return whether signals are turned into `Stopped` here."""
    return _listener is not None


def asked() -> int:
    """Return the number of the signal that asked this process to stop; 0: none has."""
    return _listener.received[0] if _listener is not None and _listener.received else 0


def _die(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
