"""FSDP2 by hand: what sharded models compute is what whole ones do."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_model
from tests.language_model.architectures import build
from tests.strategies.launch import on_ranks, once

MODELS = {
    "untied": lambda: tiny_model("Llama", tie_word_embeddings=False),
    "tied": lambda: tiny_model("Llama", tie_word_embeddings=True),
    "qwen3_moe": lambda: build("qwen3_moe"),
    "deepseek_v3": lambda: build("deepseek_v3", v_head_dim=4),
}
#: 200 MB, of which no layer is much.
LARGE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 16,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
}
CASES = [
    *[f"{name}{how}" for name in MODELS for how in ("", ", checkpointing")],
    "untied, padded",
    "untied, one by one",
    "untied, two copies",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what two ranks found of every model; starting them takes longer than the rest."""

    def find(folder: Path) -> Any:
        models = {**MODELS, "large": lambda: tiny_model("Llama", **LARGE)}
        for name, make in models.items():
            make().save_pretrained(folder / name)
        return on_ranks("sharded_models.py", folder, *[str(folder / name) for name in models])

    return once(tmp_path_factory, "sharded_models", find)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process_before_and_after_sampling(found, case):
    """Ranks have other numbers of rows, and so of passes."""
    assert found[case]["gradients, first"] < 1e-6
    assert found[case]["gradients, after sampling"] < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_log_probabilities_are_those_of_a_whole_model(found, case):
    assert found[case]["other tokens"] == 0
    assert found[case]["log-probabilities"] < 1e-6


@pytest.mark.parametrize("case", [case for case in CASES if "copies" not in case])
def test_a_rank_holds_its_share_of_the_weights(found, case):
    assert found[case]["share"] < 0.5 + 0.02


def test_no_rank_loads_more_than_its_share(found):
    """Over all ranks at most 1.5 times the file; each whole model would be once the file."""
    assert sum(rank["loading"] for rank in found["large"]) < 1.5
