"""Keeps the update near the reference model: gradient norm, drift, outward mask."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from grao_lightning.batch import OutwardLimits, PromptBatch
from grao_lightning.callbacks.phase import phase
from grao_lightning.faults import Faults, NamedSettings
from grao_lightning.language_model.logprobs import frozen_logprobs
from grao_lightning.objectives.clipping import capped_norm, token_drift


class ReferenceAwareClipping(NamedSettings, Callback):
    """Caps the gradient norm and, as options, holds the policy near the reference model.

    The gate on the reference answer's advantage (`GRAOWeights`) is what cures the literal formula's
    runaway; these are the belts beside it. Note that AdamW undoes a constant scaling of the
    gradient, so a lowered cap bites while the drift changes, or under SGD.

    Args:
        max_norm: Cap of the gradient's norm over all parameters.
        drift_target: Nats per token: once the drift from the reference model exceeds it, the cap
            falls in proportion; null = never.
        outward_mask: Drop tokens that are pushed further out of [1 - eps_low, 1 + eps_high] of
            the reference model's probability.
        eps_low: Lower side of the outward mask.
        eps_high: Upper side of the outward mask.
        drift_every: Measure the drift every so many steps; 0 = never. A forward pass of the
            reference model; needed at every step by ``drift_target`` and ``outward_mask``.
    """

    #: Non-finite gradients in a row that are skipped before the run is given up.
    patience = 10

    def __init__(
        self,
        max_norm: float = 1.0,
        drift_target: float | None = None,
        outward_mask: bool = False,
        eps_low: float = 0.8,
        eps_high: float = 4.0,
        drift_every: int = 1,
    ) -> None:
        self.max_norm = max_norm
        self.drift_target = drift_target
        self.outward_mask = outward_mask
        self.eps_low = eps_low
        self.eps_high = eps_high
        self.drift_every = drift_every
        self._batch: PromptBatch | None = None
        self._skipped_in_a_row = 0

    def faults(self, has_reference_model: bool = True) -> Faults:
        """Return what is wrong with the settings."""
        faults = Faults()
        if not self.max_norm > 0:
            faults.add(f"clipping.max_norm must be > 0; got {self.max_norm}")
        if self.drift_target is not None and not self.drift_target > 0:
            faults.add(f"clipping.drift_target must be > 0 or null; got {self.drift_target}")
        if not 0 < self.eps_low < 1:
            faults.add(f"clipping.eps_low must lie in (0, 1); got {self.eps_low}")
        if not self.eps_high > 0:
            faults.add(f"clipping.eps_high must be > 0; got {self.eps_high}")
        faults.at_least("clipping.drift_every", self.drift_every, 0)
        needing = [
            f"clipping.{name}" for name in ("drift_target", "outward_mask") if getattr(self, name)
        ]
        if needing and self.drift_every != 1:
            faults.add(
                f"{' and '.join(needing)} needs clipping.drift_every=1; got {self.drift_every}"
            )
        if needing and not has_reference_model:
            faults.add(
                f"{' and '.join(needing)} needs a reference model; set model.reference_model to "
                "policy or to a model"
            )
        return faults

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Compute the reference model's log-probabilities where this step needs them."""
        self._batch = batch
        model = pl_module.reference_model
        due = self.drift_every and trainer.global_step % self.drift_every == 0
        if model is None or not due or batch.completions is None:
            return
        with phase(trainer, batch, "reference_model"):
            batch.reference_model_logprobs = frozen_logprobs(
                model,
                pl_module.rows(batch),
                pl_module.micro_batch_tokens,
                temperature=pl_module.training_temperature,
            )
        if self.outward_mask:
            batch.outward_limits = OutwardLimits(1 - self.eps_low, 1 + self.eps_high)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: Any, optimizer: Optimizer
    ) -> None:
        """Clip the gradient norm; drop a gradient that is not finite."""
        assert self._batch is not None, "on_train_batch_start comes first"
        cap = capped_norm(self.max_norm, self._drift(pl_module), self.drift_target)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(_whole(torch.nn.utils.clip_grad_norm_(parameters, cap)))
        self._batch.statistics.mean("grad_norm", norm)
        self._batch.statistics.mean("clip_ratio/grad_norm", float(norm > cap))
        if not math.isfinite(norm):
            self._skip(trainer, optimizer, norm)
        else:
            self._skipped_in_a_row = 0

    def _drift(self, pl_module: Any) -> float:
        """Return the mean drift over the sampled tokens of all ranks; NaN where not measured."""
        batch = self._batch
        assert batch is not None
        if batch.reference_model_logprobs is None or batch.completions is None:
            return math.nan
        assert batch.policy_logprobs is not None, "the training step fills policy_logprobs"
        number = len(batch.completions.ids)
        drift = token_drift(
            torch.cat(batch.policy_logprobs[:number]),
            torch.cat(batch.reference_model_logprobs[:number]),
        )
        batch.statistics.mean("kl", drift)
        return pl_module.global_sum(drift.sum().item()) / pl_module.global_sum(len(drift))

    def _skip(self, trainer: Trainer, optimizer: Optimizer, norm: float) -> None:
        # Without gradients the optimiser leaves weights and moments as they are.
        optimizer.zero_grad(set_to_none=True)
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.patience:
            raise FloatingPointError(
                f"the gradient norm was {norm} in {self.patience} steps in a row, the last one "
                f"{trainer.global_step}; lower model.learning_rate, or use bf16-mixed or 32-true"
            )
        rank_zero_warn(
            f"step {trainer.global_step}: the gradient norm is {norm}; this step changes nothing"
        )


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """Return the norm over all ranks, among which gradients may be dealt out."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
