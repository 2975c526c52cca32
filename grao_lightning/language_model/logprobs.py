"""Token log-probabilities of rows under a causal language model.

Rows are packed behind one copy of their prompt where the model shares prompts, else padded, see
`states`. Only positions that predict an answer token reach the vocabulary, a chunk at a time.
Shapes: R rows, K answer tokens of all rows together, V vocabulary, H hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grao_lightning.batch import TokenRow
from grao_lightning.language_model.frozen import bare, inside
from grao_lightning.language_model.head import Weigh, head_loss, head_obstacle, head_of
from grao_lightning.language_model.packing import own_budget, riders, split_into_packs
from grao_lightning.language_model.positions import check_length
from grao_lightning.language_model.routing import Router, router_of
from grao_lightning.language_model.sharded import device_of, passes_over_ranks
from grao_lightning.language_model.sharing import padding_is_exact, shares_prompts
from grao_lightning.language_model.states import (
    Read,
    Way,
    decoder_reader,
    logits_reader,
    states_and_targets,
)
from grao_lightning.language_model.trial import decoder_of
from grao_lightning.objectives.balance import Routing

_FILLER = TokenRow([0], [0])


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of the answer tokens of R rows, all rows behind one another.

    Attributes:
        loss: Scalar ``-sum_t w_t log pi(t)``, with a gradient; 0 without weights.
        flat: [K] nats.
        entropy: [K] nats, of the whole next-token distribution.
        lengths: R numbers, answer tokens of each row.
        states: [K, H] from which each token was predicted, with a gradient; None where the model's
            head is unknown.
        routing: What the routers of a mixture of experts did, where it was asked for.
    """

    loss: Tensor
    flat: Tensor
    entropy: Tensor
    lengths: list[int]
    states: Tensor | None
    routing: Routing | None = None

    def by_row(self) -> list[Tensor]:
        """Return one [T] tensor a row."""
        return list(self.flat.split(self.lengths))


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass.

    Attributes:
        numbers: Of the rows.
        needs_gradient: Whether a backward pass follows.
    """

    numbers: list[int]
    needs_gradient: bool


def token_logprobs(
    model: Any,
    rows: Sequence[TokenRow],
    *,
    temperature: float = 1.0,
    weigh: Weigh | None = None,
    weigh_rows: bool = False,
    shares: Sequence[float] | None = None,
    into_grad: bool = False,
) -> TokenLogprobs:
    """Return log pi(answer token | what stands before it) for every answer token of every row.

    Args:
        model: A Hugging Face causal language model, or a `FrozenModel`.
        rows: R prompts with their answers; no answer may be empty. No rows: a pass that changes
            nothing, for ranks that must make as many as others (`evened_out`).
        temperature: Divides the logits; 1 is the policy itself.
        weigh: (slice of [K], their log-probabilities) -> weight of each token in the loss.
        weigh_rows: Whether a token's weight depends on other tokens: ``weigh`` is then called once,
            with all of them, and the head is computed twice.
        into_grad: Add the head's gradient to its weight's ``.grad`` at once, see `head_loss`.
        shares: [R] weight of each row's prompt in ``routing`` (`prompt_shares`); None: no routing.
    """

    def computed(model: Any) -> TokenLogprobs:
        return _token_logprobs(model, rows, temperature, weigh, weigh_rows, into_grad, shares)

    return inside(model, computed)


def _token_logprobs(
    model: Any,
    rows: Sequence[TokenRow],
    temperature: float,
    weigh: Weigh | None,
    weigh_rows: bool,
    into_grad: bool,
    shares: Sequence[float] | None,
) -> TokenLogprobs:
    if not rows:
        return _of_no_rows(model, temperature, None if shares is None else [0.0])
    lengths = [len(row.answer_ids) for row in rows]
    knows_head = head_obstacle(model) is None
    read = decoder_reader(decoder_of(model)) if knows_head else logits_reader(model)
    way = _way(model, read)
    check_length(model, max(map(len, rows)))
    router = None if shares is None else router_of(model, decoder_of(model))
    states, targets = states_and_targets(model, rows, way, router or read, shares=shares)
    routing = None if router is None else router.routing
    # Only now: a sharded head's weight is at hand once the decoder has run.
    head = head_of(model) if knows_head else None
    if head is None:
        loss, flat, entropy = _full_loss(states, targets, temperature, weigh)
        return TokenLogprobs(loss, flat, entropy, lengths, None)
    if weigh is not None and weigh_rows:
        _, flat, _ = head_loss(states.detach(), head, targets, temperature, None)
        weights = weigh(slice(0, len(targets)), flat)
        loss, flat, entropy = head_loss(
            states,
            head,
            targets,
            temperature,
            lambda part, _: weights[part],
            into_grad=into_grad,
        )
    else:
        loss, flat, entropy = head_loss(
            states, head, targets, temperature, weigh, into_grad=into_grad
        )
    return TokenLogprobs(loss, flat, entropy, lengths, states, routing)


def row_routing(model: Any, rows: Sequence[TokenRow], shares: Sequence[float]) -> Routing:
    """Return what the routers of a language model do with rows, without its head.

    Args:
        model: A Hugging Face causal language model that `router_loss_obstacle` has nothing against.
        rows: R prompts with their answers. No rows: as in `token_logprobs`.
        shares: [R] weight of each row's prompt.
    """

    def routed(model: Any) -> Routing:
        router: Router = router_of(model, decoder_of(model))
        way = _way(model, decoder_reader(decoder_of(model)))
        states_and_targets(model, rows or [_FILLER], way, router, shares=shares or [0.0])
        assert router.routing is not None
        return router.routing

    return inside(model, routed)


def _way(model: Any, read: Read) -> Way:
    if _packs(model):
        return "packed"
    return "padded" if padding_is_exact(model, read) else "one by one"


def _of_no_rows(model: Any, temperature: float, shares: Sequence[float] | None) -> TokenLogprobs:
    """Return the log-probabilities of no tokens after a pass like any other, its gradient 0."""
    weigh: Weigh | None = (lambda _, flat: flat * 0.0) if torch.is_grad_enabled() else None
    computed = _token_logprobs(model, [_FILLER], temperature, weigh, False, False, shares)
    states = None if computed.states is None else computed.states[:0]
    flat, entropy = computed.flat[:0], computed.entropy[:0]
    return TokenLogprobs(computed.loss, flat, entropy, [], states, computed.routing)


def frozen_logprobs(
    model: Any, rows: Sequence[TokenRow], budget: int | None, *, temperature: float = 1.0
) -> list[Tensor]:
    """Return one [T] tensor a row, without gradients, micro-batch by micro-batch.

    Args:
        model: A Hugging Face causal language model, or a `FrozenModel`.
        rows: R prompts with their answers.
        budget: Most tokens of a micro-batch; None: `own_budget`.
        temperature: Divides the logits.
    """
    found = [torch.empty(0)] * len(rows)
    for numbers, computed in frozen_passes(model, rows, budget, temperature=temperature):
        for number, logprobs in zip(numbers, computed.by_row(), strict=True):
            found[number] = logprobs
    return found


def frozen_passes(
    model: Any, rows: Sequence[TokenRow], budget: int | None, *, temperature: float = 1.0
) -> Iterator[tuple[list[int], TokenLogprobs]]:
    """Yield row numbers and what the model says of these rows, without gradients.

    Ranks that share the model's weights yield equally often, some of them no rows.

    Args:
        model: A Hugging Face causal language model, or a `FrozenModel`.
        rows: R prompts with their answers.
        budget: Most tokens of a micro-batch; None: `own_budget`.
        temperature: Divides the logits.
    """
    micro_batches = split_by_tokens(model, rows, [False] * len(rows), budget)
    (most,) = passes_over_ranks(bare(model), len(micro_batches))
    micro_batches += [MicroBatch([], False)] * (most - len(micro_batches))
    for micro_batch in micro_batches:
        chosen = [rows[number] for number in micro_batch.numbers]
        with torch.no_grad():
            computed = token_logprobs(model, chosen, temperature=temperature)
        yield micro_batch.numbers, computed


def evened_out(model: Any, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return micro-batches with some of no rows added, at least one of all with a gradient.

    Ranks that share the model's weights then make the same passes, and ranks without a signal meet
    the others where gradients are exchanged.

    Args:
        model: That is trained.
        micro_batches: Those without gradients first.
    """
    without = [part for part in micro_batches if not part.needs_gradient]
    within = [part for part in micro_batches if part.needs_gradient]
    most, most_within = passes_over_ranks(model, len(without), max(len(within), 1))
    return [
        *without,
        *[MicroBatch([], False)] * (most - len(without)),
        *within,
        *[MicroBatch([], True)] * (most_within - len(within)),
    ]


