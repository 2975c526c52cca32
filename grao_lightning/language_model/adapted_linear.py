"""A linear map with its adapter in fewer passes over its output than peft takes.

peft forms ``B A x``, scales it and adds it, each in memory of the output's size, and so again for
the gradient. Here the small ``A x`` is scaled, and the product with B added while it is formed:
the same sum in another order. A model in half precision has adapters in float32: their weights are
rounded for the products, as under autocast, where peft would turn every input into float32.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def add_in_one_pass(model: Any) -> None:
    """Change the adapted linear maps of a model whose weights are not dealt out over ranks.

    Those of few bits, and adapters other than plain LoRA, stay as peft has them. Sharded ones have
    to: their weights are whole within the passes of their own modules alone.

    Args:
        model: With peft's adapters; changed in place.
    """
    from peft.tuners.lora import Linear

    for part in model.modules():
        if type(part) is Linear:
            part.__class__ = _in_one_pass()


def is_in_one_pass(module: Any) -> bool:
    """Return whether a module is an adapted linear map that `add_in_one_pass` has changed."""
    return getattr(module, "adds_in_one_pass", False)


def adapter_of(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Return A [rank, in] and the scaled B [out, rank], float32; None where that is not it.

    Args:
        layer: Of `is_in_one_pass`, in evaluation: dropout is left out.
    """
    if not _plain(layer, layer.base_layer.weight):
        return None
    (name,) = layer.active_adapters
    down, up = (part[name].weight.float() for part in (layer.lora_A, layer.lora_B))
    return down, up * layer.scaling[name]


@lru_cache(maxsize=1)
def _in_one_pass() -> type:
    from peft.tuners.lora import Linear

    class InOnePass(Linear):
        adds_in_one_pass = True

        def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
            layer: Any = self
            if args or options or not _plain(layer, x):
                whole: Tensor = super().forward(x, *args, **options)
                return whole
            (name,) = layer.active_adapters
            down, up = (part[name].weight.to(x.dtype) for part in (layer.lora_A, layer.lora_B))
            low = F.linear(layer.lora_dropout[name](x), down) * layer.scaling[name]
            base = layer.base_layer(x)
            rows = base.reshape(-1, base.shape[-1])
            return torch.addmm(rows, low.reshape(len(rows), -1), up.t()).view_as(base)

    return InOnePass


def _plain(layer: Any, x: Tensor) -> bool:
    """Return whether a layer adds the product of one A and one B, at most in their precision."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant:
        return False
    down, up = layer.lora_A[name], layer.lora_B[name]
    if type(down) is not nn.Linear or type(up) is not nn.Linear or up.bias is not None:
        return False
    own = down.weight.dtype
    return torch.promote_types(x.dtype, own) == own or torch.is_autocast_enabled(x.device.type)
