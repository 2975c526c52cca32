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
from grao_lightning.language_model.masked import BLOCK
from grao_lightning.language_model.packing import Pack, pack_rows
from grao_lightning.language_model.positions import (
    by_frequencies,
    chooses_frequencies,
    forget_frequencies,
)
from grao_lightning.language_model.sharded import device_of, passes_over_ranks
from grao_lightning.language_model.transfer import sent

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
    model: Any, rows: Sequence[TokenRow], way: Way, read: Read, **options: Any
) -> Tensor:
    """Return the states [K, H] of `states_and_targets`."""
    return states_and_targets(model, rows, way, read, **options)[0]


def states_and_targets(
    model: Any,
    rows: Sequence[TokenRow],
    way: Way,
    read: Read,
    *,
    last_is_read: bool = True,
    shares: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the states [K, H] that predict the answer tokens, and these tokens [K] beside them.

    It takes as many passes as the model needs; each sends its integers to the device in one copy.

    Args:
        model: Whose forward pass it is.
        rows: R prompts with their answers; no answer may be empty.
        way: How they are read.
        read: Its forward pass.
        last_is_read: Whether a row's last token, which predicts nothing, is part of the text whose
            length decides on frequencies.
        shares: [R] weight of each row's prompt, for a reader that asks for ``token_weights``: 1 for
            a token of an answer, 0 for a row's last one and for padding. None: it does not ask.
    """
    lengths = [len(row) - (not last_is_read) for row in rows]
    passes = by_frequencies(model, lengths)
    if way == "one by one":
        passes = [[number] for number in range(len(rows))]
    device = device_of(model)
    more = 0
    if way == "one by one" or chooses_frequencies(model):
        more = passes_over_ranks(model, len(passes))[0] - len(passes)
    pieces: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(rows)
    whole = last_is_read and chooses_frequencies(model)
    for numbers in passes:
        chosen = [rows[number] for number in numbers]
        own = None if shares is None else [shares[number] for number in numbers]
        forget_frequencies(model)
        if way == "packed":
            pack = pack_rows(chosen, longest_whole=whole, shares=own)
            found = _packed(read, pack, device, weighted=own is not None)
        else:
            found = _padded(read, chosen, last_is_read, device, own)
        if len(passes) == 1 and not more:
            return found
        lengths_here = [len(row.answer_ids) for row in chosen]
        parts = zip(*(part.split(lengths_here) for part in found), strict=True)
        for number, (states, targets) in zip(numbers, parts, strict=True):
            pieces[number] = states, targets
    states, targets = (torch.cat(part) for part in zip(*pieces, strict=True))
    return _beside_others(model, read, states, more), targets


def _beside_others(model: Any, read: Read, states: Tensor, passes: int) -> Tensor:
    """Make as many passes more as other ranks do: of no effect, but with a backward pass."""
    for _ in range(passes):
        forget_frequencies(model)
        unread = read(torch.zeros(1, 1, dtype=torch.long, device=states.device))
        states = states + unread.flatten()[:0].sum()
    return states


def _packed(
    read: Read, pack: Pack, device: torch.device, *, weighted: bool
) -> tuple[Tensor, Tensor]:
    if device.type != "cpu":
        pack = pack.padded(BLOCK)  # kernels want whole blocks, and shapes that repeat are reused
    ids, positions, sources, targets = sent(
        device, pack.ids, pack.positions, pack.sources, pack.targets
    )
    more = {"token_weights": sent(device, pack.weights)[0][None]} if weighted else {}
    states = read(
        ids[None],
        position_ids=positions[None],
        # Four dimensions: handed through as it is, and never read by the layout.
        attention_mask=torch.ones(1, 1, 1, 1, device=device),
        shared_prompts=TreeLayout(pack),
        **more,
    )
    return states[0, sources], targets


def _padded(
    read: Read,
    rows: Sequence[TokenRow],
    last_is_read: bool,
    device: torch.device,
    shares: Sequence[float] | None,
) -> tuple[Tensor, Tensor]:
    texts = [row.prompt_ids + row.answer_ids for row in rows]
    if not last_is_read:
        texts = [text[:-1] for text in texts]
    width = max(map(len, texts))
    # The token at position t is predicted from position t - 1.
    of_rows = [
        number * width + position - 1
        for number, row in enumerate(rows)
        for position in range(len(row.prompt_ids), len(row))
    ]
    ids, sources, targets = sent(
        device,
        torch.tensor([text + [0] * (width - len(text)) for text in texts]),
        torch.tensor(of_rows),
        torch.tensor([token for row in rows for token in row.answer_ids]),
    )
    more = {}
    if shares is not None:
        weights = torch.zeros(len(rows), width)
        for number, (row, share) in enumerate(zip(rows, shares, strict=True)):
            weights[number, : len(row) - 1] = 1.0
            weights[number, : len(row.prompt_ids)] = share
        more = {"token_weights": sent(device, weights)[0]}
    return read(ids, **more).flatten(0, 1)[sources], targets
