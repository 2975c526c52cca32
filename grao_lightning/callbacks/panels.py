"""TensorBoard beyond scalars: the page of the objective's terms, and completions to read."""

import html
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from grao_lightning.batch import PromptBatch
from grao_lightning.data.encoding import batch_as_read
from grao_lightning.metrics.pairs import ReliabilityBin

_TERMS = ("exploration", "imitation", "regularizer")
_LAYOUT = {
    "GRAO": {
        "objective terms": ["Multiline", [f"train/objective/{name}$" for name in _TERMS]],
        "shares of the terms": ["Multiline", [f"train/objective/{name}_share" for name in _TERMS]],
        "RAS": ["Margin", ["val/ras", "val/ras_low", "val/ras_high"]],
        "NAG": ["Margin", ["val/nag", "val/nag_low", "val/nag_high"]],
        "reward": ["Margin", ["val/reward", "val/reward_low", "val/reward_high"]],
        "log-probabilities": [
            "Multiline",
            ["train/completions/mean_logprob", "train/reference_answer/mean_logprob"],
        ],
    }
}
_PAIR_LAYOUT = {
    "Reward model": {
        "accuracy": ["Margin", ["val/accuracy", "val/accuracy_low", "val/accuracy_high"]],
        "loss": ["Multiline", ["train/loss", "val/loss$"]],
        "margin": ["Margin", ["val/margin", "val/margin_low", "val/margin_high"]],
    }
}


class TensorBoardPanels(Callback):
    """Writes the custom-scalar page and text panels: of prompts with their completions, or, for a
    reward model, of its reliability curve.

    Args:
        every_n_steps: Steps between two text panels in training; 0 = none.
        num_prompts: Prompts in a panel.
        special_tokens: Show texts as token ids read, special tokens included.
    """

    def __init__(
        self, every_n_steps: int = 25, num_prompts: int = 2, special_tokens: bool = False
    ) -> None:
        self.every_n_steps = every_n_steps
        self.num_prompts = num_prompts
        self.special_tokens = special_tokens

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the layout of the custom-scalar page."""
        writer = _writer(trainer)
        if writer is not None:
            writer.add_custom_scalars(_LAYOUT if pl_module.samples else _PAIR_LAYOUT)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
    ) -> None:
        """Write the groups of this step."""
        due = self.every_n_steps and (trainer.global_step - 1) % self.every_n_steps == 0
        self._write(trainer, pl_module, "train/completions", batch, bool(due))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the first validation prompts with the answers of the policy and of the base."""
        self._write(trainer, pl_module, "val/completions", batch, batch_idx == 0)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write a reward model's reliability curve."""
        writer = _writer(trainer)
        if writer is not None and not pl_module.samples and not trainer.sanity_checking:
            table = reliability_table(pl_module.reliability)
            writer.add_text("val/reliability", table, trainer.global_step)

    def _write(
        self, trainer: Trainer, pl_module: Any, tag: str, batch: PromptBatch, due: bool
    ) -> None:
        writer = _writer(trainer)
        if writer is not None and due and batch.completions is not None:
            if self.special_tokens:
                batch = batch_as_read(batch, pl_module.tokenizer)
            writer.add_text(tag, completion_table(batch, self.num_prompts), trainer.global_step)


def completion_table(batch: PromptBatch, num_prompts: int) -> str:
    """Return Markdown: for each of the first prompts its reference answer and its completions.

    Args:
        batch: Sampled and scored.
        num_prompts: At most so many prompts.
    """
    assert batch.completions is not None and batch.rewards is not None
    group_size = batch.completions.group_size
    parts = []
    for number in range(min(num_prompts, len(batch))):
        lines = ["| | reward | advantage | text |", "|---|---|---|---|"]
        rewards = batch.rewards[number]
        advantages = rewards * torch.nan if batch.advantages is None else batch.advantages[number]
        texts = batch.completions.texts[number * group_size : (number + 1) * group_size]
        answers = []
        if batch.has_reference_answers:
            answers = [("reference answer", -1, batch.reference_answers[number])]
        answers += [(f"completion {at + 1}", at, text) for at, text in enumerate(texts)]
        for label, at, text in answers:
            advantage = "" if advantages[at].isnan() else f"{advantages[at]:+.2f}"
            lines.append(f"| {label} | {rewards[at]:.3f} | {advantage} | {_cell(text)} |")
        if batch.base_completions is not None and batch.base_rewards is not None:
            reward, text = batch.base_rewards[number], batch.base_completions.texts[number]
            lines.append(f"| untrained base | {reward:.3f} | | {_cell(text)} |")
        parts.append(f"**prompt** {_cell(batch.prompts[number])}\n\n" + "\n".join(lines))
    return "\n\n---\n\n".join(parts)


def reliability_table(curve: Sequence[ReliabilityBin]) -> str:
    """Return Markdown: how often the model is right where it is how sure.

    Args:
        curve: Pairs by the confidence of the model.
    """
    lines = ["| confidence | right | 95 % interval | pairs |", "|---|---|---|---|"]
    for part in curve:
        right, low, high = (f"{figure:.1%}" for figure in part.accuracy)
        lines.append(f"| {part.confidence:.1%} | {right} | {low} to {high} | {part.number} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return a text as one Markdown table cell."""
    return html.escape(text.strip()).replace("|", "&#124;").replace("\n", "<br>")


def _writer(trainer: Trainer) -> Any:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            return logger.experiment
    return None
