"""Three steps of every method on several ranks, with ddp and with fsdp2.

Arguments: the folder for what is found, then names of cases.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

import grao_lightning
from grao_lightning import PromptDataModule, ShardedStrategy
from grao_lightning.modules import base, reward
from tests.runs import fit, stages, trainer

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "GRAO": ("GRAOModule", {}),
    "GRPO": ("GRPOModule", {"updates_per_rollout": 2, "kl_weight": 0.05}),
    "GRPO by sequence": ("GRPOModule", {"updates_per_rollout": 2, "ratio": "sequence"}),
    "PPO": ("PPOModule", {"updates_per_rollout": 2, "kl_weight": 0.05, "kl_target": 0.5}),
    "DPO": ("DPOModule", {}),
    "SFT": ("SFTModule", {}),
    "Reward": ("RewardModule", {"centring": 0.01}),
    "Reward, encoder": ("RewardModule", {"backbone": "encoder"}),
    "SFT, balanced experts": ("SFTModule", {"policy": "mixture", "router_loss": 1.0}),
    "GRAO, padded": ("GRAOModule", {"share_prompts": False}),
    "GRAO, another reference model": ("GRAOModule", {"reference_model": "embedded:keywords"}),
}
#: Of the trainer.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16-true": ("GRAO", {"precision": "bf16-true"}),
    "bf16-mixed": ("GRAO", {"precision": "bf16-mixed"}),
    "64-true": ("GRAO", {"precision": "64-true"}),
    "Reward, 64-true": ("Reward", {"precision": "64-true"}),
}
#: One prompt a rank, so that a rank may have only ties; uneven shards of the validation.
DATA: dict[str, Any] = {"prompts_per_step": 2, "validation_prompts": 9, "validation_batch_size": 4}

SCORING = {"tie_tolerance": 0.35}


class Watch(Callback):
    """Keeps each step's figures, and looks at what the optimiser holds after a validation too."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.signals: list[bool] = []
        self.passes: list[int] = []
        self.tokens: list[list[int]] = []
        self.share = 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.norms.append(pl_module.step_values["grad_norm"])
        if batch.advantages is not None:
            self.signals.append(bool(batch.advantages.any()))
            self.tokens += batch.completions.ids
        if isinstance(trainer.strategy, ShardedStrategy):
            self._look_at(trainer, pl_module)

    def _look_at(self, trainer, pl_module) -> None:
        optimizer = trainer.optimizers[0]
        kept = list(pl_module.parameters())
        assert {p for group in optimizer.param_groups for p in group["params"]} == set(kept)
        states = [state for state in optimizer.state.values() for state in state.values()]
        parts = [*kept, *[state for state in states if state.dim()]]
        assert len(parts) == 3 * len(kept), "every parameter has moved"
        assert all(isinstance(part, DTensor) for part in parts), "parts alone are trained"
        own, whole = sum(p.to_local().numel() for p in parts), sum(p.numel() for p in parts)
        self.share = own / whole


def counted(watch: Watch):
    """Note the number of a rank's own passes of each step."""
    own = base.evened_out

    def evened_out(model: Any, parts: Any) -> Any:
        watch.passes.append(len(parts))
        return own(model, parts)

    base.evened_out = reward.evened_out = evened_out
    return own


def made(folder: Path, case: str) -> Any:
    """Return the module of a method."""
    method, settings = METHODS[case]
    settings = {
        name: str(folder / value) if value in ("encoder", "mixture") else value
        for name, value in settings.items()
    }
    kind = getattr(grao_lightning, method)
    source = kind.source_setting.rpartition(".")[2]
    budget = 20 if dist.get_rank() == 0 else 200  # ranks differ in their passes
    common = {"learning_rate": 1e-3, "micro_batch_tokens": budget}
    return kind(**{source: "embedded:keywords-weak", **common, **settings})


