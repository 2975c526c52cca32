"""Three steps on a number of cards; started by `test_runs`, since every card is a process.

Arguments: the folder for the results, and JSON of method, strategy, device and number of cards.
"""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback

import grao_lightning
from grao_lightning.strategies.sharded import ShardedStrategy
from tests.runs import fit, stages


class Norms(Callback):
    """Keeps the gradient norm of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.values.append(pl_module.step_values["grad_norm"])


def main(folder: Path, run: dict) -> None:
    norms = Norms()
    strategy = ShardedStrategy() if run["strategy"] == "fsdp2" else run["strategy"]
    module = fit(
        folder,
        module=getattr(grao_lightning, run["method"])(
            policy="embedded:keywords-weak", learning_rate=1e-3, micro_batch_tokens=200
        ),
        data={"prompts_per_step": 8},
        callbacks=[*stages(), norms],
        accelerator="gpu" if run["device"] == "cuda" else "cpu",
        devices=run["cards"],
        strategy=strategy,
        precision="32-true",  # the most that fsdp2 takes
    )
    if module.global_rank == 0:
        found = {"norms": norms.values, "loss": module.step_values["loss"]}
        (folder / "steps.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
