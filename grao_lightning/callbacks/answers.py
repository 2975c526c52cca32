"""What the newest validation saw, prompt by prompt: ``answers.jsonl`` in the run's folder."""

import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from grao_lightning.batch import PromptBatch
from grao_lightning.data.encoding import batch_as_read
from grao_lightning.files import write_whole


class ValidationAnswers(Callback):
    """Writes one line a validation prompt: texts, lengths, rewards and outcomes.

    What ends in ``_as_read`` is what the token ids say: through the template, as long as
    ``data.max_prompt_tokens`` allows, special tokens included. Other ranks than the first write
    ``answers.rank1.jsonl`` and so on. A missing score is null.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Ask for the run's folder on all ranks: Lightning broadcasts it."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget the validation before."""
        self._rows = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, *_: Any
    ) -> None:
        """Take in a batch."""
        if not pl_module.samples:
            return
        self._rows += answer_rows(batch, pl_module.tokenizer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the rows, whole or not at all."""
        if trainer.sanity_checking or not pl_module.samples:
            return
        rank = f".rank{trainer.global_rank}" if trainer.global_rank else ""
        lines = "".join(json.dumps(row) + "\n" for row in self._rows)
        write_whole(self._folder / f"answers{rank}.jsonl", lines)


def answer_rows(batch: PromptBatch, tokenizer: Any) -> list[dict[str, Any]]:
    """Return a row a prompt of a sampled and scored validation batch.

    Args:
        batch: Of validation.
        tokenizer: Of the policy: says what the token ids are, special tokens included.
    """
    as_read = batch_as_read(batch, tokenizer)
    assert as_read.completions is not None
    assert batch.completions is not None
    assert batch.rewards is not None and batch.outcomes is not None
    has_answers = batch.has_reference_answers
    rows = []
    for number, index in enumerate(batch.indices):
        row = {
            "index": index,
            "prompt": batch.prompts[number],
            "completion": batch.completions.texts[number],
            "length": len(batch.completions.ids[number]),
            "truncated": batch.completions.truncated[number],
            "reward": batch.rewards[number, 0].item(),
            "outcome": batch.outcomes[number, 0].item(),
            "reference_answer": batch.reference_answers[number] if has_answers else None,
            "reference_answer_length": (
                len(batch.reference_answer_ids[number]) if has_answers else None
            ),
            "reference_answer_reward": batch.rewards[number, 1].item(),
            "prompt_as_read": as_read.prompts[number],
            "completion_as_read": as_read.completions.texts[number],
            "reference_answer_as_read": as_read.reference_answers[number] if has_answers else None,
        }
        if batch.base_completions is not None:
            assert batch.base_rewards is not None and batch.base_outcomes is not None
            assert batch.gain_outcomes is not None
            row |= {
                "base_completion": batch.base_completions.texts[number],
                "base_length": len(batch.base_completions.ids[number]),
                "base_reward": batch.base_rewards[number].item(),
                "base_outcome": batch.base_outcomes[number].item(),
                "gain_outcome": batch.gain_outcomes[number].item(),
            }
        missing = {
            name for name, value in row.items() if isinstance(value, float) and math.isnan(value)
        }
        rows.append({name: None if name in missing else value for name, value in row.items()})
    return rows
