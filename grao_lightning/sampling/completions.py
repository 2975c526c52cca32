"""Completions of groups: sampled on the fast path where the model allows it, else by generate."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grao_lightning.batch import Completions, TokenIds
from grao_lightning.language_model.sharing import shares_prompts
from grao_lightning.sampling.draw import Progress, SamplingSettings, draw_tokens
from grao_lightning.sampling.generate import generate_rows
from grao_lightning.sampling.shared_prompt import decode_groups


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
        model: A Hugging Face causal language model; left in the mode it came in.
        tokenizer: Decodes the completions.
        prompt_ids: B prompts, none of them empty.
        uniforms: B tensors [G, max_new_tokens] of `row_uniforms`.
        settings: How tokens are drawn.
        rows_at_once: Most rows decoded together, but at least one group; bounds the cache.
        progress: Told after each position of the rows decoded together; rows that wait for their
            turn count as not ended.
    """
    group_size = len(uniforms[0])
    prompts_at_once = max(1, rows_at_once // group_size)
    ended = Ending(tokenizer, settings)
    fast = shares_prompts(model) and next(model.parameters()).device.type == "cpu"
    decode = decode_groups if fast else generate_rows
    ids: list[TokenIds] = []
    with generation_mode(model):
        for start in range(0, len(prompt_ids), prompts_at_once):
            part = slice(start, start + prompts_at_once)
            numbers = torch.cat(list(uniforms[part]))
            waiting = len(prompt_ids[part.stop :]) * group_size

            def draw(
                rows: Tensor, position: int, logits: Tensor, numbers: Tensor = numbers
            ) -> Tensor:
                return draw_tokens(logits, numbers[rows, position], settings)

            def report(tokens: int, running: int, waiting: int = waiting) -> None:
                if progress is not None:
                    progress(tokens, running + waiting)

            ids += decode(
                model, prompt_ids[part], group_size, settings.max_new_tokens, draw, ended, report
            )
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Completions(
        ids=ids,
        texts=[_before_stop(text, settings.stop_strings) for text in texts],
        truncated=[not ended.whole(row, text) for row, text in zip(ids, texts, strict=True)],
        group_size=group_size,
        max_tokens=settings.max_new_tokens,
    )


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
