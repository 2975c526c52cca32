"""Completions of groups in which every prompt is read once: the fast path of sampling.

A prompt passes through the model once, its keys and values are kept once a prompt, and each
decoding step reads them once a group. Rows that have ended leave the batch. Shapes: B prompts of at
most P tokens, N rows in the decoding batch, Hq query heads, H key heads, D their size.
"""

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from grao_lightning.batch import TokenIds
from grao_lightning.language_model.attention import flash, merge
from grao_lightning.language_model.head import head_of
from grao_lightning.language_model.trial import decoder_of
from grao_lightning.sampling.draw import Draw, Ended, Progress
from grao_lightning.sampling.packed import packed, product_with

# Moving the survivors' caches together costs a copy, so it waits until it frees a quarter of them.
_WORTH_MOVING = 0.75


def decode_groups(
    model: Any,
    prompts: Sequence[TokenIds],
    group_size: int,
    max_new_tokens: int,
    draw: Draw,
    ended: Ended,
    report: Progress,
) -> list[TokenIds]:
    """Complete groups as a `Decoder`, on CPU, by a model whose attention is ``SHARED``."""
    completions: list[TokenIds] = [[] for _ in range(len(prompts) * group_size)]
    groups = _Groups(prompts, group_size, max_new_tokens)
    decoder, head = decoder_of(model), head_of(model)
    assert head is not None, "the trial refuses models whose head cannot be told"
    with packed(decoder):
        project = product_with(head.weight, head.bias)
        logits = head.shaped(project(_prefill(decoder, groups, prompts)))
        logits = logits.repeat_interleave(group_size, dim=0)
        for position in range(max_new_tokens):
            tokens = draw(groups.rows, position, logits)
            alive = []
            for row, token in zip(groups.rows.tolist(), tokens.tolist(), strict=True):
                # A row that has ended may still ride along until the next move.
                if not groups.done[row]:
                    completions[row].append(token)
                    groups.done[row] = ended(row, completions[row])
                alive.append(not groups.done[row])
            running = sum(alive) if position < max_new_tokens - 1 else 0
            report(position + 1, running)
            if not running:
                break
            if running <= _WORTH_MOVING * len(alive):
                kept = torch.tensor(alive).nonzero()[:, 0]
                groups.keep(kept)
                tokens = tokens[kept]
            logits = head.shaped(project(_decode(decoder, groups, tokens, position)))
    return completions


