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

from grao_lightning.language_model.adapted_linear import adapter_of, is_in_one_pass

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
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(precision).contiguous())
    # The kernel reads no strides.
    added = None if bias is None else bias.detach().to(precision).contiguous()

    def product(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(precision), laid_out, added, "none", [], ""
        )
        return y

    return product


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """Let a model's linear modules read packed weights; it must not be changed meanwhile.

    In float32 an adapter is added to the weight it belongs to. Rounded to bfloat16 the sum would
    lose it, so there it stays by itself, in float32: small products take long in half precision.
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
    done = set()  # linear modules of which another one's product takes care
    for module in model.modules():
        if "forward" in vars(module) or module in done:
            continue
        if type(module) is nn.Linear and _worth_packing(module.weight):
            yield module, product_with(module.weight, module.bias)
        elif is_in_one_pass(module):
            product = _adapted_product(module)
            if product is not None:
                done.add(module.base_layer)
                yield module, product


def _adapted_product(layer: Any) -> Product | None:
    base, adapter = layer.base_layer, adapter_of(layer)
    if adapter is None or type(base) is not nn.Linear or not _worth_packing(base.weight):
        return None
    down, up = adapter
    if _precision(base.weight) == torch.float32:
        return product_with(torch.addmm(base.weight, up, down), base.bias)
    whole = product_with(base.weight, base.bias)

    def product(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return whole(x).add_(F.linear(F.linear(x.float(), down), up))

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
