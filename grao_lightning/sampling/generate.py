"""Completions through Hugging Face ``generate``: the plain path, right for every causal model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grao_lightning.batch import Completions, TokenIds
from grao_lightning.sampling.draw import SamplingSettings, draw_tokens


@torch.no_grad()
def sample_completions(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[TokenIds],
    uniforms: Sequence[Tensor],
    settings: SamplingSettings,
    *,
    rows_at_once: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Completions:
    """Return G completions of every prompt, in prompt-major order.

    Args:
        model: A Hugging Face causal language model; left in the mode it came in.
        tokenizer: Decodes the completions.
        prompt_ids: B prompts, none of them empty.
        uniforms: B tensors [G, max_new_tokens] of `row_uniforms`.
        settings: How tokens are drawn.
        rows_at_once: Most rows decoded together; bounds the memory of the cache.
        progress: Called with the number of rows finished so far.
    """
    group_size = len(uniforms[0])
    row_prompts = [prompt for prompt in prompt_ids for _ in range(group_size)]
    row_numbers = torch.cat(list(uniforms))
    ids: list[TokenIds] = []
    with generation_mode(model):
        for start in range(0, len(row_prompts), rows_at_once):
            part = slice(start, start + rows_at_once)
            ids += _generate(model, tokenizer, row_prompts[part], row_numbers[part], settings)
            progress(len(ids))
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Completions(
        ids=ids,
        texts=[_before_stop(text, settings.stop_strings) for text in texts],
        truncated=[
            not _has_ended(row, text, settings) for row, text in zip(ids, texts, strict=True)
        ],
        group_size=group_size,
    )


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


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[TokenIds],
    uniforms: Tensor,
    settings: SamplingSettings,
) -> list[TokenIds]:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + row for pad, row in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
    recorder = _Recorder(tokenizer, width, uniforms, settings)
    model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=GenerationConfig(
            max_new_tokens=settings.max_new_tokens, do_sample=False, pad_token_id=0
        ),
        logits_processor=LogitsProcessorList([recorder.draw]),
        stopping_criteria=StoppingCriteriaList([recorder.finished]),
    )
    return recorder.completions


class _Recorder:
    """Draws the tokens of ``generate`` and notes, per row, those before and at its end.

    Lengths are noted here because they cannot be read off the padded output afterwards: the
    padding id may be an end-of-sequence id, or any token.
    """

    def __init__(
        self, tokenizer: Any, width: int, uniforms: Tensor, settings: SamplingSettings
    ) -> None:
        self.completions: list[TokenIds] = [[] for _ in range(len(uniforms))]
        self._tokenizer = tokenizer
        self._width = width
        self._uniforms = uniforms
        self._settings = settings
        self._done = [False] * len(uniforms)

    def draw(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Return scores whose argmax is the drawn token."""
        position = ids.shape[1] - self._width
        tokens = draw_tokens(logits, self._uniforms[:, position], self._settings)
        return torch.zeros_like(logits).scatter_(1, tokens[:, None], 1.0)

    def finished(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Note the newest tokens and return [N] bool, True for rows that have ended."""
        for number, token in enumerate(ids[:, -1].tolist()):
            if not self._done[number]:
                completion = self.completions[number]
                completion.append(token)
                self._done[number] = self._ends(completion)
        return torch.tensor(self._done, device=ids.device)

    def _ends(self, completion: TokenIds) -> bool:
        if completion[-1] in self._settings.eos_ids:
            return True
        if not self._settings.stop_strings:
            return False
        # A token holds at least one byte, so this tail covers every stop string just completed.
        reach = max(len(stop.encode()) for stop in self._settings.stop_strings) + 4
        tail = self._tokenizer.decode(completion[-reach:], skip_special_tokens=True)
        return any(stop in tail for stop in self._settings.stop_strings)


def _has_ended(ids: TokenIds, text: str, settings: SamplingSettings) -> bool:
    stopped = any(stop in text for stop in settings.stop_strings)
    return stopped or (bool(ids) and ids[-1] in settings.eos_ids)


def _before_stop(text: str, stop_strings: Sequence[str]) -> str:
    ends = [text.index(stop) for stop in stop_strings if stop in text]
    return text[: min(ends)] if ends else text
