"""Samples the completions of every prompt before its step."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from grao_lightning.batch import Completions, PromptBatch
from grao_lightning.callbacks.console import StepProgressBar
from grao_lightning.callbacks.phase import RareWarning, phase
from grao_lightning.faults import Faults, NamedSettings, UserError
from grao_lightning.randomness import run_seed
from grao_lightning.sampling.completions import sample_completions
from grao_lightning.sampling.draw import Progress, SamplingSettings, Stream, row_uniforms


class GroupSampling(NamedSettings, Callback):
    """Fills ``batch.completions``: G a prompt in training, one in validation.

    In validation the untrained base (the reference model) answers the same prompts with the same
    random numbers; its completions are made once and kept. Randomness is a pure function of (seed,
    step, prompt).

    Args:
        group_size: G, completions a prompt.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with at least this probability; 1 keeps all.
        min_p: Drop tokens less likely than this share of the most likely one; 0 keeps all.
        max_new_tokens: Longest completion, its end-of-sequence token included.
        stop_strings: Texts that end a completion, beside every end-of-sequence id of the model.
        rows_at_once: Most completions decoded together on a device; bounds the cache's memory.
    """

    def __init__(
        self,
        group_size: int = 8,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        max_new_tokens: int = 256,
        stop_strings: list[str] | None = None,
        rows_at_once: int = 64,
    ) -> None:
        self.group_size = group_size
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.max_new_tokens = max_new_tokens
        self.stop_strings = stop_strings or []
        self.rows_at_once = rows_at_once
        self._settings: SamplingSettings | None = None
        self._base_completions: dict[tuple[int, ...], Completions] = {}
        self._cut_off = RareWarning()

    def faults(self) -> Faults:
        """Return what is wrong with the settings."""
        faults = Faults()
        why = "advantages compare completions within a group"
        faults.at_least("sampling.group_size", self.group_size, 2, why)
        faults.at_least("sampling.temperature", self.temperature, 0)
        faults.at_least("sampling.top_k", self.top_k, 0)
        faults.between("sampling.min_p", self.min_p, 0, 1)
        if not 0 < self.top_p <= 1:
            faults.add(f"sampling.top_p must lie in (0, 1]; got {self.top_p}")
        faults.at_least("sampling.max_new_tokens", self.max_new_tokens, 1)
        faults.at_least("sampling.rows_at_once", self.rows_at_once, 1)
        return faults

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Say once when the sampler is not the policy."""
        if self.top_k or self.top_p < 1 or self.min_p:
            rank_zero_warn(
                "sampling.top_k, top_p or min_p cuts the distribution: completions no longer come "
                "from the policy whose log-probabilities are trained; leave them off for an "
                "on-policy gradient"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Sample G completions of every prompt from the policy."""
        _refuse_others(batch)
        if not pl_module.trains_on_groups:
            return
        with phase(trainer, batch, "sample"):
            step = trainer.global_step
            uniforms = self._uniforms(batch, "train", step, self.group_size)
            batch.completions = self._sample(trainer, pl_module, pl_module.policy, batch, uniforms)
        self._note(batch.completions, batch, step)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: PromptBatch, *_: Any
    ) -> None:
        """Sample one completion of every prompt from the policy and, once, from the base."""
        _refuse_others(batch)
        if not pl_module.samples:
            return
        with phase(trainer, batch, "sample"):
            uniforms = self._uniforms(batch, "validation", 0, 1)
            batch.completions = self._sample(trainer, pl_module, pl_module.policy, batch, uniforms)
            if pl_module.reference_model is None:
                return
            key = tuple(batch.indices)
            if key not in self._base_completions:
                base = pl_module.reference_model
                self._base_completions[key] = self._sample(
                    trainer, pl_module, base, batch, uniforms
                )
            batch.base_completions = self._base_completions[key]

    def _uniforms(self, batch: PromptBatch, stream: Stream, step: int, group_size: int) -> list:
        return [
            row_uniforms(run_seed(), stream, step, index, group_size, self.max_new_tokens)
            for index in batch.indices
        ]

    def _sample(
        self, trainer: Trainer, pl_module: Any, model: Any, batch: PromptBatch, uniforms: list
    ) -> Completions:
        bar = trainer.progress_bar_callback
        num_rows = sum(len(numbers) for numbers in uniforms)
        shown: AbstractContextManager[Progress | None] = nullcontext()
        if isinstance(bar, StepProgressBar):
            shown = bar.sampling(num_rows, self.max_new_tokens)
        with shown as progress:
            return sample_completions(
                model,
                pl_module.tokenizer,
                batch.prompt_ids,
                uniforms,
                self._settings_for(pl_module),
                rows_at_once=self.rows_at_once,
                progress=progress,
            )

    def _settings_for(self, pl_module: Any) -> SamplingSettings:
        if self._settings is None:
            self._settings = SamplingSettings(
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                eos_ids=pl_module.eos_ids(),
                stop_strings=tuple(self.stop_strings),
            )
        return self._settings

    def _note(self, completions: Completions, batch: PromptBatch, step: int) -> None:
        lengths, truncated = completions.lengths, completions.truncated_mask
        batch.statistics.mean("completions/mean_length", lengths)
        batch.statistics.extremes("completions/{}_length", lengths)
        batch.statistics.mean("completions/cut_off", truncated.double())
        share = truncated.double().mean().item()
        if self._cut_off.due(step, share > 0.5):
            rank_zero_warn(
                f"step {step}: {share:.0%} of the completions were cut off at "
                f"sampling.max_new_tokens={self.max_new_tokens}; raise it, or the policy learns "
                "from unfinished answers"
            )


def _refuse_others(batch: Any) -> None:
    """Refuse batches of a plain loader, in the first of the stages that read one.

    Raises:
        UserError: It is no `PromptBatch`.
    """
    if not isinstance(batch, PromptBatch):
        raise UserError(
            "batches must be those of PromptDataModule, which tokenises and orders them; got "
            f"{type(batch).__name__}: pass datamodule=PromptDataModule(train=rows, ...), where "
            "rows may be a datasets.Dataset or a list of dicts"
        )
