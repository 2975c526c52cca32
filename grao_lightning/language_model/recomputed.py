"""Activations that cost next to nothing to compute again are not kept for the backward pass.

Norms, gates and products of a decoder are a third to a half of what autograd saves. Each is a
function, element by element, of tensors that are saved all the same, and is computed again from
them where the backward pass asks for it: by the same operations, so to the same bits.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Smaller tensors are kept: to compute them again would cost more than they take.
_LEAST_BYTES = 2**16


def cheap_activations_recomputed() -> AbstractContextManager[Any]:
    """Return a context in whose forward passes cheap activations are not kept.

    Which ones is read off autograd's graph, so no model has to be known: products, SiLU and GELU of
    saved tensors, and casts between them. Everything else is saved as ever, and as ever a saved
    tensor that was changed in place is refused in the backward pass.
    """
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def is_recomputed(values: Tensor) -> bool:
    """Return whether `cheap_activations_recomputed` does not keep a tensor that autograd saves."""
    return not isinstance(_pack(values), _Saved)


@dataclass(frozen=True)
class _Saved:
    """A tensor and how often it had been changed in place."""

    values: Tensor
    version: int


def _pack(values: Tensor) -> Any:
    node = values.grad_fn
    if node is not None and values.nbytes >= _LEAST_BYTES and values.is_contiguous():
        recipe = _recipe(node)
        if recipe is not None:
            return recipe
    return _Saved(values, values._version)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Saved):
        if packed.values._version != packed.version:
            raise RuntimeError(
                "a tensor that the backward pass needs was changed in place: it is at version "
                f"{packed.values._version}, and was saved at {packed.version}"
            )
        return packed.values
    with torch.no_grad():
        values: Tensor = packed()
        return values


def _recipe(node: Any) -> Callable[[], Tensor] | None:
    """Return how to compute a node's output again from what it and those before it have saved."""
    make = _RECIPES.get(node.name())
    return None if make is None else make(node)


def _product(node: Any) -> Callable[[], Tensor] | None:
    first, second = (edge for edge, _ in node.next_functions)
    # A factor is saved for the other's gradient; where that has none, it may be computed again.
    left = _operand(node, "_saved_self", saved=second is not None, source=first)
    right = _operand(node, "_saved_other", saved=first is not None, source=second)
    if left is None or right is None:
        return None
    return lambda: left() * right()


def _operand(node: Any, name: str, *, saved: bool, source: Any) -> Callable[[], Tensor] | None:
    if saved:
        return lambda: getattr(node, name)
    return None if source is None else _recipe(source)


def _silu(node: Any) -> Callable[[], Tensor]:
    return lambda: F.silu(node._saved_self)


def _gelu(node: Any) -> Callable[[], Tensor]:
    return lambda: F.gelu(node._saved_self, approximate=node._saved_approximate)


def _cast(node: Any) -> Callable[[], Tensor] | None:
    ((source, _),) = node.next_functions
    inner = None if source is None else _recipe(source)
    if inner is None:
        return None
    dtype = node._input_metadata[0].dtype
    return lambda: inner().to(dtype)


def _view(node: Any) -> Callable[[], Tensor] | None:
    ((source, _),) = node.next_functions
    inner = None if source is None else _recipe(source)
    if inner is None:
        return None
    shape = node._input_metadata[0].shape
    return lambda: inner().view(shape)


#: Name of autograd's node -> (node) -> its recipe
_RECIPES: dict[str, Callable[[Any], Callable[[], Tensor] | None]] = {
    "MulBackward0": _product,
    "SiluBackward0": _silu,
    "GeluBackward0": _gelu,
    "ToCopyBackward0": _cast,
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
}
