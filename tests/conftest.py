"""Tiny models and the environment that all tests share."""

import os
from pathlib import Path
from typing import Any

# Before anything imports Hugging Face code: no test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Models this small are slower on several threads, and child processes would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)

VOCABULARY = 97
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # far from uniform, so that a wrong position or mask shows
}


def tiny_model(family: str, **options: Any) -> Any:
    """Return a random causal language model of a family with a vocabulary of 97 tokens."""
    import transformers

    if family == "Mixtral":
        options = {"num_local_experts": 4, "num_experts_per_tok": 2, **options}
    if family == "Gemma2":
        options = {"head_dim": 8, "final_logit_softcapping": 2.0, **options}
    if family in ("Gemma", "Qwen3"):
        options = {"head_dim": 8, **options}
    if family == "Granite":
        options = {"logits_scaling": 3.0, **options}
    config = getattr(transformers, f"{family}Config")(**{**_SMALL, **options})
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.fixture(scope="session", autouse=True)
def one_cache_for_all(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Make the embedded base once a session, and leave the user's own cache alone."""
    os.environ.setdefault("GRAO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def environment_of_each_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what seed_everything and a launch of several ranks leave in the environment."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def repository() -> Path:
    """Return the folder of the checkout."""
    return Path(__file__).parents[1]
