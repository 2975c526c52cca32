"""Whether a model can read a prompt once for all that follows it, and switching that on."""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from grao_lightning.batch import TokenRow
from grao_lightning.language_model.attention import SHARED, Call, register, watched
from grao_lightning.language_model.head import head_obstacle
from grao_lightning.language_model.positions import counts_positions_itself
from grao_lightning.language_model.sharded import device_of
from grao_lightning.language_model.states import Read, answer_states, decoder_reader
from grao_lightning.language_model.trial import (
    agree,
    all_agree,
    at_rest,
    computes_in,
    decoder_of,
    trial_rows,
)

log = logging.getLogger(__name__)

#: What a layer may hand to its attention besides query, key, value and mask: all of it is either
#: heeded (scaling), the same for every layout, or looked at below.
_KNOWN_OPTIONS = {
    "dropout", "scaling", "sliding_window", "is_causal", "position_ids", "output_attentions",
    "use_cache", "cache_position", "output_hidden_states", "output_router_logits", "return_dict",
}  # fmt: skip
_DROPOUT = re.compile("att.*drop|drop.*att")


def shares_prompts(model: Any) -> bool:
    """Return whether `share_prompts` was switched on for a model."""
    return bool(getattr(model.config, "_attn_implementation", None) == SHARED)


def may_share(model: Any) -> bool:
    """Return whether `share_prompts` was asked for a model, whatever its trial said."""
    return bool(getattr(model, "_grao_may_share", False))


