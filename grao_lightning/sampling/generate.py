"""Completions through Hugging Face ``generate``: the plain path.

Prompts of several lengths are padded, which some models read or count; see `ways`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grao_lightning.batch import TokenIds
from grao_lightning.language_model.sharded import device_of
from grao_lightning.language_model.transfer import sent
from grao_lightning.sampling.draw import Draw, Ended, Progress


def generate_rows(
    model: Any,
    prompts: Sequence[TokenIds],
    group_size: int,
    max_new_tokens: int,
    draw: Draw,
    ended: Ended,
    report: Progress,
) -> list[TokenIds]:
    """Complete groups as a `Decoder`; every row reads its own prompt, padded on the left."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    device = device_of(model)
    width = max(len(prompt) for prompt in prompts)
    rows = [prompt for prompt in prompts for _ in range(group_size)]
    padding = [width - len(prompt) for prompt in rows]
    ids, mask = sent(
        device,
        torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)]),
        torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]),
    )

    def report_position(tokens: int, running: int) -> None:
        report(tokens, running if tokens < max_new_tokens else 0)

    recorder = _Recorder(len(rows), width, draw, ended, report_position, device)
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
        ),
        logits_processor=LogitsProcessorList([recorder.draw]),
        stopping_criteria=StoppingCriteriaList([recorder.finished]),
        synced_gpus=False,  # sharded weights are gathered, and ranks need not keep step
    )
    return recorder.completions


class _Recorder:
    """Draws the tokens of ``generate`` and notes, per row, those before and at its end.

    Lengths are noted here because they cannot be read off the padded output afterwards: the
    padding id may be an end-of-sequence id, or any token.
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        draw: Draw,
        ended: Ended,
        report: Progress,
        device: torch.device,
    ) -> None:
        self.completions: list[TokenIds] = [[] for _ in range(num_rows)]
        self._rows = torch.arange(num_rows, device=device)
        self._width = width
        self._draw = draw
        self._ended = ended
        self._report = report
        self._done = [False] * num_rows

    def draw(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Return scores whose argmax is the drawn token."""
        tokens = self._draw(self._rows, ids.shape[1] - self._width, logits)
        return torch.zeros_like(logits).scatter_(1, tokens[:, None], 1.0)

    def finished(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Note the newest tokens and return [N] bool, True for rows that have ended."""
        for number, token in enumerate(ids[:, -1].tolist()):
            if not self._done[number]:
                self.completions[number].append(token)
                self._done[number] = self._ended(number, self.completions[number])
        self._report(ids.shape[1] - self._width, self._done.count(False))
        (done,) = sent(ids.device, torch.tensor(self._done))
        return done
