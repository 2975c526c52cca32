"""A model that is read and never trained, kept beside what is trained and not within it."""

from collections.abc import Callable
from typing import Any, TypeVar

from grao_lightning.language_model.precision import keeping_float32
from grao_lightning.language_model.sharded import shards_of

Found = TypeVar("Found")


class FrozenModel:
    """Holds a model out of the module tree.

    No optimiser, checkpoint or wrapper of a strategy then takes it for a part of what is trained.
    Whoever holds it moves and casts it.

    Args:
        model: A Hugging Face model; from now on it evaluates and needs no gradient.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.requires_grad_(False).eval()

    def inside(self, function: Callable[[Any], Found]) -> Found:
        """Return what a function of the model gives, see `inside`."""
        return inside(self.model, function)

    def follow(self, move: Callable[..., Any]) -> None:
        """Move or cast the model as ``torch.nn.Module._apply`` does with a tree that holds it."""
        self.model._apply(keeping_float32(self.model, move))


def inside(model: Any, function: Callable[[Any], Found]) -> Found:
    """Return what a function of a model gives: the one way to whatever reads a model's weights.

    Args:
        model: A Hugging Face model, or a `FrozenModel`.
        function: Is handed the Hugging Face model.
    """
    if isinstance(model, FrozenModel):
        return model.inside(function)
    shards = shards_of(model)
    return function(model) if shards is None else shards.inside(lambda: function(model))


def gathered(model: Any, function: Callable[[Any], Found]) -> Found:
    """Return what a function of a model gives that needs all weights at hand, without gradients.

    Where weights are dealt out over ranks, each holds the whole model meanwhile.

    Args:
        model: A Hugging Face model, or a `FrozenModel`.
        function: Is handed the Hugging Face model; the ranks' passes may differ in number.
    """
    shards = shards_of(bare(model))
    if shards is None:
        return inside(model, function)
    return shards.gathered(lambda: inside(model, function))


def bare(model: Any) -> Any:
    """Return the Hugging Face model of a `FrozenModel`, any other model as it is.

    For what reads the configuration alone; weights are read `inside`.
    """
    return model.model if isinstance(model, FrozenModel) else model
