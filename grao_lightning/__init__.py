"""GRAO Lightning: Group Relative Alignment Optimization (arXiv 2508.07750) on PyTorch Lightning.

Importing this package is cheap: each public name is imported when it is first used, so that
``grao --help`` answers without waiting for torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "GRAOModule": "grao_lightning.modules.grao",
    "GRPOModule": "grao_lightning.modules.grpo",
    "PPOModule": "grao_lightning.modules.ppo",
    "DPOModule": "grao_lightning.modules.dpo",
    "SFTModule": "grao_lightning.modules.sft",
    "RewardModule": "grao_lightning.modules.reward",
    "PromptDataModule": "grao_lightning.data.datamodule",
    "RewardModel": "grao_lightning.rewards.model",
    "GroupSampling": "grao_lightning.callbacks.sampling",
    "GroupScoring": "grao_lightning.callbacks.scoring",
    "ReferenceAwareClipping": "grao_lightning.callbacks.clipping",
    "group_advantages": "grao_lightning.objectives.advantages",
    "grao_objective": "grao_lightning.objectives.grao",
    "bradley_terry_loss": "grao_lightning.objectives.bradley_terry",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
