"""What stays in float32 where a model is cast to half precision: what transformers keeps so itself.

A cast of the whole model, as Lightning's ``bf16-true`` makes it, would reach more than
``from_pretrained(dtype=torch.bfloat16)`` does: the gates of experts, whose near ties it would turn,
and the frequencies of positions, of which 8 bits turn the angles of far tokens to something else.
"""

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)


def keeping_float32(model: Any, move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function for ``torch.nn.Module._apply`` that casts to half what transformers would.

    Args:
        model: A Hugging Face model, whole or within the module that is moved; None: there is none.
        move: Moves or casts a parameter, buffer or gradient.
    """
    kept: dict[torch.dtype, set[int]] = {}

    def careful(values: Tensor) -> Tensor:
        moved = move(values)
        if model is None or moved.dtype not in _HALVES or values.dtype != torch.float32:
            return moved
        if moved.dtype not in kept:  # known before the first one is replaced
            kept[moved.dtype] = _kept(model, moved.dtype)
        return values.to(moved.device) if id(values) in kept[moved.dtype] else moved

    return careful


def float32_names(model: Any, dtype: torch.dtype) -> set[str]:
    """Return the parameters and buffers that transformers keeps in float32 in half precision.

    Args:
        model: A Hugging Face model, also one with adapters.
        dtype: bfloat16 or float16.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    patterns = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16:
        patterns += getattr(model, "_keep_in_fp32_modules", None) or ()
    asked = [re.compile(pattern.replace("*", ".*")) for pattern in patterns]
    made = _twin(model, dtype)
    return {
        name
        for name, _ in _tensors(model)
        if any(pattern.search(name) for pattern in asked)
        or made.get(name.replace(".base_layer", "")) == torch.float32
    }


def _kept(model: Any, dtype: torch.dtype) -> set[int]:
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = float32_names(model, dtype)
    chosen = [values for name, values in _tensors(model) if name in names]
    return {id(part) for values in chosen for part in (values, values.grad) if part is not None}


def _tensors(model: Any) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _twin(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the types of what the model's class makes in half precision, without memory."""
    with torch.device("meta"):
        twin = type(model)._from_config(deepcopy(model.config), dtype=dtype)
    return {name: values.dtype for name, values in _tensors(twin)}
