"""Activations that wait for the backward pass in the host's memory."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def activations_on_host(model: Any, device_type: str = "cuda") -> AbstractContextManager[Any]:
    """Return a context in which what autograd saves of a model's pass waits on the host.

    As `torch.autograd.graph.save_on_cpu`, which would move the weights too. Copies are queued
    behind the device's own work in both directions, so nothing waits for them by itself.

    Args:
        model: Whose weights stay where they are.
        device_type: What is moved from.
    """
    weights = {part.untyped_storage().data_ptr() for part in model.parameters()}
    pinned = torch.cuda.is_available()

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        stays = tensor.device.type != device_type
        if stays or tensor.untyped_storage().data_ptr() in weights:
            return tensor.device, tensor
        host = torch.empty(
            tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=pinned
        )
        host.copy_(tensor, non_blocking=pinned)
        return tensor.device, host

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=pinned)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
