"""What the callbacks that work on a batch before its step have in common."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer

from grao_lightning.batch import PromptBatch


def clock(device: torch.device) -> float:
    """Return the time in seconds at which all that a device was given to do is done.

    CUDA works behind the program's back: without waiting, a phase's time falls on the next one.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def phase(trainer: Trainer, batch: PromptBatch, name: str) -> Iterator[None]:
    """Run a stage in the step's precision, without gradients, and add its wall time to the batch.

    Lightning calls the hooks before a step outside autocast and with gradients on.
    """
    device = trainer.strategy.root_device
    started = clock(device)
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        yield
    batch.seconds[name] = batch.seconds.get(name, 0.0) + clock(device) - started


class RareWarning:
    """Says a thing when it first happens, then at most once in ``every`` steps."""

    def __init__(self, every: int = 100) -> None:
        self._every = every
        self._next_step = 0

    def due(self, step: int, happened: Any) -> bool:
        """Return whether to speak now."""
        if not happened or step < self._next_step:
            return False
        self._next_step = step + self._every
        return True
