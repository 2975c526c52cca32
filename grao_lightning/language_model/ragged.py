"""Branches of unequal lengths, side by side for a kernel. Pure: torch only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grao_lightning.language_model.transfer import sent

_CPU = torch.device("cpu")


class Ragged:
    """Branches behind one another [1, H, L, D] <-> padded side by side [n, H, T, D].

    Padding is zero, in gradients too, and stands behind a branch, where causal attention never
    looks.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device = _CPU) -> None:
        self.num_branches, self.longest = len(lengths), max(lengths)
        self._even = min(lengths) == self.longest
        if not self._even:
            kept = torch.arange(self.longest)[None] < torch.tensor(lengths)[:, None]
            # [L] place of each token when padded
            (self._kept,) = sent(device, kept.flatten().nonzero()[:, 0])

    def pad(self, values: Tensor) -> Tensor:
        """Return [n, H, T, D] from [1, H, L, D]."""
        heads, depth = values.shape[1], values.shape[3]
        values = values[0].transpose(0, 1)  # [L, H, D]
        if not self._even:
            room = values.new_zeros(self.num_branches * self.longest, heads, depth)
            values = room.index_copy_(0, self._kept, values)
        return values.view(self.num_branches, self.longest, heads, depth).transpose(1, 2)

    def unpad(self, values: Tensor) -> Tensor:
        """Return [1, H, L, D] from [n, H, T, D]."""
        values = values.transpose(1, 2).flatten(0, 1)  # [n * T, H, D]
        if not self._even:
            values = values[self._kept]
        return values.transpose(0, 1)[None]


def repeated(values: Tensor, repeats: int) -> Tensor:
    """Return key heads [n, H, T, D], each so often as query heads share it."""
    return values if repeats == 1 else values.repeat_interleave(repeats, dim=1)
