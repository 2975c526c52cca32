"""Attention for rows that share prompts, as an attention implementation of Hugging Face models.

``SHARED`` is the name to give to ``set_attn_implementation``. Without a layout it is PyTorch's
scaled dot-product attention; with one (a keyword of the model's forward pass) the layout attends.
A layout travels as an argument and not as state, so that gradient checkpointing finds it again.

On CPU the tree is computed part by part (the prompt by itself, the branches on the prompt, each
branch by itself) with the flash kernel, and parts are merged by their log-sum-exp, which is exact.
Elsewhere one mask does the same, see `masked`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from grao_lightning.language_model import masked
from grao_lightning.language_model.packing import Pack, Segment
from grao_lightning.language_model.ragged import Ragged, repeated

SHARED = "grao_shared_prompt"


@dataclass(frozen=True)
class Call:
    """What a model's layer handed to our attention, for a trial to look at.

    Attributes:
        module: The layer's attention.
        mask: Of which our layouts read nothing.
        narrow: Whether the mask was made for a window or a chunk.
        options: Keywords, the layout left out.
        layout: None where the layer did not hand it on.
    """

    module: Any
    mask: Any
    narrow: bool
    options: dict[str, Any]
    layout: "Layout | None"


class _Watch:
    """The calls of our attention while a trial is on."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.narrow_masks: list[Any] = []

    def note(self, module: Any, mask: Any, options: dict[str, Any], layout: Any) -> None:
        narrow = any(mask is one for one in self.narrow_masks)
        self.calls.append(Call(module, mask, narrow, options, layout))


_watches: list[_Watch] = []


class Layout(Protocol):
    """How the rows of a forward pass share prompts."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the attention of query [1 or N, Hq, T, D] on key and value [1 or N, H, T, D]."""
        ...


def register() -> None:
    """Make ``SHARED`` known to transformers; does nothing the second time."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if SHARED in ALL_ATTENTION_FUNCTIONS:
        return

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        layout: Layout | None = options.pop("shared_prompts", None)
        for watch in _watches:
            watch.note(module, attention_mask, options, layout)
        if layout is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        query, key, value = (under_autocast(part) for part in (query, key, value))
        depth = value.shape[-1]
        # Latent attention has heads of two sizes, and the kernels know one: zeros change no score.
        size = max(depth, query.shape[-1])
        query, key, value = (_widened(part, size) for part in (query, key, value))
        output = layout.attend(module.layer_idx, query, key, value, scale)[..., :depth]
        return output.transpose(1, 2).contiguous(), None

    own_mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def mask(*arguments: Any, **options: Any) -> Any:
        if not _watches or not _is_narrow(options["mask_function"]):
            return own_mask(*arguments, **options)
        # A mask of its own, by which the layers that get it are known.
        made = own_mask(*arguments, **{**options, "allow_is_causal_skip": False})
        for watch in _watches:
            watch.narrow_masks.append(made)
        return made

    ALL_ATTENTION_FUNCTIONS.register(SHARED, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(SHARED, mask)


@contextmanager
def watched() -> Iterator[list[Call]]:
    """Collect the calls of our attention."""
    watch = _Watch()
    _watches.append(watch)
    try:
        yield watch.calls
    finally:
        _watches.remove(watch)


def _is_narrow(mask_function: Callable[..., Any]) -> bool:
    """Return whether a token of a text does not see the first one, however far away."""
    first, far = torch.tensor(0), torch.tensor(10**8)
    return not bool(mask_function(first, first, far, first))


def _widened(values: Tensor, size: int) -> Tensor:
    missing = size - values.shape[-1]
    return F.pad(values, (0, missing)) if missing else values


class TreeLayout:
    """The attention of a `Pack`."""

    def __init__(self, pack: Pack) -> None:
        self._segments = pack.segments
        self._pack = pack
        self._mask: Any = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the attention of every token of the pack, [1, Hq, S, D]."""
        if query.device.type == "cpu":
            return _TreeAttention.apply(query, key, value, self._segments, scale)
        if self._mask is None:
            self._mask = masked.tree_mask(self._pack, query, key)
        return masked.attend(query, key, value, self._mask, scale)


def under_autocast(values: Tensor) -> Tensor:
    """Return values in autocast's precision where it is on.

    Norms behind the projections leave some in float32, and autocast knows no kernel of ours.
    """
    device = values.device.type
    if not torch.is_autocast_enabled(device) or values.dtype == torch.double:
        return values
    return values.to(torch.get_autocast_dtype(device))


def flash(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float, mask: Any = None
) -> tuple[Tensor, Tensor]:
    """Return attention [N, H, T, D] and its log-sum-exp [N, H, T] on CPU."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )


def merge(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the attention over two disjoint sets of keys from the attention over each."""
    (left_output, left_sum), (right_output, right_sum) = left, right
    total = torch.logaddexp(left_sum, right_sum)
    output = left_output * (left_sum - total).exp().unsqueeze(-1).to(left_output.dtype)
    output = output + right_output * (right_sum - total).exp().unsqueeze(-1).to(output.dtype)
    return output, total


