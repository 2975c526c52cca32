"""The tree of a `Pack` as one mask: for devices that have no kernel of ours.

`torch.nn.attention.flex_attention` passes over the blocks that nobody sees; scaled dot-product
attention computes them all and masks them. Written without a GPU at hand: on CPU the block mask and
flex_attention uncompiled are tested, on CUDA nothing was run or timed. That is why a trial decides.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grao_lightning.batch import TokenRow
from grao_lightning.language_model.packing import Pack, pack_rows

log = logging.getLogger(__name__)


def tree_mask(pack: Pack, query: Tensor, key: Tensor) -> Any:
    """Return the mask that `attend` takes: for flex_attention where that works, else [S, S] bool.

    Args:
        pack: Whose tree is attended.
        query: [1, Hq, S, D], of which shape, type and device count.
        key: [1, H, S, D], likewise.
    """
    sizes = query.shape[1], key.shape[1], query.shape[3]
    if flex_works(query.device, query.dtype, *sizes):
        return block_mask(pack, query.device)
    return pack.mask().to(query.device)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
    """Return the attention [1, Hq, S, D] under a mask of `tree_mask`."""
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
    output: Tensor = _flex()(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
    return output


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
        log.warning("flex_attention is not used, a dense mask is, exact but slower: %s", reason)
        return False
    return True


def trial(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, depth: int) -> None:
    """Compare flex_attention with the dense mask, outputs and gradients, on packs of three sizes.

    Raises:
        AssertionError: They differ; whatever flex_attention raises besides.
    """
    generator = torch.Generator(device).manual_seed(0)  # the run's own numbers stay as they are
    with torch.inference_mode(False), torch.enable_grad():
        for length in (15, 50, 90):  # the first pack is a single block of 128
            answers = (1, length, 2 * length)
            rows = [TokenRow([n] * length, [n] * size) for n in (1, 2) for size in answers]
            pack = pack_rows(rows)
            query, key, value, push = (
                torch.randn(
                    1, number, len(pack.ids), depth,
                    generator=generator, device=device, dtype=dtype, requires_grad=True,
                )
                for number in (heads, key_heads, key_heads, heads)
            )  # fmt: skip
            results = []
            for mask in (block_mask(pack, device), pack.mask().to(device)):
                output = attend(query, key, value, mask, depth**-0.5)
                gradients = torch.autograd.grad(output, (query, key, value), push)
                results.append((output, *gradients))
            torch.testing.assert_close(*results, rtol=0.05, atol=0.05)  # what bfloat16 allows


def block_mask(pack: Pack, device: torch.device) -> Any:
    """Return the tree as a BlockMask of flex_attention."""
    from torch.nn.attention.flex_attention import create_block_mask

    size = len(pack.ids)
    return create_block_mask(sees(pack, device), None, None, size, size, device=str(device))


def sees(pack: Pack, device: torch.device) -> Callable[..., Tensor]:
    """Return (batch, head, query, key) -> whether that token of the pack sees that one."""
    segment, branch = (labels.to(device) for labels in pack.labels())

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        on_its_path = (branch[key] == 0) | (branch[key] == branch[query])
        return (key <= query) & (segment[key] == segment[query]) & on_its_path

    return mask_mod


@lru_cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