class _Groups(Cache):
    """Keys and values of the prompts, once each, and of the completions, preallocated.

    As a layout it attends (see `attention.Layout`) and keeps what it attends to: keys as they
    arrive there, whatever a model does to them after its cache (DiffLlama splits them, JetMoE
    repeats them, latent attention widens them). As a cache it gives back what it was given. An
    attention is told by its turn within a pass, since a model may use one layer several times.
    """

    is_compileable = False

    def __init__(self, prompts: Sequence[TokenIds], group_size: int, max_new_tokens: int) -> None:
        super().__init__(layers=[])
        self.lengths = torch.tensor([len(prompt) for prompt in prompts])  # [B]
        self._width = int(self.lengths.max())
        self.rows = torch.arange(len(prompts) * group_size)  # [N] numbers of the rows still here
        self.done = [False] * len(self.rows)
        self.owners = self.rows // group_size  # [N] prompt of each row, rising
        self._max_new_tokens = max_new_tokens
        self._of_prompts: list[tuple[Tensor, Tensor]] = []  # a turn: [B, H, P, D]
        self._of_rows: list[tuple[Tensor, Tensor]] = []  # a turn: [N, H, max_new_tokens, D]
        self._position: int | None = None  # None while the prompts are read
        self._turn = 0
        self._hide_padding: Tensor | None = None  # [B, 1, 1, P]
        self._arrange()

    def start_decoding(self, position: int) -> None:
        """Expect the keys and values of every row's token at ``position``."""
        self._position = position
        self._turn = 0

    def check_turns(self) -> None:
        """Raise RuntimeError if the last pass asked more or less often than that of the prompts."""
        if not self._turn or self._turn != len(self._of_prompts):
            raise RuntimeError(
                f"it asked for {self._turn} attentions a token after {len(self._of_prompts)} a "
                "prompt"
            )

    def keep(self, kept: Tensor) -> None:
        """Drop all rows but ``kept``, and prompts without rows."""
        self.rows, owners = self.rows[kept], self.owners[kept]
        prompts, self.owners = owners.unique(return_inverse=True)
        self._of_rows = [(k[kept], v[kept]) for k, v in self._of_rows]
        if len(prompts) < len(self.lengths):
            self.lengths = self.lengths[prompts]
            self._of_prompts = [(k[prompts], v[prompts]) for k, v in self._of_prompts]
        self._arrange()

    def row_positions(self, position: int) -> Tensor:
        """Return where each row's token stands in its own text, [N, 1]."""
        return (self.lengths[self.owners] + position)[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what a layer gives: it is kept when it is attended to."""
        return key_states, value_states

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return [B, Hq, P, D] for prompts, [N, Hq, 1, D] for one token a row.

        Args:
            layer: Number of the layer; not read.
            query: [B, Hq, P, D] of the prompts, then [N, Hq, 1, D] of one token a row.
            key: As ``query``, with H heads.
            value: As ``key``.
            scale: Of the products of queries and keys.
        """
        heads, depth = key.shape[1], query.shape[3]
        repeats = query.shape[1] // heads
        turn, self._turn = self._turn, self._turn + 1
        if self._position is None:
            self._of_prompts.append((key.contiguous(), value.contiguous()))
            repeated = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
            return flash(query, *repeated, causal=True, scale=scale)[0]
        asked = query.view(-1, heads, repeats, depth)
        own = flash(asked, *self._of_own(turn, key, value), causal=False, scale=scale)
        # [B, H, G * repeats, D]: a group's queries side by side, on its prompt's keys.
        of_groups = self._by_group(asked)
        mask = None if self._hide_padding is None else self._hide_padding.to(query.dtype)
        shared = flash(of_groups, *self._of_prompts[turn], causal=False, scale=scale, mask=mask)
        output, _ = merge(
            own, (self._by_row(shared[0]), self._by_row(shared[1][..., None])[..., 0])
        )
        return output.reshape(query.shape)

    def _of_own(self, turn: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest token's [N, H, 1, D]; return those of the completions so far."""
        assert self._position is not None, "prompts are stored elsewhere"
        if turn == len(self._of_rows):
            n, heads, _one, depth = key.shape
            room = key.new_empty(2, n, heads, self._max_new_tokens, depth)
            self._of_rows.append((room[0], room[1]))
        keys, values = self._of_rows[turn]
        end = self._position + 1
        keys[:, :, self._position : end] = key
        values[:, :, self._position : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Return 0: positions are always given."""
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
        """Return sizes for a mask that nothing reads."""
        return query_length, 0

    def _arrange(self) -> None:
        """Place rows in a grid [B, largest group]: groups are uneven once rows have left."""
        sizes = torch.bincount(self.owners, minlength=len(self.lengths))
        first = torch.cumsum(sizes, 0) - sizes
        self._largest = int(sizes.max())
        within = torch.arange(len(self.rows)) - first[self.owners]
        self._place = self.owners * self._largest + within  # [N]
        self._even = bool((sizes == self._largest).all())
        self._hide_padding = None
        if int(self.lengths.min()) < self._width:
            padded = torch.arange(self._width)[None] >= self.lengths[:, None]
            hidden = torch.zeros(padded.shape).masked_fill_(padded, -torch.inf)
            self._hide_padding = hidden[:, None, None]

    def _by_group(self, values: Tensor) -> Tensor:
        """Return [B, H, largest group * repeats, D] from [N, H, repeats, D]."""
        if not self._even:
            room = values.new_zeros(len(self.lengths) * self._largest, *values.shape[1:])
            values = room.index_copy_(0, self._place, values)
        grid = values.reshape(len(self.lengths), self._largest, *values.shape[1:])
        return grid.transpose(1, 2).flatten(2, 3)

    def _by_row(self, values: Tensor) -> Tensor:
        """Return [N, H, repeats, D] from [B, H, largest group * repeats, D]."""
        groups, heads, both, depth = values.shape
        grid = values.view(groups, heads, self._largest, both // self._largest, depth)
        rows = grid.transpose(1, 2).flatten(0, 1)
        return rows if self._even else rows[self._place]


def _prefill(decoder: Any, groups: _Groups, prompts: Sequence[TokenIds]) -> Tensor:
    """Read every prompt once and return the states of their last tokens, [B, H]."""
    width = int(groups.lengths.max())
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    states = _states(decoder, groups, ids, torch.arange(width).expand(len(prompts), -1))
    return states[torch.arange(len(prompts)), groups.lengths - 1]


def _decode(decoder: Any, groups: _Groups, tokens: Tensor, position: int) -> Tensor:
    """Return the states of the rows' tokens at ``position`` of their completions, [N, H]."""
    groups.start_decoding(position)
    return _states(decoder, groups, tokens[:, None], groups.row_positions(position))[:, 0]


def _states(decoder: Any, groups: _Groups, ids: Tensor, positions: Tensor) -> Tensor:
    output = decoder(
        input_ids=ids,
        position_ids=positions,
        # Four dimensions: handed through as it is, and never read by the layout.
        attention_mask=torch.ones(1, 1, 1, 1),
        use_cache=True,
        shared_prompts=groups,
        **{_cache_name(type(decoder).forward): groups},
    )
    groups.check_turns()
    states: Tensor = output.last_hidden_state
    return states


@cache
def _cache_name(forward: Any) -> str:
    """Return how a decoder calls its cache: transformers 5 goes from past_key_values to cache."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
