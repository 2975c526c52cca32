"""Weights in the order in which oneDNN reads them, for as long as completions are decoded on a CPU.

A decoding step multiplies a few rows by every weight of the model. Products with weights as PyTorch
lays them out take about twice as long there as with weights laid out anew once before the first
token, which costs about one step and a second copy of the weights while it lasts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grao_lightning.language_model.adapted_linear import is_in_one_pass, with_adapter

#: Smaller weights lie in the processor's cache however they are laid out.
_LEAST_ELEMENTS = 2**16
_PRECISIONS = {torch.float32, torch.bfloat16}

Product = Callable[[Tensor], Tensor]


def product_with(weight: Tensor, bias: Tensor | None) -> Product:
    """Return ``x -> x W^T + b``, in the precision in which a linear module would compute now.

    The weight is laid out anew where that is faster; changes to it after this call may be missed.

    Args:
        weight: [out, in].
        bias: [out] or None.
    """
    if not _worth_packing(weight):
        return lambda x: F.linear(x, weight, bias)
    precision = _precision(weight)
    return _packed_product(weight.to(precision), bias, precision)


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """Let a model's linear modules read packed weights; it must not be changed meanwhile.

    An adapter is added to the weight it belongs to, which then is float32: rounded to bfloat16 the
    sum would lose the adapter, and a product with it by itself takes as long as that with a weight.
    """
    changed: list[nn.Module] = []
    try:
        for module, product in _products(model):
            module.forward = product
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _products(model: Any) -> Iterator[tuple[nn.Module, Product]]:
    """Yield the modules that shall read packed weights, and what they then compute."""
    below = set()  # linear modules whose weight is packed with its adapter
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if is_in_one_pass(module):
            base: Any = module.base_layer
            if type(base) is nn.Linear and _worth_packing(base.weight):
                precision = _precision(base.weight)
                whole = with_adapter(module, precision)
                if whole is not None:
                    below.add(base)
                    yield module, _packed_product(whole, base.bias, precision)
        elif type(module) is nn.Linear and module not in below and _worth_packing(module.weight):
            yield module, product_with(module.weight, module.bias)


def _packed_product(weight: Tensor, bias: Tensor | None, precision: torch.dtype) -> Product:
    """Return ``x -> x W^T + b``, computed in the weight's precision and rounded to another."""
    inner = weight.dtype
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    # The kernel reads no strides.
    added = None if bias is None else bias.detach().to(inner).contiguous()

    def product(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(inner), weight, added, "none", [], "")
        return y.to(precision)

    return product


def _precision(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def _worth_packing(weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu"
    if not plain or weight.numel() < _LEAST_ELEMENTS:
        return False
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and {weight.dtype, _precision(weight)} <= _PRECISIONS
