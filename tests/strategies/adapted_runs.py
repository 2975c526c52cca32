"""Runs of adapters on sharded models, in float64; weights as one process has them.

Arguments: the folder for what is found, then a folder with an adapter. Each run is told in
``found.json`` and its trained weights lie in ``<name>.pt``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback

import grao_lightning
from grao_lightning.batch import TokenRow
from grao_lightning.language_model.loading import load_model
from grao_lightning.language_model.logprobs import token_logprobs
from grao_lightning.language_model.sharing import share_prompts
from tests.runs import fit, stages

SOURCE = "embedded:keywords-weak"
ROWS = [TokenRow([5, 6, 7], [8, 9, 10]), TokenRow([5, 6, 7], [11, 12])]
ADAPTER = "the adapter's folder"
RUNS: dict[str, dict[str, Any]] = {
    "grao": {"method": "GRAOModule"},
    "ppo, checkpointing": {"method": "PPOModule", "gradient_checkpointing": True},
    "reward": {"method": "RewardModule"},
    "sft, an adapter that goes on": {"method": "SFTModule", "policy": ADAPTER, "lora": {}},
}
SHARDED = {"devices": 2, "strategy": "fsdp2"}


class Norms(Callback):
    """Keeps the gradient norms."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.values.append(pl_module.step_values["grad_norm"])


def made(name: str, adapter: str) -> Any:
    """Return the module of a run."""
    settings = dict(RUNS[name])
    method = getattr(grao_lightning, settings.pop("method"))
    source = method.source_setting.rpartition(".")[2]
    if settings.get(source) == ADAPTER:
        settings[source] = adapter
    own = {source: SOURCE, "lora": {"rank": 4}, "learning_rate": 1e-3, "micro_batch_tokens": 120}
    return method(**{**own, **settings})


def trained(folder: Path, name: str, adapter: str, **options: Any) -> tuple[Any, list[float]]:
    """Train for three steps, unless told otherwise, and return module and gradient norms."""
    norms = Norms()
    settings = {"precision": "64-true", "callbacks": [*stages(), norms], **options}
    return fit(folder, module=made(name, adapter), **settings), norms.values


def weights(module: Any) -> dict[str, torch.Tensor]:
    """Return what is trained, whole."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in module.named_parameters()
        if value.requires_grad
    }


def off_base(module: Any) -> float:
    """Return how far the reference model is from the model below the adapters."""
    base = load_model("", SOURCE, dtype=torch.double)
    assert share_prompts(base)
    with torch.no_grad():
        expected = token_logprobs(base, ROWS).flat
        return float((token_logprobs(module.reference_model, ROWS).flat - expected).abs().max())


def resumed(folder: Path, adapter: str) -> dict[str, torch.Tensor]:
    """Return the weights of a run that is saved behind its second step and goes on from there."""
    first, _ = trained(folder, "grao", adapter, max_steps=2, **SHARDED)
    first.trainer.save_checkpoint(folder / "two.ckpt")
    path = str(folder / "two.ckpt")
    module, _ = trained(folder, "grao", adapter, ckpt_path=path, **SHARDED)
    return weights(module)


def main(folder: Path, adapter: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in RUNS:
        module, norms = trained(folder, name, adapter, **SHARDED)
        whole = weights(module)
        found[name] = {"norms": norms}
        if name == "grao":
            found[name]["off base"] = off_base(module)
            parts = [p for p in module.parameters() if p.requires_grad]
            held = sum(p.to_local().numel() for p in parts) / sum(p.numel() for p in parts)
            found[name]["share"] = held
            again = resumed(folder, adapter)
            found["resume"] = max(float((again[n] - whole[n]).abs().max()) for n in whole)
        if dist.get_rank() == 0:
            torch.save(whole, folder / f"{name}.pt")
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
