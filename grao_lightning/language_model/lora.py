"""What is asked of adapters: rank, where they sit, how many bits the weights below them take."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from typing_extensions import final

from grao_lightning.faults import Faults, NamedSettings, extra_fault

ALL_LINEAR = "all-linear"
#: Learning rates of full training: an adapter stays where it is at those.
SLOW = 1e-5

Quantize = Literal["nf4"]


@final  # or the command line's parser would have class_path and init_args for it
@dataclass
class LoRA(NamedSettings):
    """Low-rank adapters, trained in the place of a model's own weights, which stay as they are.

    Args:
        rank: Of the update of a matrix; null = 16, of an adapter folder its own.
        alpha: The update is multiplied by alpha / rank; null = twice the rank, of an adapter folder
            its own.
        dropout: Of what goes into an adapter, in training.
        target_modules: Names, or ends of names, of the linear modules that get an adapter, or a
            regular expression of whole names; "all-linear" = all but the head, and a
            mixture's experts where peft can; of an adapter folder its own.
        base: Of an adapter folder, the model it belongs to; null = the one that its
            adapter_config.json names.
        quantize: "nf4" = 4 bits for each of the frozen weights (QLoRA, arXiv 2305.14314); null =
            as the model has them.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    base: str | None = None
    quantize: Quantize | None = None

    def faults(self, setting: str) -> Faults:
        """Return what is wrong with the settings, and which package is missing.

        Args:
            setting: Name of the setting, for the messages.
        """
        faults = Faults()
        if self.rank is not None:
            faults.at_least(f"{setting}.rank", self.rank, 1)
        if self.alpha is not None and not self.alpha > 0:
            faults.add(f"{setting}.alpha must be > 0; got {self.alpha}")
        if not 0 <= self.dropout < 1:
            faults.add(f"{setting}.dropout must lie in [0, 1); got {self.dropout}")
        if not self.target_modules:
            faults.add(f"{setting}.target_modules must name a module; got none: say {ALL_LINEAR}")
        if self.quantize is not None:
            faults.one_of(f"{setting}.quantize", self.quantize, get_args(Quantize))
        packages, extra = ["peft"], "lora"
        if self.quantize:
            packages, extra = [*packages, "bitsandbytes", "accelerate"], "qlora"
        faults.add(extra_fault(setting, packages, extra))
        return faults


def as_lora(settings: Any) -> LoRA | None:
    """Return settings of adapters, which checkpoints and Python may hold as a mapping."""
    return settings if settings is None or isinstance(settings, LoRA) else LoRA(**settings)


def as_primitives(settings: LoRA | None) -> dict[str, Any] | None:
    """Return settings as checkpoints keep them."""
    return None if settings is None else asdict(settings)


def quantization(
    quantize: Quantize | None, device: torch.device, *, lowered: bool
) -> dict[str, Any]:
    """Return what makes ``from_pretrained`` keep the weights of linear modules in few bits.

    Args:
        quantize: How; None: not at all.
        device: Where the model is to be.
        lowered: Whether products are computed in bfloat16, else in float32.
    """
    if quantize is None:
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if lowered else torch.float32,
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}
