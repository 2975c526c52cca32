"""Whether a model can read a prompt once for all that follows it, and switching that on."""

import logging
from typing import Any

import torch

from grao_lightning.batch import TokenRow
from grao_lightning.language_model.attention import SHARED, TreeLayout, register
from grao_lightning.language_model.head import head_of
from grao_lightning.language_model.packing import pack_rows

log = logging.getLogger(__name__)


def shares_prompts(model: Any) -> bool:
    """Return whether `share_prompts` was switched on for a model."""
    return bool(getattr(model.config, "_attn_implementation", None) == SHARED)


def share_prompts(model: Any, *, gives_tokens: bool = True) -> bool:
    """Switch on shared prompts where the model's attention allows it, and return whether it did.

    What the configuration does not tell is found by trial: a small pack must give the states of
    its rows one by one. A model that fails keeps its own attention, and the log says why.

    Args:
        model: A Hugging Face model with a decoder.
        gives_tokens: Whether it is a language model, whose head must be known; else the head is
            for the caller to know.
    """
    reason = _obstacle(model)
    if reason is None and gives_tokens and head_of(model) is None:
        reason = "it turns states into logits in an unknown way"
    if reason is None:
        own = model.config._attn_implementation
        register()
        try:
            model.set_attn_implementation(SHARED)
            reason = None if _agrees(model) else "its states differ from those of single rows"
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            reason = f"it takes no attention of ours ({error})"
        if reason is not None:
            model.set_attn_implementation(own)
    if reason is not None:
        log.warning(
            "%s cannot share prompts, since %s: every answer reads its own copy, which is "
            "exact but slower",
            type(model).__name__,
            reason,
        )
    return reason is None


def _obstacle(model: Any) -> str | None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"it has layers of {', '.join(sorted(kinds))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it attends in a sliding window"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps its attention scores"
    if getattr(config, "attention_dropout", 0.0):
        return "it drops out attention"
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return f"attn_implementation={model.config._attn_implementation} was asked for"
    return None


@torch.no_grad()
def _agrees(model: Any) -> bool:
    """Return whether a pack gives the states that its rows give by themselves."""
    device = next(model.parameters()).device
    rows = [TokenRow([1, 2, 3], [4, 5, 6]), TokenRow([1, 2, 3], [7, 8]), TokenRow([9], [1, 2])]
    was_training = model.training
    model.eval()
    try:
        pack, decoder = pack_rows(rows), model.get_decoder()
        together = decoder(
            input_ids=pack.ids[None].to(device),
            position_ids=pack.positions[None].to(device),
            attention_mask=torch.ones(1, 1, 1, 1, device=device),
            use_cache=False,
            shared_prompts=TreeLayout(pack),
        ).last_hidden_state[0, pack.sources.to(device)]
        alone = [
            decoder(
                input_ids=torch.tensor([row.prompt_ids + row.answer_ids], device=device),
                use_cache=False,
            ).last_hidden_state[0, len(row.prompt_ids) - 1 : -1]
            for row in rows
        ]
        return torch.allclose(together, torch.cat(alone), rtol=1e-3, atol=1e-3)
    finally:
        model.train(was_training)