@contextmanager
def our_attention(model: Any) -> Iterator[None]:
    """Switch on ``SHARED`` for a while."""
    if shares_prompts(model):
        yield
        return
    before = _implementations(model)
    register()
    try:
        model.set_attn_implementation(SHARED)
        if not shares_prompts(model):
            raise RuntimeError("its family has an attention that cannot be exchanged")
        yield
    finally:
        _put_back(model, before)


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Give a model for a while the attention that it had before `share_prompts`."""
    if not shares_prompts(model):
        yield
        return
    before = _implementations(model)
    _put_back(model, model._grao_own_attention)
    try:
        yield
    finally:
        _put_back(model, before)


def share_prompts(model: Any, *, gives_tokens: bool = True) -> bool:
    """Switch on shared prompts where the model's attention allows it, and return whether it did.

    What the configuration does not tell is found by trial: a small pack must give the states that
    the untouched model gives its rows one by one. A model that fails, in whatever way, keeps its
    own attention, and the log says why.

    Args:
        model: A Hugging Face model with a decoder.
        gives_tokens: Whether it is a language model, whose head must be known; else the head is
            for the caller to know.
    """
    if shares_prompts(model):
        if not gives_tokens or head_obstacle(model) is None:
            return True
        _put_back(model, model._grao_own_attention)
    model._grao_may_share = True
    try:
        reason = obstacle(model) or _dropout(model)
        if reason is None and gives_tokens:
            reason = head_obstacle(model)
        if reason is None:
            reason = _try_on(model)
    except Exception as error:  # models fail in many ways
        reason = _told(error)
    if reason is not None:
        log.warning(
            "%s cannot share prompts, since %s: every answer reads its own copy, which is "
            "exact but slower",
            type(model).__name__,
            reason,
        )
    return reason is None


def padding_is_exact(model: Any, read: Read) -> bool:
    """Return whether rows padded on the right are read as by themselves, found by trial once.

    Args:
        model: A Hugging Face causal language model.
        read: Its forward pass.
    """
    if getattr(model, "_grao_padding", (None, False))[0] is not type(model):
        fault = _padding_fault(model, read)
        model._grao_padding = (type(model), fault is None)
        if fault is not None:
            log.warning("%s reads rows one by one, since %s", type(model).__name__, fault)
    return bool(model._grao_padding[1])


def _padding_fault(model: Any, read: Read) -> str | None:
    if getattr(model.config.get_text_config(), "index_topk", None):
        return "it selects keys, and ties among them fall otherwise in padded rows"
    try:
        with at_rest(model):
            rows = trial_rows(model)
            alone = answer_states(model, rows, "one by one", read)
            together = answer_states(model, rows, "padded", read)
            if agree(together, alone, rows, computes_in(model, alone)):
                return None
    except Exception as error:
        return f"it takes no padded ones ({_told(error)})"
    return "padded ones have other states, or it looks ahead"


def tell_dropout(model: Any) -> None:
    """Say that a policy drops out in training, or adds noise: another one samples.

    A module of dropout may be without effect yet, as before an adapter that is zero; and some
    families have none and drop out all the same, which a pass in training mode shows.
    """
    parts = [
        f"{name or 'dropout'}: {part.p}"
        for name, part in model.named_modules()
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
    ]
    told = f"{parts[0]} and {len(parts) - 1} more modules" if parts else ""
    if told or _is_noisy(model):
        log.warning(
            "%s drops out in training (%s): its log-probabilities there are not those of the model "
            "that samples; set its dropout to 0 unless this is wanted",
            type(model).__name__,
            told or "its logits change",
        )


def _is_noisy(model: Any) -> bool:
    """Return whether a model's logits are others in training mode."""
    device = device_of(model)
    ids = torch.arange(16, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    with (
        suppress(Exception),  # what fails here fails in the first step
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        at_rest(model),
    ):
        own = model(input_ids=ids, use_cache=False).logits[0]
        for part in model.modules():
            part.training = True
        noisy = model(input_ids=ids, use_cache=False).logits[0]
        return not all_agree(noisy, own, computes_in(model, own))
    return False


def obstacle(model: Any) -> str | None:
    """Return what a model's configuration says that our attention does not heed."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"it has layers of {', '.join(sorted(kinds))}"
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        return f"it attends in a sliding window (sliding_window={config.sliding_window})"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps its attention scores"
    if counts_positions_itself(model):
        return "its layers count positions themselves (attn_temperature_tuning)"
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return f"attn_implementation={model.config._attn_implementation} was asked for"
    return None


def _dropout(model: Any) -> str | None:
    for name, value in _numbers(model.config.get_text_config().to_dict()):
        if _DROPOUT.search(name) and value > 0:
            return f"it drops out attention ({name}={value}; 0 switches that off)"
    return None


def _numbers(settings: dict[str, Any]) -> Iterable[tuple[str, float]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def _try_on(model: Any) -> str | None:
    """Switch on our attention and return None, or put the model's own back and return why."""
    rows, read = trial_rows(model), decoder_reader(decoder_of(model))
    own = model._grao_own_attention = _implementations(model)
    with at_rest(model):
        alone = answer_states(model, rows, "one by one", read)
        register()
        reason: str | None = None
        try:
            model.set_attn_implementation(SHARED)
            if not shares_prompts(model):
                reason = "its family has an attention that cannot be exchanged"
            else:
                reason = _fault(model, read, rows, alone)
        except Exception as error:
            reason = f"it takes no attention of ours ({_told(error)})"
        if reason is not None:
            _put_back(model, own)
    return reason


def _implementations(model: Any) -> list[tuple[Any, Any]]:
    """Return every configuration within a model and the attention it names."""
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    return [(config, config._attn_implementation) for config in configs.values()]


def _put_back(model: Any, implementations: list[tuple[Any, Any]]) -> None:
    own = next(name for config, name in implementations if config is model.config)
    with suppress(Exception):  # configurations of parts that no module holds
        model.set_attn_implementation(own)
    for config, implementation in implementations:
        config._attn_implementation_internal = implementation


def _fault(model: Any, read: Read, rows: list[TokenRow], alone: Tensor) -> str | None:
    """Return what is wrong with the states that our attention gives a pack of rows."""
    with watched() as calls:
        together = answer_states(model, rows, "packed", read)
    reason = handed_wrongly(model, calls)
    if reason is None and not agree(together, alone, rows, computes_in(model, alone)):
        reason = "its states differ from those of single rows"
    return reason or _narrows_or_drops(model, read, calls)


def handed_wrongly(model: Any, calls: list[Call]) -> str | None:
    """Return what layers do that our attention, as they call it, does not heed."""
    asking = {id(call.module) for call in calls}
    kinds = {type(call.module) for call in calls}
    silent = [m for m in model.modules() if type(m) in kinds and id(m) not in asking]
    num_layers = model.config.get_text_config().num_hidden_layers  # some are run several times
    if silent or len(calls) < num_layers:
        return f"not all of its {num_layers} layers ask our attention"
    for call in calls:
        if call.layout is None:
            return "its layers do not hand on who shares what"
        if call.mask is not None and call.mask.numel() != 1:
            return "its layers attend by a mask of their own"
        for name, value in call.options.items():
            if name not in _KNOWN_OPTIONS and value is not None and value is not False:
                return f"its attention takes {name}, which ours does not"
    return None


def narrows(model: Any) -> bool:
    """Return whether layers attend in a window of any size, by a pass through our attention."""
    device = device_of(model)
    ids = torch.arange(4, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    with at_rest(model), watched() as calls:
        decoder_of(model)(input_ids=ids, use_cache=False)
    return any(call.narrow or call.options.get("sliding_window") for call in calls)


def _narrows_or_drops(model: Any, read: Read, calls: list[Call]) -> str | None:
    """Return whether layers attend in a window of any size, or drop out in training."""
    modules = {id(call.module): call.module for call in calls}.values()
    device = device_of(model)
    ids = torch.arange(4, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), watched() as calls:
        for module in modules:
            module.training = True  # and nothing around or inside it
        read(ids)
    for call in calls:
        if call.narrow or call.options.get("sliding_window"):
            return "it attends in a sliding window"
        if call.options.get("dropout"):
            return f"it drops out attention ({call.options['dropout']})"
    return None


def _told(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"
