"""Which of two models a file of weights belongs to."""

import hashlib
from collections.abc import Collection
from typing import Any

import torch


def fingerprint(model: Any, without: Collection[str] = (), *, roughly: bool = False) -> str:
    """Return what tells the weights of two models apart, on whatever device, from a few of each.

    Args:
        model: Any.
        without: Names of parameters that do not count.
        roughly: As bfloat16 has them, so that weights read in that precision are the same.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name in without:
            continue
        whole = parameter.detach()
        whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        few = whole.flatten()[:: max(1, whole.numel() // 8)]
        few = few.to(torch.bfloat16) if roughly and few.is_floating_point() else few
        digest.update(f"{name} {few.double().tolist()}".encode())
    return digest.hexdigest()
