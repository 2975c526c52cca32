"""Runs of the embedded task with fsdp2 on several CPU processes; started by test_checkpoints.

Arguments: the number of ranks, the folder, and what to do, in JSON: a list of runs, each of the
options of `run`.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter

from grao_lightning import GRAOModule
from grao_lightning.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from grao_lightning.callbacks.last_step import ValidateLastStep
from tests.runs import fit, stages

EVERY = 2  # steps between checkpoints


def kill_in_the_next_save() -> None:
    """Let this process be killed once it has written its shard, before the list of contents."""
    write = FileSystemWriter.write_data

    def dies(self: Any, *args: Any, **options: Any) -> None:
        write(self, *args, **options).wait()
        os.kill(os.getpid(), signal.SIGKILL)

    FileSystemWriter.write_data = dies


def run(
    folder: Path,
    name: str,
    *,
    ranks: int,
    strategy: str = "fsdp2",
    resume: str | None = None,
    killed_at: int = 0,
    max_steps: int = 4,
    best: dict | None = None,
) -> Any:
    """Train in float64, leave checkpoints in a folder and the weights beside; return the module."""

    class Last(LastCheckpoint):
        def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
            if trainer.global_step == killed_at:
                kill_in_the_next_save()
            super()._save_checkpoint(trainer, filepath)

    last = Last(
        folder / name,
        filename="last",
        every_n_train_steps=EVERY,
        enable_version_counter=False,
        export_every=4,
    )
    own = [] if best is None else [ValidateLastStep(), BestCheckpoint(dirpath=folder, **best)]
    module = fit(
        folder,
        module=GRAOModule(policy="embedded:keywords-weak", learning_rate=1e-3),
        data={"prompts_per_step": 4, "validation_prompts": 4},
        callbacks=[*stages(), *own, last],
        enable_checkpointing=True,
        devices=ranks,
        strategy=strategy,
        precision="64-true",
        max_steps=max_steps,
        limit_val_batches=0 if best is None else 1.0,
        val_check_interval=EVERY,
        ckpt_path=resume,
    )
    whole = {
        key: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for key, value in module.policy.state_dict().items()
    }
    if module.global_rank == 0:
        torch.save(whole, folder / f"{name}.pt")
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    for options in json.loads(sys.argv[3]):
        run(Path(sys.argv[2]), ranks=int(sys.argv[1]), **options)
    # Left to the end of the process, gloo's thread may meet a Python that is gone, and abort.
    torch.distributed.destroy_process_group()
