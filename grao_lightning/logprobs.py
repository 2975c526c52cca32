"""Token log-probabilities of rows under a causal language model: the exact, padded path.

Rows are padded on the right and need no attention mask: a causal model never looks there. Only
positions that predict an answer token reach the vocabulary, a chunk at a time, so logits of
[rows, tokens, V] never exist. Shapes: R rows, K answer tokens of all rows together, V vocabulary,
H hidden.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grao_lightning.batch import TokenRow

log = logging.getLogger(__name__)

CHUNK_TOKENS = 256
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of the answer tokens of R rows, all rows behind one another.

    Attributes:
        flat: [K] nats.
        entropy: [K] nats, of the whole next-token distribution; no gradient.
        row: [K] long, the row each token belongs to.
        lengths: [R] long, answer tokens of each row.
    """

    flat: Tensor
    entropy: Tensor
    row: Tensor
    lengths: Tensor

    def mean_by_row(self, token_weights: Tensor | None = None) -> Tensor:
        """Return l(x), [R] nats per token: a row's (weighted) sum over its number of tokens.

        Args:
            token_weights: [K], 1 = counts fully; the divisor stays the number of tokens.
        """
        values = self.flat if token_weights is None else self.flat * token_weights
        sums = torch.zeros(len(self.lengths), dtype=values.dtype, device=values.device)
        return sums.index_add(0, self.row, values) / self.lengths

    def by_row(self) -> list[Tensor]:
        """Return one [T] tensor a row."""
        return list(self.flat.split(self.lengths.tolist()))


def token_logprobs(
    model: Any, rows: Sequence[TokenRow], *, temperature: float = 1.0
) -> TokenLogprobs:
    """Return log pi(answer token | what stands before it) for every answer token of every row.

    Differentiable where gradients are on; the vocabulary is then passed through twice, since
    chunks are recomputed in the backward pass.

    Args:
        model: A Hugging Face causal language model.
        rows: R prompts with their answers; no answer may be empty.
        temperature: Divides the logits; 1 is the policy itself.
    """
    device = next(model.parameters()).device
    width = max(len(row) for row in rows)
    ids = torch.tensor([row.prompt_ids + row.answer_ids + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row.answer_ids) for row in rows], device=device)
    targets = torch.tensor([token for row in rows for token in row.answer_ids], device=device)
    # The token at position t is predicted from position t - 1.
    sources = torch.tensor(
        [
            number * width + position - 1
            for number, row in enumerate(rows)
            for position in range(len(row.prompt_ids), len(row))
        ],
        device=device,
    )
    states, logits = _states_and_head(model, ids.to(device))
    values, entropy = _chunked_logprobs(states[sources], logits, targets, temperature)
    row_of_token = torch.arange(len(rows), device=device).repeat_interleave(lengths)
    return TokenLogprobs(values, entropy, row_of_token, lengths)


def split_by_tokens(
    rows: Sequence[TokenRow], numbers: Sequence[int], budget: int
) -> list[list[int]]:
    """Return the row numbers in micro-batches whose padded size stays within ``budget`` tokens.

    Rows are taken by falling length, so that little is padded and the largest allocation comes
    first; a row longer than the budget makes a micro-batch of its own.

    Args:
        rows: All rows.
        numbers: Those that are wanted.
        budget: Most tokens of a micro-batch, padding included.
    """
    micro_batches: list[list[int]] = []
    for number in sorted(numbers, key=lambda number: (-len(rows[number]), number)):
        last = micro_batches[-1] if micro_batches else None
        if last and len(rows[last[0]]) * (len(last) + 1) <= budget:
            last.append(number)
        else:
            micro_batches.append([number])
    return micro_batches


def at_least_float32(values: Tensor) -> Tensor:
    """Return values in float32, or in float64 if that is what they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _chunked_logprobs(
    states: Tensor, logits: Logits, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [K] and entropies [K] from states [K, H], a chunk at a time."""

    def chunk(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scaled = at_least_float32(logits(states)) / temperature
        all_logprobs = F.log_softmax(scaled, dim=-1)
        with torch.no_grad():
            entropy = -(all_logprobs.exp() * all_logprobs).nan_to_num(0.0).sum(dim=-1)
        return all_logprobs.gather(1, targets[:, None])[:, 0], entropy

    parts = []
    for part, wanted in zip(states.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(chunk, part, wanted, use_reentrant=False))
        else:
            parts.append(chunk(part, wanted))
    values, entropies = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(entropies)


def _states_and_head(model: Any, ids: Tensor) -> tuple[Tensor, Logits]:
    """Return flattened states [R * S, H] and the function from states to logits.

    A model whose head is not understood gives its logits as "states", and identity as the head.
    """
    head = _head_of(model)
    if head is None:
        return model(input_ids=ids, use_cache=False).logits.flatten(0, 1), lambda logits: logits
    decoder = model.get_decoder()
    return decoder(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1), head


def _head_of(model: Any) -> Logits | None:
    """Return the model's map from last states to logits, or None if ours would not equal it.

    Checked once a model by comparing with the model's own forward pass, since a family may scale,
    cap or transform its logits in ways this file does not know.
    """
    if not hasattr(model, "_grao_head_is_exact"):
        model._grao_head_is_exact = _head_is_exact(model)
        if not model._grao_head_is_exact:
            log.warning(
                "%s turns states into logits in an unknown way: full logits of every position "
                "are kept in memory; lower micro_batch_tokens if memory runs out",
                type(model).__name__,
            )
    return _plain_head(model) if model._grao_head_is_exact else None


def _plain_head(model: Any) -> Logits:
    projection = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = 1.0 / getattr(config, "logits_scaling", 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma

    def head(states: Tensor) -> Tensor:
        logits = projection(states)
        if scale != 1.0:
            logits = logits * scale
        return cap * torch.tanh(logits / cap) if cap else logits

    return head


@torch.no_grad()
def _head_is_exact(model: Any) -> bool:
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    was_training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        return torch.allclose(_plain_head(model)(states), expected, rtol=1e-3, atol=1e-3)
    except (AttributeError, TypeError, RuntimeError):
        return False
    finally:
        model.train(was_training)
