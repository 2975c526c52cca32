"""The attention of a `Pack` on devices that have no kernel of ours.

Where a trial shows that it works, `torch.nn.attention.flex_attention`, which passes over the blocks
that nobody sees. Else part by part through scaled dot-product attention: the branches of a prompt
side by side, each behind its own copy, as rows that share nothing attend. Neither makes a mask of
[S, S]: with one, and with key heads that several query heads share, scaled dot-product attention
has no fused kernel and would form all scores.

Written without a GPU at hand: on CPU both ways are tested, flex_attention's gradients uncompiled;
on CUDA nothing was run or timed. That is why a trial decides.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grao_lightning.batch import TokenRow
from grao_lightning.language_model.packing import Pack, Segment, pack_rows
from grao_lightning.language_model.ragged import Ragged, repeated
from grao_lightning.language_model.transfer import sent

log = logging.getLogger(__name__)

#: Tokens of a block of flex_attention; packs are padded to whole ones, see `Pack.padded`.
BLOCK = 128

#: A prompt and, where it has branches, how they stand side by side
Part = tuple[Segment, Ragged | None]


def tree_mask(pack: Pack, query: Tensor, key: Tensor) -> Any:
    """Return what `attend` goes by: a BlockMask where flex_attention works, else the parts.

    Args:
        pack: Whose tree is attended, of a whole number of blocks.
        query: [1, Hq, S, D], of which shape, type and device count.
        key: [1, H, S, D], likewise.
    """
    sizes = query.shape[1], key.shape[1], query.shape[3]
    if flex_works(query.device, query.dtype, *sizes):
        return block_mask(pack, query.device)
    return parts_of(pack, query.device)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
    """Return the attention [1, Hq, S, D] by what `tree_mask` gave."""
    if isinstance(mask, list):
        return _by_parts(query, key, value, mask, scale)
    output: Tensor = _flex()(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
    return output


# -- part by part ----------------------------------------------------------------------------------


def parts_of(pack: Pack, device: torch.device) -> list[Part]:
    """Return the segments of a pack with the layout of their branches, on a device."""
    return [
        (part, Ragged(part.branch_lengths, device) if part.branch_lengths else None)
        for part in pack.segments
    ]


def _by_parts(query: Tensor, key: Tensor, value: Tensor, parts: list[Part], scale: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    for segment, ragged in parts:
        prompt = slice(segment.start, segment.branches_start)
        branches = slice(segment.branches_start, segment.end)
        asked, keys, values = (
            _rows_of(part, prompt, branches, ragged) for part in (query, key, value)
        )
        output = F.scaled_dot_product_attention(
            asked, repeated(keys, repeats), repeated(values, repeats), is_causal=True, scale=scale
        )
        outputs.append(output[:1, :, : segment.prompt_length])
        if ragged is not None:
            outputs.append(ragged.unpad(output[:, :, segment.prompt_length :]))
    return torch.cat(outputs, dim=2)


def _rows_of(values: Tensor, prompt: slice, branches: slice, ragged: Ragged | None) -> Tensor:
    """Return the branches of a segment side by side, each behind its prompt, [n, H, P + T, D]."""
    of_prompt = values[:, :, prompt]
    if ragged is None:
        return of_prompt
    of_branches = ragged.pad(values[:, :, branches])
    return torch.cat([of_prompt.expand(len(of_branches), -1, -1, -1), of_branches], dim=2)


# -- flex_attention --------------------------------------------------------------------------------


@lru_cache
def flex_works(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, depth: int
) -> bool:
    """Return whether flex_attention is to be used: on CUDA, where the `trial` of it succeeds.

    Which torch, GPU and sizes it takes is found that way, once; a refusal is said in the log.
    """
    if device.type != "cuda":
        return False
    try:
        trial(device, dtype, heads, key_heads, depth)
    except Exception as error:  # a compiler fails in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning(
            "flex_attention is not used: prompts and their branches are attended to part by part, "
            "exact but slower: %s",
            reason,
        )
        return False
    return True


def trial(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, depth: int) -> None:
    """Compare flex_attention with a dense mask, outputs and gradients, on packs of three sizes.

    Raises:
        AssertionError: They differ; whatever flex_attention raises besides.
    """
    generator = torch.Generator(device).manual_seed(0)  # the run's own numbers stay as they are
    with torch.inference_mode(False), torch.enable_grad():
        for length in (15, 50, 90):  # the first pack is a single block
            answers = (1, length, 2 * length)
            rows = [TokenRow([n] * length, [n] * size) for n in (1, 2) for size in answers]
            pack = pack_rows(rows).padded(BLOCK)
            query, key, value, push = (
                torch.randn(
                    1, number, len(pack.ids), depth,
                    generator=generator, device=device, dtype=dtype, requires_grad=True,
                )
                for number in (heads, key_heads, key_heads, heads)
            )  # fmt: skip
            outputs = (
                attend(query, key, value, block_mask(pack, device), depth**-0.5),
                F.scaled_dot_product_attention(
                    query,
                    repeated(key, heads // key_heads),
                    repeated(value, heads // key_heads),
                    attn_mask=pack.mask().to(device),
                    scale=depth**-0.5,
                ),
            )
            results = [
                (output, *torch.autograd.grad(output, (query, key, value), push))
                for output in outputs
            ]
            torch.testing.assert_close(*results, rtol=0.05, atol=0.05)  # what bfloat16 allows


def block_mask(pack: Pack, device: torch.device) -> Any:
    """Return the tree as a BlockMask of flex_attention.

    Which blocks are seen follows from the parts they hold, so that no two tokens are compared:
    ``create_block_mask`` compares all of them, which takes a hundred times as long.

    Args:
        pack: Of a whole number of blocks.
        device: Of the mask; its tables travel in one copy.
    """
    from torch.nn.attention.flex_attention import BlockMask

    assert len(pack.ids) % BLOCK == 0, "packs are padded to whole blocks"
    tables = [table for blocks in _seen_blocks(pack) for table in _numbered(blocks)]
    labels = [part.int() for part in pack.labels()]
    segment, branch, some, which, full, which_full = sent(
        device, *labels, *(table[None, None] for table in tables)
    )
    return BlockMask.from_kv_blocks(
        some, which, full, which_full, BLOCK_SIZE=BLOCK, mask_mod=sees(segment, branch)
    )


def sees(segment: Tensor, branch: Tensor) -> Callable[..., Tensor]:
    """Return (batch, head, query, key) -> whether that token sees that one, by `Pack.labels`."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        on_its_path = (branch[key] == 0) | (branch[key] == branch[query])
        return (key <= query) & (segment[key] == segment[query]) & on_its_path

    return mask_mod


