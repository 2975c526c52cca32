"""Scores of rows under a sequence classification model: whole batches, each row's own score.

Three ways to read rows, chosen by trial once a model:

- A decoder's score is its head's on the state of a row's last token. Rows are padded on the right,
  which a causal model never sees, or packed behind one copy of their prompt (`sharing`), and the
  last token is known by the rows' lengths. (The models' own forward pass looks for the last token
  that is not ``pad_token_id``: one too early where an answer ends in that very token, and refused
  where there is none.)
- An encoder reads padded rows under an attention mask.
- A decoder with another head reads its rows one by one.

Shapes: R rows, L labels, H hidden.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from grao_lightning.batch import TokenRow
from grao_lightning.language_model.frozen import inside
from grao_lightning.language_model.logprobs import at_least_float32, split_padded
from grao_lightning.language_model.packing import split_into_packs
from grao_lightning.language_model.positions import check_length, first_position
from grao_lightning.language_model.routing import Router
from grao_lightning.language_model.sharded import device_of, passes_over_ranks
from grao_lightning.language_model.sharing import shares_prompts
from grao_lightning.language_model.states import Way, answer_states, decoder_reader
from grao_lightning.language_model.transfer import sent
from grao_lightning.language_model.trial import computes_in

_FILLER = TokenRow([0], [0])
Reading = Literal["last token", "masked", "one by one"]


def row_scores(
    model: Any, rows: Sequence[TokenRow], router: Router | None = None, shares: Any = None
) -> Tensor:
    """Return the logits [R, L] of rows in one forward pass, float32 or wider.

    Args:
        model: A Hugging Face sequence classification model.
        rows: R prompts with their answers; no answer may be empty. No rows: a pass that changes
            nothing, for ranks that must make as many as others.
        router: Reads in place of the backbone, and keeps what its routers did.
        shares: [R] weight of each row's prompt there.
    """
    own = None if router is None else shares or [0.0]
    return inside(
        model, lambda model: _row_scores(model, rows or [_FILLER], router, own)[: len(rows)]
    )


def _row_scores(
    model: Any, rows: Sequence[TokenRow], router: Router | None = None, shares: Any = None
) -> Tensor:
    reading = reading_of(model)
    if reading == "last token":
        return at_least_float32(model.score(_last_states(model, rows, router, shares)))
    if reading == "masked":
        return at_least_float32(model(**_masked_inputs(model, rows)).logits)
    (most,) = passes_over_ranks(model, len(rows))
    passes = [*rows, *[_FILLER] * (most - len(rows))]
    return torch.cat([_alone(model, row) for row in passes])[: len(rows)]


@torch.no_grad()
def frozen_scores(model: Any, rows: Sequence[TokenRow], budget: int) -> Tensor:
    """Return the logits [R, L] of rows on CPU, without gradients.

    Args:
        model: A Hugging Face sequence classification model in evaluation mode.
        rows: R prompts with their answers.
        budget: Most tokens of a forward pass, padding included; a longer row stands alone. 0: every
            row by itself, so that rounding in low precision cannot depend on its neighbours.
    """
    everyone = range(len(rows))
    if not budget:
        split = [[number] for number in everyone]
    elif shares_prompts(model):
        split = split_into_packs(with_room(rows), everyone, budget)
    else:
        split = split_padded(rows, everyone, budget)
    scores = torch.empty(len(rows), model.config.num_labels, dtype=torch.double)
    for numbers in split:
        found = row_scores(model, [rows[number] for number in numbers])
        scores[numbers] = found.double().cpu()
    return scores


def reading_of(model: Any) -> Reading:
    """Return how a model's rows are read, found by trial once."""
    if not hasattr(model, "_grao_reading"):
        if _scores_last_token(model):
            model._grao_reading = "last token"
        else:
            model._grao_reading = "masked" if _heeds_mask(model) else "one by one"
    reading: Reading = model._grao_reading
    return reading


