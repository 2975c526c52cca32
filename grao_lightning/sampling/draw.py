"""From next-token logits to tokens, with randomness that depends on nothing but its key.

Every row owns its uniform numbers, one a token, made from (seed, stream, step, prompt). So a
completion does not change with the batch it is sampled in, the number of devices, or a resume.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Stream = Literal["train", "validation"]
#: (numbers of the rows [N], position in the completion, logits [N, V]) -> tokens [N]; all of them
#: on the model's device, from which nothing is read
Draw = Callable[[Tensor, int, Tensor], Tensor]
#: (number of the row, its tokens so far) -> whether it has ended
Ended = Callable[[int, list[int]], bool]
#: (tokens of the longest completion so far, rows that have not ended); called after each position
Progress = Callable[[int, int], None]

_BLOCK = 256
_STREAM_NUMBERS: dict[Stream, int] = {"train": 0, "validation": 1}


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn.

    Attributes:
        max_new_tokens: Longest completion, its end-of-sequence token included.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with at least this probability; 1 keeps all.
        min_p: Drop tokens less likely than this share of the most likely one; 0 keeps all.
        eos_ids: Tokens that end a completion.
        stop_strings: Texts that end a completion.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    eos_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


def row_uniforms(
    seed: int, stream: Stream, step: int, index: int, group_size: int, num_tokens: int
) -> Tensor:
    """Return the uniform numbers in [0, 1) of one prompt's group, [G, num_tokens] float64.

    Args:
        seed: Of the run.
        stream: Training and validation never share numbers.
        step: Global step; 0 in validation, where every policy gets the same numbers.
        index: The prompt's row in its dataset.
        group_size: G.
        num_tokens: Longest completion.
    """
    key = [seed, _STREAM_NUMBERS[stream], step, index]
    return torch.from_numpy(np.random.default_rng(key).random((group_size, num_tokens)))


def draw_tokens(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> Tensor:
    """Return one token a row by inverting the cumulative distribution at the row's number.

    Args:
        logits: [N, V] of the next token.
        uniforms: [N] float64 in [0, 1).
        settings: Temperature and truncation.

    Returns:
        [N] long. A token of probability 0 is never drawn.
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    if settings.temperature != 1:
        logits = logits.float() / settings.temperature
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float)
    probabilities = _truncated(probabilities, settings)
    # In two levels, since a cumulative sum in float64 over a whole vocabulary costs more than the
    # softmax: first the block of tokens, then the token in it.
    num_blocks = -(-probabilities.shape[-1] // _BLOCK)
    padding = num_blocks * _BLOCK - probabilities.shape[-1]
    padded = F.pad(probabilities, (0, padding)) if padding else probabilities
    blocks = padded.view(-1, num_blocks, _BLOCK)
    sums = blocks.sum(dim=-1, dtype=torch.double)
    points = uniforms.to(sums.device) * sums.sum(dim=-1)
    block, before = _invert(sums, points)
    within = blocks[torch.arange(len(blocks), device=block.device), block].double()
    token, _ = _invert(within, points - before)
    return block * _BLOCK + token


def _invert(sizes: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the running sum of sizes [N, M] exceeds points [N], and the sum before it.

    Places of size 0 are never returned, not even for a point rounded to 0 or to the total.
    """
    cumulative = sizes.cumsum(dim=-1)
    place = torch.searchsorted(cumulative, points[:, None], right=True)[:, 0]
    places = torch.arange(sizes.shape[-1], device=sizes.device)
    last_possible = places.where(sizes > 0, -1).amax(dim=-1)
    place = torch.minimum(place, last_possible)
    return place, cumulative.gather(1, place[:, None])[:, 0] - sizes.gather(1, place[:, None])[:, 0]


def _truncated(probabilities: Tensor, settings: SamplingSettings) -> Tensor:
    """Return probabilities with tokens outside top-k, then min-p, then top-p set to 0."""
    if 0 < settings.top_k < probabilities.shape[-1]:
        smallest_kept = probabilities.topk(settings.top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.where(probabilities >= smallest_kept, 0.0)
    if settings.min_p > 0:
        threshold = settings.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.where(probabilities >= threshold, 0.0)
    if settings.top_p < 1:
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        falling, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays while those before it hold less than top_p: the first always stays.
        kept = falling.cumsum(dim=-1) - falling < settings.top_p
        probabilities = probabilities.where(kept.gather(-1, order.argsort(dim=-1)), 0.0)
    return probabilities
