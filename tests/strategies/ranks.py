"""Runs of the embedded task with fsdp2 on several CPU processes; started by test_checkpoints.

Arguments: the number of ranks, the folder, and what to do, in JSON: a list of runs, each of the
options of `run`.
"""

import contextlib
import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.distributed.checkpoint import FileSystemWriter

from grao_lightning import GRAOModule
from grao_lightning.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from grao_lightning.callbacks.last_step import ValidateLastStep
from grao_lightning.strategies import sharded
from tests.runs import fit, stages

EVERY = 2  # steps between checkpoints


def kill_in_the_next_save() -> None:
    """Let this process be killed once it has written its shard, before the list of contents."""
    write = FileSystemWriter.write_data

    def dies(self: Any, *args: Any, **options: Any) -> None:
        write(self, *args, **options).wait()
        os.kill(os.getpid(), signal.SIGKILL)

    FileSystemWriter.write_data = dies


class Fail(Callback):
    """Raises on some ranks when a step begins."""

    def __init__(self, step: int, ranks: list[int]) -> None:
        self.step, self.ranks = step, ranks

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank in self.ranks:
            raise RuntimeError("out of luck")


def run(
    folder: Path,
    name: str,
    *,
    ranks: int,
    strategy: str = "fsdp2",
    resume: str | None = None,
    killed_at: int = 0,
    failing: tuple[int, list[int]] = (0, []),
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
        save_on_exception=True,
        enable_version_counter=False,
        export_every=4,
    )
    own = [] if best is None else [ValidateLastStep(), BestCheckpoint(dirpath=folder, **best)]
    module = fit(
        folder,
        module=GRAOModule(policy="embedded:keywords-weak", learning_rate=1e-3),
        data={"prompts_per_step": 4, "validation_prompts": 4},
        callbacks=[*stages(), Fail(*failing), *own, last],
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
    if best is not None:  # weights alone are enough for that, also after a run
        path = str(folder / "best.ckpt")
        data = module.trainer.datamodule
        module.trainer.validate(module, datamodule=data, ckpt_path=path, verbose=False)
    return module


def meet(folder: Path, strategy: Any) -> None:
    """Leave what each rank finds when both come, when one is a step behind, and when one comes."""
    sharded._SOON = timedelta(seconds=2)
    rank, store = strategy.global_rank, strategy._store
    found = []
    for name, step in (("both", 3), ("behind", 3 + rank), ("alone", 5)):
        strategy._store = torch.distributed.PrefixStore(name, store)
        if name != "alone" or rank == 0:
            found.append(strategy.is_joined(step))
    (folder / f"joined_{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


def main(ranks: int, folder: Path, runs: list[dict]) -> None:
    module = None
    sharded._SOON = timedelta(seconds=5)
    for options in runs:
        if options.get("failing", [0, []])[1] == [*range(ranks)]:
            with contextlib.suppress(RuntimeError):
                run(folder, ranks=ranks, **options)
        else:
            module = run(folder, ranks=ranks, **options)
    if ranks == 2:
        meet(folder, module.trainer.strategy)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    # Left to the end of the process, gloo's thread may meet a Python that is gone, and abort.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