def with_room(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Return rows with a token more, since a pack leaves out each answer's last one."""
    return [TokenRow(row.prompt_ids, [*row.answer_ids, 0]) for row in rows]


def fitted(row: TokenRow, most: int | None, keep: int = 0) -> TokenRow | None:
    """Return a row of at most ``most`` tokens; None where its answer alone has no room.

    The prompt loses its oldest tokens, the answer none.

    Args:
        row: A prompt with its answer.
        most: Tokens of the row; None = no bound.
        keep: First tokens of the prompt that stay, such as the one an encoder starts with.
    """
    excess = 0 if most is None else len(row) - most
    if excess <= 0:
        return row
    if excess >= len(row.prompt_ids) - keep:
        return None
    return TokenRow(row.prompt_ids[:keep] + row.prompt_ids[keep + excess :], row.answer_ids)


def most_tokens(model: Any) -> int | None:
    """Return how many tokens a row may have at most, None where the configuration does not tell."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return None if positions is None else int(positions) - first_position(model)


def _last_states(
    model: Any, rows: Sequence[TokenRow], router: Router | None, shares: Any
) -> Tensor:
    """Return the state [R, H] of each row's last token."""
    way: Way = "packed" if shares_prompts(model) else "padded"
    read = router or decoder_reader(model.base_model)
    check_length(model, max(map(len, rows)))
    states = answer_states(model, with_room(rows), way, read, last_is_read=False, shares=shares)
    ends = torch.tensor([len(row.answer_ids) + 1 for row in rows]).cumsum(0)
    return states[sent(states.device, ends - 1)[0]]


def _masked_inputs(model: Any, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
    device = device_of(model)
    width = max(map(len, rows))
    pad = model.config.get_text_config().pad_token_id or 0
    inputs = {
        "input_ids": [row.prompt_ids + row.answer_ids + [pad] * (width - len(row)) for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in rows],
    }
    if getattr(model.config, "type_vocab_size", 0) > 1:  # the second text of a pair is marked
        inputs["token_type_ids"] = [
            [0] * len(row.prompt_ids) + [1] * len(row.answer_ids) + [0] * (width - len(row))
            for row in rows
        ]
    return dict(zip(inputs, sent(device, *map(torch.tensor, inputs.values())), strict=True))


def _alone(model: Any, row: TokenRow) -> Tensor:
    """Return the logits [1, L] of the model's own forward pass on one row."""
    config = model.config.get_text_config()
    own = config.pad_token_id
    config.pad_token_id = None  # else the last token would not count where it is this one
    try:
        (ids,) = sent(device_of(model), torch.tensor([row.prompt_ids + row.answer_ids]))
        return at_least_float32(model(input_ids=ids).logits)
    finally:
        config.pad_token_id = own


@torch.no_grad()
def _scores_last_token(model: Any) -> bool:
    """Return whether ``score(state of the last token)`` is the model's score, whatever follows."""
    was_training = model.training
    model.eval()
    try:
        device = device_of(model)
        expected = _alone(model, TokenRow([1, 2], [3, 4]))
        longer = torch.tensor([[1, 2, 3, 4, 5, 6]], device=device)
        states = model.base_model(input_ids=longer, use_cache=False).last_hidden_state
        return _agree(
            at_least_float32(model.score(states[:, 3])), expected, computes_in(model, states)
        )
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return False
    finally:
        model.train(was_training)


@torch.no_grad()
def _heeds_mask(model: Any) -> bool:
    """Return whether padded rows under a mask have the scores they have by themselves."""
    was_training = model.training
    model.eval()
    rows = [TokenRow([1, 2], [3, 4]), TokenRow([5], [6])]
    try:
        together = model(**_masked_inputs(model, rows)).logits
        alone = [model(**_masked_inputs(model, [row])).logits for row in rows]
        return _agree(together, torch.cat(alone), computes_in(model, together))
    except (TypeError, RuntimeError, ValueError):
        return False
    finally:
        model.train(was_training)


def _agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