def _seen_blocks(pack: Pack) -> tuple[Tensor, Tensor]:
    """Return which blocks of keys each block of queries sees in part and in full, [n, n] bool.

    Parts, which are prompts and branches, stand in order. A part is seen by itself and, if it is a
    prompt, by the branches of its segment; before the diagonal nothing else counts. So of the pairs
    of parts that two blocks hold those are counted in which one sees the other.
    """
    segment, branch = pack.labels()
    starts = torch.ones_like(segment, dtype=torch.bool)
    starts[1:] = (segment[1:] != segment[:-1]) | (branch[1:] != branch[:-1])
    part = starts.cumsum(0) - 1  # [S]
    is_prompt, of_part = branch[starts] == 0, segment[starts]
    num_blocks = len(segment) // BLOCK
    held = torch.zeros(num_blocks, len(of_part))
    held[torch.arange(len(segment)) // BLOCK, part] = 1.0
    of_segments = torch.zeros(num_blocks, len(pack.segments)).index_add_(1, of_part, held)
    branches = held[:, ~is_prompt]
    pairs = of_segments @ held[:, is_prompt].t() + branches @ branches.t()
    sizes = held.sum(dim=1)
    full = (pairs == sizes[:, None] * sizes).tril(-1)
    return (pairs > 0).tril() & ~full, full


def _numbered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many places of each row are True, [n], and their numbers before all others."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1).int(), order.int()


@lru_cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
