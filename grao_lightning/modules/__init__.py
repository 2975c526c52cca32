"""LightningModules: one file a method, on a shared base.

May never import a command, nor a callback: the checks of a run look at both.
"""

#: Where the modules that ship are, by the name that users give them; the first is the default.
MODULES = {
    "GRAOModule": "grao_lightning.modules.grao",
    "GRPOModule": "grao_lightning.modules.grpo",
    "PPOModule": "grao_lightning.modules.ppo",
    "DPOModule": "grao_lightning.modules.dpo",
    "SFTModule": "grao_lightning.modules.sft",
    "RewardModule": "grao_lightning.modules.reward",
}
