"""Folders of peft's, which hold an adapter and no model."""

import json
from pathlib import Path
from typing import Any

from grao_lightning.faults import extra_fault

#: Its configuration, which tells such a folder.
CONFIG = "adapter_config.json"
#: Names that classifiers give their heads, which peft trains along.
HEADS = ("score", "classifier")


def is_adapter(source: Any) -> bool:
    """Return whether a source is a folder of peft's, which holds an adapter and no model."""
    return isinstance(source, str) and (Path(source).expanduser() / CONFIG).is_file()


def adapter_fault(setting: str, source: str) -> str | None:
    """Return what is wrong with an adapter folder as far as can be told without loading it."""
    missing = extra_fault(f"{setting}={source}, an adapter folder,", ["peft"], "lora")
    if missing:
        return missing
    try:
        config = json.loads((Path(source).expanduser() / CONFIG).read_text())
    except ValueError as error:
        return f"{setting}: {source}/{CONFIG} cannot be read: {error}"
    if config.get("peft_type") != "LORA":
        return f"{setting}: {source} must hold a LoRA adapter; got {config.get('peft_type')}"
    refused = _unknown_parts(config)
    return f"{setting}: {source} must hold plain LoRA; got {refused}" if refused else None


def adapter_base(source: str) -> str | None:
    """Return the source of the model that an adapter folder belongs to, None if it tells none."""
    config = json.loads((Path(source).expanduser() / CONFIG).read_text())
    base: str | None = config.get("base_model_name_or_path")
    return base or None


def adapter_labels(source: str) -> int | None:
    """Return how many labels a classifier's adapter gives scores for, None if it holds no head."""
    from peft import load_peft_weights

    weights = load_peft_weights(str(Path(source).expanduser()), device="cpu")
    heads = [
        value.shape[0]
        for name, value in weights.items()
        if value.dim() == 2 and "lora_" not in name and set(HEADS) & set(name.split("."))
    ]
    return min(heads, default=None)  # a head may have a layer before its last one


def _unknown_parts(config: dict[str, Any]) -> str | None:
    """Return in what an adapter goes beyond matrices beside linear modules, as far as we know."""
    if config.get("bias", "none") != "none":
        return f"bias={config['bias']}, which changes the model itself"
    parts = ("trainable_token_indices", "layer_replication")
    return next((f"{part}={config[part]}" for part in parts if config.get(part)), None)


def lasting(source: str) -> str:
    """Return a source as another folder may name it: of a local one the whole path."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source
