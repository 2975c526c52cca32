"""A tokenizer for models without one, and sampling with it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from grao_lightning.batch import Completions
from grao_lightning.sampling.completions import sample_completions
from grao_lightning.sampling.draw import SamplingSettings, row_uniforms


class Words:
    """Every token is a word of its own."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def batch_decode(self, rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return [self.decode(ids) for ids in rows]


def sample(
    model: Any,
    prompts: Sequence[list[int]],
    group_size: int,
    length: int,
    *,
    uniforms: Sequence[Tensor] | None = None,
    rows_at_once: int = 64,
    **options: Any,
) -> Completions:
    """Return completions of at most ``length`` tokens, greedy ones unless told otherwise."""
    settings = SamplingSettings(max_new_tokens=length, **{"temperature": 0.0, **options})
    uniforms = uniforms or [
        row_uniforms(0, "train", 0, number, group_size, length) for number in range(len(prompts))
    ]
    return sample_completions(
        model, Words(), prompts, uniforms, settings, rows_at_once=rows_at_once
    )