def split_together(
    model: Any, rows: Sequence[TokenRow], units: Sequence[Sequence[int]], budget: int | None
) -> list[MicroBatch]:
    """Return rows in micro-batches of at most ``budget`` tokens that keep each unit whole.

    Args:
        model: Decides the layout, packed or padded.
        rows: All rows.
        units: Numbers of the rows that belong together, such as the two of a pair.
        budget: Most tokens of a micro-batch; a larger unit stands alone. None: `own_budget`.
    """
    budget = _budget(model, rows, budget)
    size = _packed_size if _packs(model) else _padded_size
    micro_batches: list[list[int]] = []
    for unit in units:
        joined = [*micro_batches[-1], *unit] if micro_batches else []
        if joined and size([rows[number] for number in joined]) <= budget:
            micro_batches[-1] = joined
        else:
            micro_batches.append([*unit])
    return [MicroBatch(numbers, True) for numbers in micro_batches]


def split_by_tokens(
    model: Any, rows: Sequence[TokenRow], needs_gradient: Sequence[bool], budget: int | None
) -> list[MicroBatch]:
    """Return all rows in micro-batches of at most ``budget`` tokens in the model's layout.

    Rows that need no gradient stand apart, except where that costs more than taking them along: a
    row packed behind a prompt that is read with gradients anyway spares reading it once more.

    Args:
        model: Decides the layout, packed or padded.
        rows: All rows.
        needs_gradient: [R] whether a row's log-probabilities are to be differentiated.
        budget: Most tokens of a micro-batch, padding included; a longer row stands alone. None:
            `own_budget`.

    Returns:
        Those without gradients first.
    """
    budget = _budget(model, rows, budget)
    packed = _packs(model)
    split = split_into_packs if packed else split_padded
    carried = riders(rows, needs_gradient) if packed else set()
    with_gradient = [n for n in range(len(rows)) if needs_gradient[n] or n in carried]
    without = [n for n in range(len(rows)) if not needs_gradient[n] and n not in carried]
    return [MicroBatch(part, False) for part in split(rows, without, budget)] + [
        MicroBatch(part, True) for part in split(rows, with_gradient, budget)
    ]


