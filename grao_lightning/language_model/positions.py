"""How long a row may be, and which rows may stand in one forward pass.

Some models choose the frequencies of their rotary positions by the longest row of a pass: longrope
(Phi-3.5, Phi-4-mini, MiniCPM3) those of short or of long texts, dynamic NTK (InternLM3) others for
every length beyond `max_position_embeddings`. There a row is read as by itself only beside rows
that ask for the same frequencies.
"""

import logging
from collections.abc import Sequence
from typing import Any

from grao_lightning.faults import UserError

log = logging.getLogger(__name__)


def frequencies_of(model: Any, length: int) -> int:
    """Return which frequencies a text asks for: texts of one number may stand in one pass.

    Args:
        model: A Hugging Face model.
        length: Tokens of the text as the model reads it by itself.

    Returns:
        0 for all lengths of a model that always has the same ones.
    """
    number = 0
    for kind, threshold in _thresholds(model):
        if length > threshold:
            number += 1 if kind == "longrope" else length
    return number


def by_frequencies(model: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Return the numbers of texts that may stand in one pass, those of each pass rising."""
    if not chooses_frequencies(model):
        return [list(range(len(lengths)))]
    passes: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        passes.setdefault(frequencies_of(model, length), []).append(number)
    return list(passes.values())


def chooses_frequencies(model: Any) -> bool:
    """Return whether a model's frequencies depend on the longest row of a pass."""
    return bool(_thresholds(model))


def forget_frequencies(model: Any) -> None:
    """Make the next pass choose its frequencies by its own length.

    Dynamic NTK keeps those of a longer text that it has read before; a text by itself is the law.
    """
    if not any(kind == "dynamic" for kind, _ in _thresholds(model)):
        return
    for part in model.modules():
        for name in [name for name in vars(part) if name.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            setattr(part, name, part.original_max_seq_len)
            buffer, own = f"{prefix}inv_freq", getattr(part, f"{prefix}original_inv_freq")
            part.register_buffer(buffer, own.to(getattr(part, buffer).device), persistent=False)


def counts_positions_itself(model: Any) -> bool:
    """Return whether layers count the tokens of a pass, whatever positions they are given.

    Llama4 sharpens attention in layers without rotary positions by where a token stands in the
    pass, from token 8192 on: no trial is that long.
    """
    config = model.config.get_text_config()
    without_rotary = 0 in (getattr(config, "no_rope_layers", None) or ())
    return bool(getattr(config, "attn_temperature_tuning", False)) and without_rotary


def most_positions(model: Any) -> int | None:
    """Return the tokens that a row may have, where the model has a table of that many positions.

    None: rotary or no positions, of which there are as many as are asked for.
    """
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is None or getattr(config, "rope_parameters", None):
        return None
    for name, table in [*model.named_parameters(), *model.named_buffers()]:
        # Some tables start to count behind the padding token or at 2.
        if ("pos" in name or "wpe" in name) and table.dim() > 1 and 0 <= len(table) - most <= 8:
            return int(most) - first_position(model)
    return None


def check_length(model: Any, longest: int) -> None:
    """Refuse a row that the model has no positions for.

    Args:
        model: A Hugging Face model.
        longest: Tokens of the longest row.

    Raises:
        UserError: Its table of positions is shorter.
    """
    most = most_positions(model)
    if most is not None and longest > most:
        raise UserError(
            f"a row of prompt and answer has {longest} tokens, and {type(model).__name__} has "
            f"positions for {most} (max_position_embeddings); lower data.max_prompt_tokens or the "
            "longest completion, or take a model with more"
        )
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest
    told = chooses_frequencies(model) or getattr(model, "_grao_told_of_length", False)
    if most is None and longest > trained and not told:
        model._grao_told_of_length = True
        log.warning(
            "A row has %d tokens, more than the %d that %s is made for (max_position_embeddings): "
            "it is read, but perhaps badly",
            longest,
            trained,
            type(model).__name__,
        )


def first_position(model: Any) -> int:
    """Return where a table of positions starts to count: behind padding in RoBERTa's kin."""
    for name, part in model.named_modules():
        padding = getattr(part, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return int(padding) + 1
    return 0


def _thresholds(model: Any) -> list[tuple[str, int]]:
    """Return ("longrope" or "dynamic", length beyond which frequencies are others) of each kind."""
    config = model.config.get_text_config()
    ropes: Any = getattr(config, "rope_parameters", None) or {}
    if "rope_type" not in ropes:  # one for each type of layer
        ropes = {str(name): rope for name, rope in ropes.items() if isinstance(rope, dict)}
    else:
        ropes = {"": ropes}
    found = set()
    for rope in ropes.values():
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            own = rope.get("original_max_position_embeddings")
            own = own or getattr(config, "original_max_position_embeddings", None)
            found.add(("longrope", int(own or config.max_position_embeddings)))
        elif "dynamic" in kind:
            found.add(("dynamic", int(config.max_position_embeddings)))
    return sorted(found)
