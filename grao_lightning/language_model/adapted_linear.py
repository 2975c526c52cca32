"""A linear map with its adapter in fewer passes over its output than peft takes.

peft forms ``B A x``, scales it and adds it, each in memory of the output's size, and so again for
the gradient. Here the small ``A x`` is scaled, and the product with B added while it is formed:
the same sum in another order.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


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


@lru_cache(maxsize=1)
def _in_one_pass() -> type:
    from peft.tuners.lora import Linear

    class InOnePass(Linear):
        def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
            layer: Any = self
            if args or options or not _plain(layer, x):
                whole: Tensor = super().forward(x, *args, **options)
                return whole
            (name,) = layer.active_adapters
            low = layer.lora_A[name](layer.lora_dropout[name](x)) * layer.scaling[name]
            base = layer.base_layer(x)
            expand = layer.lora_B[name].weight.t()
            rows = base.reshape(-1, base.shape[-1])
            return torch.addmm(rows, low.reshape(len(rows), -1), expand).view_as(base)

    return InOnePass


def _plain(layer: Any, x: Tensor) -> bool:
    """Return whether a layer adds the product of one A and one B, in the precision of its input."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant:
        return False
    same = x.dtype == layer.lora_A[name].weight.dtype or torch.is_autocast_enabled(x.device.type)
    return same and layer.lora_B[name].bias is None
