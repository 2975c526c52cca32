"""GRAO Lightning: Group Relative Alignment Optimization (arXiv 2508.07750) on PyTorch Lightning.

Importing this package is cheap: each public name is imported when it is first used, so that
``grao --help`` answers without waiting for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from grao_lightning.modules import MODULES

__version__ = "0.1.0"

_PUBLIC = {
    **MODULES,
    "PromptDataModule": "grao_lightning.data.datamodule",
    "RewardModel": "grao_lightning.rewards.model",
    "RewardSpec": "grao_lightning.rewards.protocol",
    "GroupSampling": "grao_lightning.callbacks.sampling",
    "GroupScoring": "grao_lightning.callbacks.scoring",
    "ReferenceAwareClipping": "grao_lightning.callbacks.clipping",
    "ShardedStrategy": "grao_lightning.strategies.sharded",
    "LoRA": "grao_lightning.language_model.lora",
    "make_trainer": "grao_lightning.command.trainer",
    "export": "grao_lightning.command.export",
    "group_advantages": "grao_lightning.objectives.advantages",
    "grao_objective": "grao_lightning.objectives.grao",
    "bradley_terry_loss": "grao_lightning.objectives.bradley_terry",
}
__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:  # what editors and type checkers read; a test holds it to `_PUBLIC`
    from grao_lightning.callbacks.clipping import ReferenceAwareClipping as ReferenceAwareClipping
    from grao_lightning.callbacks.sampling import GroupSampling as GroupSampling
    from grao_lightning.callbacks.scoring import GroupScoring as GroupScoring
    from grao_lightning.command.export import export as export
    from grao_lightning.command.trainer import make_trainer as make_trainer
    from grao_lightning.data.datamodule import PromptDataModule as PromptDataModule
    from grao_lightning.language_model.lora import LoRA as LoRA
    from grao_lightning.modules.dpo import DPOModule as DPOModule
    from grao_lightning.modules.grao import GRAOModule as GRAOModule
    from grao_lightning.modules.grpo import GRPOModule as GRPOModule
    from grao_lightning.modules.ppo import PPOModule as PPOModule
    from grao_lightning.modules.reward import RewardModule as RewardModule
    from grao_lightning.modules.sft import SFTModule as SFTModule
    from grao_lightning.objectives.advantages import group_advantages as group_advantages
    from grao_lightning.objectives.bradley_terry import bradley_terry_loss as bradley_terry_loss
    from grao_lightning.objectives.grao import grao_objective as grao_objective
    from grao_lightning.rewards.model import RewardModel as RewardModel
    from grao_lightning.rewards.protocol import RewardSpec as RewardSpec
    from grao_lightning.strategies.sharded import ShardedStrategy as ShardedStrategy


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
