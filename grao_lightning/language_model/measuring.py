"""The size of a model, without its weights: its class is built on PyTorch's meta device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grao_lightning.faults import UserError
from grao_lightning.language_model.footprint import ModelSize
from grao_lightning.language_model.precision import float32_names
from grao_lightning.language_model.recomputed import is_recomputed

_COUNTED = "grao_counted"
_TOKENS = 512


def empty_model(setting: str, source: str, *, is_policy: bool = True) -> Any:
    """Return a model of a source's architecture in bfloat16 whose weights take no memory.

    Args:
        setting: Name of the setting, for messages.
        source: Hub name, folder, ``config.json`` or ``embedded:keywords``.
        is_policy: A causal language model, else a sequence classification model of one label.

    Raises:
        UserError: There is no such configuration.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    auto = AutoModelForCausalLM if is_policy else AutoModelForSequenceClassification
    try:
        config = AutoConfig.from_pretrained(_location(source))
        if not is_policy:
            config.num_labels = 1
        with torch.device("meta"):
            return auto.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # unknown names and architectures fail in many ways
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise UserError(
            f"{setting}: no configuration of {source!r}: {reason}. Give a hub name that can be "
            "reached, a folder or a config.json"
        ) from error


def size_of(model: Any) -> ModelSize:
    """Return what a model's footprint depends on.

    Args:
        model: Of `empty_model`.
    """
    config = model.config.get_text_config()
    named = dict(model.named_parameters())
    precise = float32_names(model, torch.bfloat16)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = [
        part.weight.numel()
        for part in model.modules()
        if isinstance(part, nn.Linear) and part is not head
    ]
    seen: list[tuple[Tensor, Tensor]] = []
    kept = _kept(model, _TOKENS, seen)
    return ModelSize(
        parameters=sum(p.numel() for p in named.values()),
        precise=sum(p.numel() for name, p in named.items() if name in precise),
        linear=sum(linear),
        head=0 if head is None else head.weight.numel(),
        largest_part=_largest_part(model),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        cached=sum((key.numel() + value.numel()) // _TOKENS for key, value in seen),
        kept=kept / _TOKENS,
        kept_float32=_in_float32(model, kept / _TOKENS),
    )


def _location(source: str) -> str:
    if source.startswith("embedded:"):
        from grao_lightning.embedded.base import base_folder

        return str(base_folder(source.removeprefix("embedded:")))
    return str(Path(source).expanduser()) if source.startswith("~") else source


def _largest_part(model: Any) -> int:
    """Return the parameters of the largest layer, or of all that stands outside the layers."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    layers = [layer for layer in max(lists, key=_count)] if lists else []
    sizes = list(map(_count, layers))
    return max([_count(model) - sum(sizes), *sizes])


def _count(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


class _Attention(torch.autograd.Function):
    """Keeps what kernels of flash attention keep, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output


def _kept(model: Any, tokens: int, seen: list[tuple[Tensor, Tensor]]) -> int:
    """Return the bytes that the layers keep of one pass over a text, weights not counted.

    Args:
        model: Of `empty_model`.
        tokens: Of the text.
        seen: Gets key and value of every layer.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
    ) -> Any:
        seen.append((key, value))
        return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(_COUNTED, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_COUNTED, lambda *_, **__: None)
    own = {_storage(values) for values in [*model.parameters(), *model.buffers()]}
    found: dict[int, Any] = {}

    def keep(values: Tensor) -> Tensor:
        if _storage(values) not in own and not is_recomputed(values):
            found[_storage(values)] = values.untyped_storage()  # held, so that numbers stay unique
        return values

    before = model.config._attn_implementation
    model.set_attn_implementation(_COUNTED)
    same: Callable[[Tensor], Tensor] = lambda values: values  # noqa: E731
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, same):
            model.base_model(
                input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"),
                position_ids=torch.arange(tokens, device="meta")[None],
                attention_mask=torch.ones(1, 1, 1, 1, device="meta"),
                use_cache=False,
            )
    finally:
        model.set_attn_implementation(before)
    return sum(storage.nbytes() for storage in found.values())


def _in_float32(model: Any, kept: float) -> float:
    """Return the bytes a token in float32: counted, or at most twice those in half precision."""
    try:
        return _kept(model.float(), _TOKENS, []) / _TOKENS
    except RuntimeError:  # the grouped product of experts has no such form on the meta device
        return 2 * kept
    finally:
        model.bfloat16()


def _storage(values: Tensor) -> int:
    number: int = values.untyped_storage()._cdata
    return number
