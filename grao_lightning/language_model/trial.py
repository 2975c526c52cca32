"""What trials of a model need: rows that show a fault, rest, and when two results agree."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grao_lightning.batch import TokenIds, TokenRow
from grao_lightning.language_model.positions import most_positions
from grao_lightning.language_model.sharded import device_of

#: Windows, chunks and the like up to this size are outrun by the rows of a trial.
_SHORT = 64
_REACH = re.compile("window|chunk|block|topk|top_k|local|span|original_max|max_position|compress")


@contextmanager
def at_rest(model: Any) -> Iterator[None]:
    """Switch off gradients, dropout and autocast, and leave every module in its own mode."""
    modes = [(part, part.training) for part in model.modules()]
    device = device_of(model).type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def decoder_of(model: Any) -> Any:
    """Return what gives a language model's states; some families name it in a way of their own."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder


def trial_rows(model: Any) -> list[TokenRow]:
    """Return rows that share a prompt and one that does not, of ids from the whole vocabulary.

    They are longer than the small windows of a configuration, and the padding token stands inside.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> TokenIds:
        drawn: TokenIds = torch.randint(vocabulary, (length,), generator=generator).tolist()
        return drawn

    sizes = [
        value
        for name, value in vars(config).items()
        if _REACH.search(name) and type(value) is int and value <= _SHORT
    ]
    length = min(max([12, *sizes]) + 12, (most_positions(model) or 10**9) - 12)
    if length < 1:
        raise ValueError("it has positions for 12 tokens or fewer")
    prompt = ids(length)
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and 0 <= padding < vocabulary:
        for place in range(0, length, 3):
            prompt[place] = padding
    return [TokenRow(prompt, ids(12)), TokenRow(ids(3), ids(8)), TokenRow(prompt, ids(6))]


def computes_in(model: Any, found: Tensor) -> torch.dtype:
    """Return the precision in which a model computed something, which is not always its weights'.

    Weights may be kept in float32 and computed with in less, and the other way round.
    """
    kept: torch.dtype = model.dtype
    return min(kept, found.dtype, key=lambda dtype: dtype.itemsize)


def agree(found: Tensor, expected: Tensor, rows: Sequence[TokenRow], dtype: torch.dtype) -> bool:
    """Return whether the states [K, H] of rows' answers are the same but for rounding.

    In half precision rounding is told from a fault by how far most states of each row are off:
    single ones may be far off where two experts of a mixture were nearly even. Measured in
    bfloat16: 0.012 in two layers, 0.024 in the 30 of SmolLM2, and 0.2 to 0.6 where the rows of a
    pack see each other.

    Args:
        found: As they were computed.
        expected: As they should be.
        rows: R rows.
        dtype: In which the model computes.
    """
    distance, size = _distances(found, expected)
    if dtype in (torch.float32, torch.float64):
        return bool((distance <= 1e-3 * size).all())
    lengths = [len(row.answer_ids) for row in rows]
    parts = zip(distance.split(lengths), size.split(lengths), strict=True)
    return all(bool(off.median() <= 0.08 * whole.median()) for off, whole in parts)


def all_agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Return whether what one product gives, [K, V], is the same but for rounding in every row."""
    distance, size = _distances(found, expected)
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 0.02
    return bool((distance <= tolerance * size).all())


def _distances(found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far rows are off, infinitely if they cannot be compared, and their sizes."""
    found, expected = found.double(), expected.double()
    size = expected.norm(dim=-1)
    if found.shape != expected.shape:
        return torch.full_like(size, torch.inf), size
    return (found - expected).norm(dim=-1).nan_to_num(torch.inf), size
