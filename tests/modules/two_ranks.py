"""Three steps of the embedded task on two CPU processes; started by test_training.

Arguments: the folder for the results, and JSON of `tests.runs.fit` data, of stage options and, for
another run than GRAO in float64, of the precision, of the method and of module options.
"""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback

import grao_lightning
from grao_lightning.callbacks.summary import RunSummary
from tests.runs import fit, stages, weights


class Record(Callback):
    """Keeps the gradient norms, and of each rank sampled tokens and whether it has a signal."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.longest: list[float] = []
        self.signals: list[list[bool]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.norms.append(pl_module.step_values["grad_norm"])
        if batch.completions is None:
            return
        total = sum(len(ids) for ids in batch.completions.ids)
        self.longest += pl_module.all_gather(torch.tensor(float(total))).tolist()
        signal = torch.tensor(batch.advantages.any().item())
        self.signals.append(pl_module.all_gather(signal).tolist())


def largest_difference_of_ranks(module) -> float:
    """Return how far the ranks' weights, and their masters where they have some, are apart."""
    own = [p for p in module.parameters() if p.requires_grad]
    own += module.trainer.optimizers[0].state_dict().get("master_weights", [])
    flat = torch.cat([values.detach().double().flatten() for values in own])
    both = module.all_gather(flat)
    return (both[0] - both[1]).abs().max().item()


def main(folder: Path, data: dict, options: dict, run: dict | None = None) -> None:
    torch.set_num_threads(1)
    record = Record()
    run = run or {"precision": "64-true"}
    method = getattr(grao_lightning, run.pop("method", "GRAOModule"))
    source = method.source_setting.rpartition(".")[2]
    model = {source: "embedded:keywords-weak", "learning_rate": 1e-3, **run.pop("model", {})}
    module = fit(
        folder,
        module=method(**model),
        data=data,
        callbacks=[*stages(**options), record, RunSummary()],
        limit_val_batches=1.0,
        val_check_interval=3,
        devices=2,
        strategy="ddp",
        **run,
    )
    apart = largest_difference_of_ranks(module)
    if module.global_rank == 0:
        torch.save(weights(module), folder / "weights.pt")
        saved = module.trainer.optimizers[0].state_dict().get("master_weights")
        torch.save(saved, folder / "masters.pt")
        found = {
            "apart": apart,
            "norms": record.norms,
            "longest_of_ranks": record.longest[:2],
            "signals": record.signals,
            "values": module.step_values,
            "steps": module.trainer.global_step,
            "kl_weight": getattr(module, "kl_weight", None),
        }
        (folder / "norms.json").write_text(json.dumps(found))
    # Left to the end of the process, gloo's thread may meet a Python that is gone, and abort.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(json.loads, sys.argv[2:]))
