"""Completions of groups: sampled in the fastest way that is exact for the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grao_lightning.batch import Completions, TokenIds
from grao_lightning.language_model.frozen import gathered
from grao_lightning.language_model.positions import (
    check_length,
    chooses_frequencies,
    frequencies_of,
    most_positions,
)
from grao_lightning.language_model.sharded import device_of
from grao_lightning.language_model.transfer import sent
from grao_lightning.sampling.draw import Ended, Progress, SamplingSettings, draw_tokens
from grao_lightning.sampling.trial import attention_of, forget_rows, way_of
from grao_lightning.sampling.ways import SAME_LENGTH, SHARED, Batch, batches

#: Tokens at a prompt's end among which a template may open a completion.
_END = 16


@torch.no_grad()
def sample_completions(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[TokenIds],
    uniforms: Sequence[Tensor],
    settings: SamplingSettings,
    *,
    rows_at_once: int,
    progress: Progress | None = None,
) -> Completions:
    """Return G completions of every prompt, in prompt-major order.

    Args:
        model: A Hugging Face causal language model or a `FrozenModel`; left in the mode it came in.
        tokenizer: Decodes the completions.
        prompt_ids: B prompts, none of them empty.
        uniforms: B tensors [G, max_new_tokens] of `row_uniforms`.
        settings: How tokens are drawn.
        rows_at_once: Most rows decoded together, but at least one group; bounds the cache.
        progress: Told after each position of the rows decoded together; rows that wait for their
            turn count as not ended.
    """
    ended = Ending(tokenizer, settings)

    def sampled(model: Any) -> list[TokenIds]:
        return _sampled(model, prompt_ids, uniforms, settings, ended, rows_at_once, progress)

    ids = gathered(model, sampled)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    inner = [row[:-1] if row[-1] in settings.eos_ids else row for row in ids]
    written = tokenizer.batch_decode(inner, skip_special_tokens=False)
    return Completions(
        ids=ids,
        texts=[_before_stop(text, settings.stop_strings) for text in texts],
        truncated=[not ended.whole(row, text) for row, text in zip(ids, texts, strict=True)],
        group_size=len(uniforms[0]),
        max_tokens=settings.max_new_tokens,
        written=[_before_stop(text, settings.stop_strings) for text in written],
        prompt_ends=tokenizer.batch_decode([prompt[-_END:] for prompt in prompt_ids]),
    )


def _sampled(
    model: Any,
    prompt_ids: Sequence[TokenIds],
    uniforms: Sequence[Tensor],
    settings: SamplingSettings,
    ended: "Ending",
    rows_at_once: int,
    progress: Progress | None,
) -> list[TokenIds]:
    """Return the token ids of all completions, in prompt-major order."""
    group_size = len(uniforms[0])
    ids: list[TokenIds] = [[] for _ in range(len(prompt_ids) * group_size)]
    waiting = len(ids)
    with generation_mode(model):
        lengths = [len(prompt) for prompt in prompt_ids]
        if most_positions(model) is not None:
            check_length(model, max(lengths) + settings.max_new_tokens)
        for batch in _batches(model, lengths, group_size, rows_at_once, settings.max_new_tokens):
            rows = batch.rows(group_size)
            numbers = torch.stack([uniforms[n][m] for n in batch.prompts for m in batch.members])
            waiting -= len(rows)
            decoded = _decode(
                model, batch, prompt_ids, numbers, settings, ended, _counting(progress, waiting)
            )
            for row, completion in zip(rows.tolist(), decoded, strict=True):
                ids[row] = completion
    return ids


def _batches(
    model: Any, lengths: list[int], group_size: int, rows_at_once: int, max_new_tokens: int
) -> Iterator[Batch]:
    """Yield batches in which no row changes what another is given.

    A row that comes to other frequencies while it is decoded does so where ``generate`` does, which
    may read it anew: such rows are left to it, those of one length together.
    """
    if not chooses_frequencies(model):
        every = range(len(lengths))
        yield from batches(way_of(model), every, lengths, group_size, rows_at_once)
        return
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for number, length in enumerate(lengths):
        first = frequencies_of(model, length)
        stays = first == frequencies_of(model, length + max_new_tokens - 1)
        kinds.setdefault((stays, first), []).append(number)
    for (stays, _), numbers in kinds.items():
        way = way_of(model, SHARED if stays else SAME_LENGTH)
        yield from batches(way, numbers, lengths, group_size, rows_at_once)


def _decode(
    model: Any,
    batch: Batch,
    prompt_ids: Sequence[TokenIds],
    numbers: Tensor,
    settings: SamplingSettings,
    ended: Ended,
    report: Progress,
) -> list[TokenIds]:
    """Return the completions of a batch, drawn with the uniform numbers [rows, max_new_tokens]."""
    (numbers,) = sent(device_of(model), numbers)  # once, and not a column for every token

    def draw(rows: Tensor, position: int, logits: Tensor) -> Tensor:
        return draw_tokens(logits, numbers[rows, position], settings)

    prompts = [prompt_ids[number] for number in batch.prompts]
    with attention_of(model, batch.way):
        forget_rows(model, batch.way)
        return batch.way.decode(
            model, prompts, len(batch.members), settings.max_new_tokens, draw, ended, report
        )


def _counting(progress: Progress | None, waiting: int) -> Progress:
    """Return the progress of some rows, while others wait for their turn."""

    def report(tokens: int, running: int) -> None:
        if progress is not None:
            progress(tokens, running + waiting)

    return report


class Ending:
    """Tells whether a completion is over: by any end-of-sequence id or any stop string."""

    def __init__(self, tokenizer: Any, settings: SamplingSettings) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(settings.eos_ids)
        self._stop_strings = settings.stop_strings
        # A token holds at least one byte, so a tail this long covers a stop string just completed.
        self._reach = max((len(stop.encode()) for stop in self._stop_strings), default=0) + 4

    def __call__(self, row: int, ids: TokenIds) -> bool:
        """Return whether the newest of a row's tokens ends it."""
        if ids[-1] in self._eos_ids:
            return True
        if not self._stop_strings:
            return False
        tail = self._tokenizer.decode(ids[-self._reach :], skip_special_tokens=True)
        return any(stop in tail for stop in self._stop_strings)

    def whole(self, ids: TokenIds, text: str) -> bool:
        """Return whether a completion ended by itself, not at the length limit."""
        return ids[-1] in self._eos_ids or any(stop in text for stop in self._stop_strings)


@contextmanager
def generation_mode(model: Any) -> Iterator[None]:
    """Switch off dropout and gradient checkpointing, and the model's own sampling defaults.

    ``generate`` fills every unset option from ``model.generation_config``: a checkpoint that ships
    a repetition penalty or top-k there would silently sample from another distribution.
    """
    from transformers import GenerationConfig

    was_training, own_config = model.training, model.generation_config
    model.eval()  # Hugging Face models checkpoint in training mode only
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own_config
        model.train(was_training)


def _before_stop(text: str, stop_strings: Sequence[str]) -> str:
    ends = [text.index(stop) for stop in stop_strings if stop in text]
    return text[: min(ends)] if ends else text
