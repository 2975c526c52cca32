"""Whole runs in a few seconds, for tests that look at what a run does."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from grao_lightning import (
    GRAOModule,
    GroupSampling,
    GroupScoring,
    PromptDataModule,
    ReferenceAwareClipping,
)
from grao_lightning.rewards.protocol import RewardSpec

SCORE = "grao_lightning.embedded.keywords.keyword_score"


def stages(
    sampling: dict[str, Any] | None = None,
    scoring: dict[str, Any] | None = None,
    clipping: dict[str, Any] | None = None,
) -> list[Any]:
    """Return the three callbacks of the embedded task."""
    return [
        GroupSampling(**{"max_new_tokens": 12, "group_size": 4, **(sampling or {})}),
        GroupScoring(**{"rewards": [RewardSpec(SCORE)], "tie_tolerance": 0.02, **(scoring or {})}),
        ReferenceAwareClipping(**(clipping or {})),
    ]


def trainer(folder: Path, **options: Any) -> Trainer:
    """Return a Trainer that writes nothing but what is asked for."""
    return Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "max_epochs": -1,
            "max_steps": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            **options,
        }
    )


def trainer_at(step: int) -> SimpleNamespace:
    """Return what the stages ask of a Trainer, without a run."""
    return SimpleNamespace(
        global_step=step,
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        progress_bar_callback=None,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def fit(
    folder: Path,
    *,
    module: Any = None,
    data: dict[str, Any] | None = None,
    callbacks: list[Any] | None = None,
    seed: int = 0,
    ckpt_path: str | None = None,
    **options: Any,
) -> Any:
    """Train the embedded task for a few steps and return the module."""
    seed_everything(seed, verbose=False)
    module = module or GRAOModule(policy="embedded:keywords-weak", learning_rate=1e-3)
    run = trainer(folder, callbacks=callbacks or stages(), **options)
    run.fit(module, datamodule=PromptDataModule(**(data or {})), ckpt_path=ckpt_path)
    return module


def weights(module: Any) -> dict[str, torch.Tensor]:
    """Return a copy of the trained model's weights."""
    model = module.policy if hasattr(module, "policy") else module.reward_model
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Return the largest absolute difference of two policies' weights."""
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def two_ranks(folder: Path, *options: dict) -> dict:
    """Run `tests.modules.two_ranks` and return what it found; weights.pt and others lie beside."""
    script = Path(__file__).parent / "modules" / "two_ranks.py"
    result = subprocess.run(
        [sys.executable, script, folder, *map(json.dumps, options)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "sync_dist" not in result.stderr, "ranks agree on every figure, and nothing warns"
    return json.loads((folder / "norms.json").read_text())
