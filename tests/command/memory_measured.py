"""What a real step needs at most, beside what `grao memory` computes for it.

python -m tests.command.memory_measured MODEL PRECISION [gradient_checkpointing]

MODEL is SmolLM2-135M as a folder or .gguf file. One step of SFT on a pack of 1,024 tokens, on CPU:
resident memory above what the process held before the model was read.
"""

import resource
import sys
import tempfile
from pathlib import Path

import torch

from grao_lightning import PromptDataModule, SFTModule
from grao_lightning.command.memory import planned
from grao_lightning.language_model import footprint
from tests.command.memory_page import SHAPES
from tests.runs import stages, trainer

TOKENS = 1024


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main(model: str, precision: str, *more: str) -> None:
    """Print what was computed, what was measured, and their ratio."""
    torch.set_num_threads(1)
    options = {"micro_batch_tokens": TOKENS + 64, "gradient_checkpointing": bool(more)}
    answer = " word" * (TOKENS // 2)
    rows = [{"prompt": " word" * (TOKENS // 2), "completion": answer}] * 2
    module = SFTModule(policy=model, learning_rate=1e-6, reference_model=None, **options)
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(Path(folder), callbacks=stages(), max_steps=2, precision=precision)
        data = PromptDataModule(train=rows, validation=rows, prompts_per_step=1)
        before = _resident()
        run.fit(module, datamodule=data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    settings = {"policy": str(SHAPES / "smollm2_135m.json"), "reference_model": None}
    settings |= {**options, "micro_batch_tokens": TOKENS}
    plan = planned(
        {
            "model": {"class_path": "SFTModule", "init_args": settings},
            "trainer": {"precision": precision, "accelerator": "cpu"},
            "sampling": {"rows_at_once": 1, "max_new_tokens": 1},
        }
    )
    _, computed = footprint.device(plan.size, plan.run, plan.reference_model)
    print(
        f"{precision} {' '.join(more)}: computed {computed / 2**20:.0f} MiB, measured "
        f"{peak / 2**20:.0f} MiB, {computed / peak:.2f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