def run(folder: Path, strategy: Any, case: str, **options: Any) -> tuple[Any, Watch]:
    case, settings = RUNS.get(case, (case, {}))
    data = dict(DATA)
    if METHODS[case][0] in ("DPOModule", "SFTModule"):  # a prompt is one pass
        data["prompts_per_step"] = 6
    if METHODS[case][1].keys() & {"backbone", "policy"}:  # their tokenizers have no template
        data["chat_template"] = "hh"
    watch = Watch()
    own = counted(watch)
    try:
        module = fit(
            folder,
            module=made(folder, case),
            data=data,
            callbacks=[*stages(scoring=SCORING), watch],
            devices=dist.get_world_size(),
            strategy=strategy,
            **{"limit_val_batches": 1.0, "val_check_interval": 2, **settings, **options},
        )
    finally:
        base.evened_out = reward.evened_out = own
    return module, watch


def whole(module: Any) -> dict[str, torch.Tensor]:
    """Return all trained weights, gathered."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().double()
        for name, p in module.named_parameters()
    }


def apart(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def compared(folder: Path, case: str) -> dict[str, Any]:
    """Return how far fsdp2 is from ddp, and what the run was like."""
    one, ours = run(folder, "ddp", case)
    other, theirs = run(folder, "fsdp2", case)
    pairs = zip(ours.norms, theirs.norms, strict=True)
    names = one.estimates.keys()
    assert names == other.estimates.keys()
    values = [(one.estimates[name].value, other.estimates[name].value) for name in names]
    return {
        "norms": [abs(b / a - 1) for a, b in pairs],
        "weights": apart(whole(one), whole(other)),
        "validation": max(abs(a - b) for a, b in values if a == a),
        "figures": len(values),
        "other_tokens": ours.tokens != theirs.tokens,
        "share": theirs.share,
        "signals": theirs.signals,
        "passes": theirs.passes,
    }


def resumed(folder: Path) -> dict[str, Any]:
    """Return how far a run that went on from its checkpoint is from one that was not stopped."""
    through, _ = run(folder, "fsdp2", "PPO", max_steps=4)
    first, _ = run(folder, "fsdp2", "PPO", max_steps=2)
    path = str(folder / "two.ckpt")
    first.trainer.save_checkpoint(path)
    second, _ = run(folder, "fsdp2", "PPO", max_steps=4, ckpt_path=path)
    left, right = (part.trainer.optimizers[0].state for part in (through, second))
    states = zip(left.values(), right.values(), strict=True)
    moments = [
        float((a[name].full_tensor() - b[name].full_tensor()).abs().max())
        for a, b in states
        for name in ("exp_avg", "exp_avg_sq")
    ]
    third = made(folder, "PPO")
    options = {"devices": dist.get_world_size(), "strategy": "fsdp2", "limit_val_batches": 1.0}
    validation = trainer(folder, callbacks=stages(scoring=SCORING), **options)
    data = PromptDataModule(**DATA)
    validation.validate(third, datamodule=data, ckpt_path=path, verbose=False)
    figures = [
        (first.estimates[name].value, third.estimates[name].value) for name in ("ras", "nag")
    ]
    return {
        "weights": apart(whole(through), whole(second)),
        "figures": max(abs(a - b) for a, b in figures),
        "moments": max(moments),
        "kl_weight": through.kl_weight - second.kl_weight,
        "steps": second.trainer.global_step,
    }


def spread(folder: Path) -> dict[str, Any]:
    """Return how far a run with two copies of the whole is from the plain one."""
    plain, _ = run(folder, "fsdp2", "GRAO")
    other, watch = run(folder, ShardedStrategy(replicas=2), "GRAO")
    return {"apart": apart(whole(plain), whole(other)), "share": watch.share}


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    told: dict[str, Any] = {}
    for case in cases:
        further = {"resumed": resumed, "spread": spread}
        found = further[case](folder) if case in further else compared(folder, case)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, found)
        told[case] = ranks
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
