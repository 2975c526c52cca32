"""From host to device in one copy that nothing waits for. Pure: torch only."""

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNMENT = 16  # bytes, from which compiled kernels read fastest


def sent(device: torch.device, *parts: Tensor) -> list[Tensor]:
    """Return tensors of the host, all of one type, on a device; nothing waits for the copy.

    On CUDA they travel in one piece from pinned memory, which goes on while kernels run.

    Args:
        device: Where they go.
        parts: Of any shapes.
    """
    if device.type == "cpu":
        return list(parts)
    step = _ALIGNMENT // parts[0].element_size()
    sizes = [part.numel() for part in parts]
    whole = torch.cat([F.pad(part.flatten(), (0, -part.numel() % step)) for part in parts])
    if device.type == "cuda":
        whole = whole.pin_memory()
    pieces = whole.to(device, non_blocking=True).split([size + -size % step for size in sizes])
    both = zip(pieces, parts, strict=True)
    return [piece[: part.numel()].view(part.shape) for piece, part in both]
