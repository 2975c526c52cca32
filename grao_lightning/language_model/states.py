"""The states from which a decoder predicts the answers of rows, each as for the row by itself.

Three ways to read rows: *packed* behind one copy of their prompt where the model shares prompts,
*padded* on the right, where a causal model never looks, and *one by one* where neither gives what
the row by itself gives. Shapes: R rows, K answer tokens of all rows together, H hidden.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from grao_lightning.batch import TokenRow
from grao_lightning.faults import UserError
from grao_lightning.language_model.attention import TreeLayout
from grao_lightning.language_model.packing import Pack, pack_rows
from grao_lightning.language_model.positions import (
    by_frequencies,
    chooses_frequencies,
    forget_frequencies,
)
from grao_lightning.language_model.sharded import device_of, passes_over_ranks

Way = Literal["packed", "padded", "one by one"]
#: (input_ids [N, T], more keywords of the forward pass) -> states [N, T, H], or logits
Read = Callable[..., Tensor]


def decoder_reader(decoder: Any) -> Read:
    """Return how a decoder reads ids."""

    def read(ids: Tensor, **options: Any) -> Tensor:
        states: Tensor = decoder(input_ids=ids, use_cache=False, **options).last_hidden_state
        return states

    return read


def logits_reader(model: Any) -> Read:
    """Return how a language model of unknown inside reads ids: up to its logits."""

    def read(ids: Tensor, **options: Any) -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False, **options).logits
        if logits.shape[1] != ids.shape[1]:
            raise UserError(
                f"{type(model).__name__} gives logits for {logits.shape[1]} positions where "
                f"{ids.shape[1]} tokens were given: models that add tokens of their own, such as "
                "those of prompt tuning, cannot be trained here; take LoRA or the model itself"
            )
        return logits

    return read


def answer_states(
    model: Any, rows: Sequence[TokenRow], way: Way, read: Read, *, last_is_read: bool = True
) -> Tensor:
    """Return the states [K, H] that predict the answer tokens, in as many passes as it takes.

    Args:
        model: Whose forward pass it is.
        rows: R prompts with their answers; no answer may be empty.
        way: How they are read.
        read: Its forward pass.
        last_is_read: Whether a row's last token, which predicts nothing, is part of the text whose
            length decides on frequencies.
    """
    lengths = [len(row) - (not last_is_read) for row in rows]
    passes = by_frequencies(model, lengths)
    if way == "one by one":
        passes = [[number] for number in range(len(rows))]
    device = device_of(model)
    more = 0
    if way == "one by one" or chooses_frequencies(model):
        (most,) = passes_over_ranks(model, len(passes))
        more = most - len(passes)
    pieces: list[Tensor] = [torch.empty(0)] * len(rows)
    for numbers in passes:
        chosen = [rows[number] for number in numbers]
        forget_frequencies(model)
        if way == "packed":
            whole = last_is_read and chooses_frequencies(model)
            states = _packed(read, pack_rows(chosen, longest_whole=whole), device)
        else:
            states = _padded(read, chosen, last_is_read, device)
        if len(passes) == 1 and not more:
            return states
        parts = states.split([len(row.answer_ids) for row in chosen])
        for number, part in zip(numbers, parts, strict=True):
            pieces[number] = part
    for _ in range(more):  # as other ranks do; of no effect, but with a backward pass
        forget_frequencies(model)
        unread = read(torch.zeros(1, 1, dtype=torch.long, device=device))
        pieces[0] = pieces[0] + unread.flatten()[:0].sum()
    return torch.cat(pieces)


def _packed(read: Read, pack: Pack, device: torch.device) -> Tensor:
    states = read(
        pack.ids[None].to(device),
        position_ids=pack.positions[None].to(device),
        # Four dimensions: handed through as it is, and never read by the layout.
        attention_mask=torch.ones(1, 1, 1, 1, device=device),
        shared_prompts=TreeLayout(pack),
    )
    return states[0, pack.sources.to(device)]


def _padded(
    read: Read, rows: Sequence[TokenRow], last_is_read: bool, device: torch.device
) -> Tensor:
    texts = [row.prompt_ids + row.answer_ids for row in rows]
    if not last_is_read:
        texts = [text[:-1] for text in texts]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
    # The token at position t is predicted from position t - 1.
    sources = [
        number * width + position - 1
        for number, row in enumerate(rows)
        for position in range(len(row.prompt_ids), len(row))
    ]
    return read(ids).flatten(0, 1)[torch.tensor(sources, device=device)]
