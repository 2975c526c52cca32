"""The ways of decoding, fastest first, and the batches that each of them takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grao_lightning.sampling.decoder import Decoder
from grao_lightning.sampling.generate import generate_rows
from grao_lightning.sampling.shared_prompt import decode_groups


@dataclass(frozen=True)
class Way:
    """How completions are decoded.

    Attributes:
        name: Ends the sentence "completions are sampled ...".
        decode: The decoder.
        mixes_lengths: Whether prompts of several lengths are decoded together.
        mixes_rows: Whether several rows are decoded together at all.
    """

    name: str
    decode: Decoder
    mixes_lengths: bool = True
    mixes_rows: bool = True


SHARED = Way("with every prompt read once", decode_groups)
PADDED = Way("with prompts padded to one length", generate_rows)
SAME_LENGTH = Way("from prompts of one length at a time", generate_rows, mixes_lengths=False)
SINGLE = Way("one at a time", generate_rows, mixes_lengths=False, mixes_rows=False)
WAYS = (SHARED, PADDED, SAME_LENGTH, SINGLE)


@dataclass(frozen=True)
class Batch:
    """Rows decoded together.

    Attributes:
        way: How.
        prompts: Numbers of the prompts.
        members: Which of every group's rows.
    """

    way: Way
    prompts: tuple[int, ...]
    members: range

    def rows(self, group_size: int) -> Tensor:
        """Return the numbers of the rows among those of all prompts, prompt-major."""
        first = torch.tensor(self.prompts)[:, None] * group_size
        return (first + torch.tensor(self.members)).flatten()


def batches(
    way: Way, prompts: Sequence[int], lengths: Sequence[int], group_size: int, rows_at_once: int
) -> Iterator[Batch]:
    """Yield the batches of prompts.

    Args:
        way: How they are decoded.
        prompts: Numbers of the prompts.
        lengths: Of all prompts, by number.
        group_size: G.
        rows_at_once: Most rows of a batch, but at least one group where rows are mixed at all.
    """
    if not way.mixes_rows:
        for number in prompts:
            for member in range(group_size):
                yield Batch(way, (number,), range(member, member + 1))
        return
    kinds: dict[int, list[int]] = {}
    for number in prompts:
        kinds.setdefault(0 if way.mixes_lengths else lengths[number], []).append(number)
    prompts_at_once = max(1, rows_at_once // group_size)
    for numbers in kinds.values():
        for start in range(0, len(numbers), prompts_at_once):
            part = tuple(numbers[start : start + prompts_at_once])
            yield Batch(way, part, range(group_size))