class _TreeAttention(torch.autograd.Function):
    """Flash attention part by part; the backward pass of each part uses the merged log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Any, scale: float
    ) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        output = torch.empty(query.shape, dtype=query.dtype)
        sums = []
        for segment in segments:
            prompt = slice(segment.start, segment.branches_start)
            own = [repeated(part[:, :, prompt], repeats) for part in (key, value)]
            output[:, :, prompt], prompt_sum = flash(
                query[:, :, prompt], *own, causal=True, scale=scale
            )
            sums.append(prompt_sum)
            if not segment.branch_lengths:
                continue
            branches = slice(segment.branches_start, segment.end)
            asked = query[:, :, branches]
            on_prompt, on_prompt_sum = flash(
                _folded(asked, repeats), key[:, :, prompt], value[:, :, prompt],
                causal=False, scale=scale,
            )  # fmt: skip
            ragged = Ragged(segment.branch_lengths)
            own = [repeated(ragged.pad(part[:, :, branches]), repeats) for part in (key, value)]
            on_itself, on_itself_sum = flash(ragged.pad(asked), *own, causal=True, scale=scale)
            output[:, :, branches], branches_sum = merge(
                (on_prompt.reshape(asked.shape), on_prompt_sum.reshape(asked.shape[:-1])),
                (ragged.unpad(on_itself), ragged.unpad(on_itself_sum[..., None])[..., 0]),
            )
            sums.append(branches_sum)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.segments, ctx.scale = segments, scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, output, *sums = ctx.saved_tensors
        # The kernel takes five times as long over short branches in half precision as in float32.
        exact = torch.promote_types(output.dtype, torch.float32)
        lifted = [part.to(exact) for part in (gradient, query, key, value, output)]
        found = [torch.empty_like(part, memory_format=torch.contiguous_format)
                 for part in lifted[1:4]]  # fmt: skip
        of_segments = iter(sums)
        for segment in ctx.segments:
            own = [next(of_segments) for _ in range(2 if segment.branch_lengths else 1)]
            _add_gradients(segment, ctx.scale, lifted, own, found)
        return (*(part.to(output.dtype) for part in found), None, None)


def _add_gradients(
    segment: Segment,
    scale: float,
    tensors: Sequence[Tensor],
    sums: Sequence[Tensor],
    found: Sequence[Tensor],
) -> None:
    """Fill in a segment's gradients of query, key and value.

    Args:
        segment: Of the pack.
        scale: Of the products of queries and keys.
        tensors: Gradient of the output, query, key, value, output; all of one precision.
        sums: Log-sum-exps of the prompt, and of the branches where there are any.
        found: Gradients of query, key and value, as far as they are known.
    """
    gradient, query, key, value, output = tensors
    to_query, to_key, to_value = found
    repeats = query.shape[1] // key.shape[1]
    prompt = slice(segment.start, segment.branches_start)
    own = [repeated(part[:, :, prompt], repeats) for part in (key, value)]
    to_query[:, :, prompt], of_key, of_value = _flash_gradients(
        gradient[:, :, prompt], query[:, :, prompt], *own, output[:, :, prompt], sums[0],
        causal=True, scale=scale,
    )  # fmt: skip
    to_key[:, :, prompt] = _summed(of_key, repeats)
    to_value[:, :, prompt] = _summed(of_value, repeats)
    if not segment.branch_lengths:
        return
    branches = slice(segment.branches_start, segment.end)
    total = sums[1]  # [1, Hq, L]
    asked = [part[:, :, branches] for part in (gradient, query, output)]
    folded = [_folded(part, repeats) for part in asked]
    of_query, of_key, of_value = _flash_gradients(
        folded[0], folded[1], key[:, :, prompt], value[:, :, prompt], folded[2],
        total.reshape(folded[0].shape[:-1]), causal=False, scale=scale,
    )  # fmt: skip
    to_query[:, :, branches] = of_query.reshape(asked[0].shape)
    to_key[:, :, prompt] += of_key
    to_value[:, :, prompt] += of_value
    ragged = Ragged(segment.branch_lengths)
    padded = [ragged.pad(part) for part in asked]
    own = [repeated(ragged.pad(part[:, :, branches]), repeats) for part in (key, value)]
    of_query, of_key, of_value = _flash_gradients(
        padded[0], padded[1], *own, padded[2], ragged.pad(total[..., None])[..., 0],
        causal=True, scale=scale,
    )  # fmt: skip
    to_query[:, :, branches] += ragged.unpad(of_query)
    to_key[:, :, branches] = ragged.unpad(_summed(of_key, repeats))
    to_value[:, :, branches] = ragged.unpad(_summed(of_value, repeats))


def _flash_gradients(gradient: Tensor, *saved: Tensor, causal: bool, scale: float) -> Any:
    """Return the gradients of query, key and value of `flash`, given those, output and sums."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, *saved, 0.0, causal, scale=scale
    )


def _folded(values: Tensor, repeats: int) -> Tensor:
    """Return query heads that share a key head behind one another: [1, H, repeats * L, D]."""
    _, heads, length, depth = values.shape
    return values.reshape(1, heads // repeats, repeats * length, depth)


def _summed(values: Tensor, repeats: int) -> Tensor:
    if repeats == 1:
        return values
    n, heads, length, depth = values.shape
    return values.reshape(n, heads // repeats, repeats, length, depth).sum(dim=2)
