"""The policy as it was before training, within a policy whose adapters alone are trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from grao_lightning.language_model.adapters import START, adapted_layers
from grao_lightning.language_model.frozen import Found, FrozenModel, inside


class BeforeTraining(FrozenModel):
    """A policy as it was before training: itself with its adapters off, or those it began with.

    It has no weights of its own, so there is nothing to move along or to keep.

    Args:
        model: The policy, with adapters within.
        start: Whether it began with adapters, which stand besides.
    """

    def __init__(self, model: Any, start: bool = False) -> None:
        self.model = model
        self._start = start

    def inside(self, function: Callable[[Any], Found]) -> Found:
        """Return what a function of the model gives while the training's part is off."""
        with _as_before(self.model, self._start):
            return inside(self.model, function)

    def follow(self, move: Callable[..., Any]) -> None:
        """Do nothing: whoever holds the policy moves it."""


@contextmanager
def _as_before(model: Any, start: bool) -> Iterator[None]:
    """Switch to the adapters of before, or to none, and to evaluation; then back to what it was."""
    modes = [(part, part.training) for part in model.modules()]
    layers = adapted_layers(model)
    states = [(layer, layer.disable_adapters, layer.active_adapters) for layer in layers]
    model.eval()
    try:
        with _gradients_as_they_are(layers):
            for layer in layers:
                if start:
                    layer.set_adapter(START)
                else:
                    layer.enable_adapters(False)
        yield
    finally:
        with _gradients_as_they_are(layers):
            for layer, were_off, active in states:
                layer.set_adapter(active)
                layer.enable_adapters(not were_off)
        for part, mode in modes:
            part.training = mode


@contextmanager
def _gradients_as_they_are(layers: list[Any]) -> Iterator[None]:
    """Leave what is trained as it is: peft's switches also say what needs a gradient."""
    needs = [(parameter, parameter.requires_grad) for layer in layers
             for parameter in layer.parameters()]  # fmt: skip
    try:
        yield
    finally:
        for parameter, need in needs:
            parameter.requires_grad_(need)
