"""Tiny random mixtures of experts that read the embedded task."""

from typing import Any

from grao_lightning.embedded.base import keyword_tokenizer
from tests.language_model.architectures import build

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_hidden_layers": 2},
    "mixtral": {},
    "deepseek_v3": {"v_head_dim": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1},
}


def mixture(family: str, **options: Any) -> dict[str, Any]:
    """Return a policy and its tokenizer, as settings of a module."""
    tokenizer = keyword_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build(
        family,
        **{"vocab_size": len(tokenizer), "bos_token_id": 1, **special},
        **{**FAMILIES[family], **options},
    )
    return {"policy": model, "tokenizer": tokenizer}