def split_padded(rows: Sequence[TokenRow], numbers: Sequence[int], budget: int) -> list[list[int]]:
    """Return the row numbers in micro-batches whose padded size stays within ``budget`` tokens.

    Rows are taken by falling length, so that little is padded and the largest allocation comes
    first; a row longer than the budget makes a micro-batch of its own.
    """
    micro_batches: list[list[int]] = []
    for number in sorted(numbers, key=lambda number: (-len(rows[number]), number)):
        last = micro_batches[-1] if micro_batches else None
        if last and len(rows[last[0]]) * (len(last) + 1) <= budget:
            last.append(number)
        else:
            micro_batches.append([number])
    return micro_batches


def _budget(model: Any, rows: Sequence[TokenRow], budget: int | None) -> int:
    if budget is not None:
        return budget
    return own_budget(max(map(len, rows), default=0), device_of(bare(model)).type)


def _packs(model: Any) -> bool:
    hugging_face = bare(model)
    return shares_prompts(hugging_face) and head_obstacle(hugging_face) is None


def _packed_size(rows: Sequence[TokenRow]) -> int:
    prompts = {tuple(row.prompt_ids) for row in rows}
    return sum(map(len, prompts)) + sum(len(row.answer_ids) - 1 for row in rows)


def _padded_size(rows: Sequence[TokenRow]) -> int:
    return len(rows) * max(map(len, rows))


def at_least_float32(values: Tensor) -> Tensor:
    """Return values in float32, or in float64 if that is what they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _full_loss(
    logits: Tensor, targets: Tensor, temperature: float, weigh: Weigh | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, log-probabilities [K] and entropies [K] from the logits of all positions."""
    everyone = torch.log_softmax(at_least_float32(logits) / temperature, dim=-1)
    flat = everyone.gather(1, targets[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(everyone.exp() * everyone).nan_to_num(0.0).sum(dim=-1)
    if weigh is None:
        return flat.new_zeros(()), flat.detach(), entropy
    weights = weigh(slice(0, len(targets)), flat.detach())
    return -(weights * flat).sum(), flat.detach(), entropy
