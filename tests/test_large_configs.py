"""The configs for large models, on tiny random models of the same architectures and two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from grao_lightning.embedded.base import keyword_tokenizer
from tests.language_model.architectures import build
from tests.runs import SCORE

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5_7b_fsdp2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2.5_7b_lora": ("qwen2", {"tie_word_embeddings": False}),
    "moonlight_16b_a3b_lora": (
        "deepseek_v3",
        {"q_lora_rank": None, "v_head_dim": 4, "num_key_value_heads": 4, "n_group": 1,
         "first_k_dense_replace": 1},
    ),
    "smollm2_qlora": ("llama", {"tie_word_embeddings": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_trains_a_tiny_model_of_its_architecture_on_two_ranks(
    tmp_path, repository: Path, name
):
    if name == "smollm2_qlora":
        pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    family, options = CONFIGS[name]
    tokenizer = keyword_tokenizer()
    model = build(family, vocab_size=len(tokenizer), **options)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    config = yaml.safe_load((repository / "configs" / f"{name}.yaml").read_text())
    config["model"]["init_args"] |= {"policy": str(tmp_path / "model"), "warmup_steps": 0}
    config["data"] |= {"train": "embedded:keywords", "data_dir": None, "prompts_per_step": 4}
    config["data"] |= {"validation_prompts": 4, "validation_batch_size": 2}
    config["sampling"] |= {"max_new_tokens": 6, "group_size": 2}
    config["scoring"]["rewards"] = [{"function": SCORE}]
    config["trainer"] |= {"accelerator": "cpu", "devices": 2, "max_steps": 1}
    config["trainer"] |= {"val_check_interval": 1, "enable_progress_bar": False}
    config["trainer"].setdefault("strategy", "ddp")
    config["last_checkpoint"] = {"dirpath": str(tmp_path / "saved")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    result = subprocess.run(
        [sys.executable, "-m", "grao_lightning", "fit", "--config", "run.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (summary,) = tmp_path.rglob("summary.json")
    assert json.loads(summary.read_text())["steps"] == 1
    assert any((tmp_path / "saved").iterdir())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_line_of_a_config_starts_it(repository: Path, name):
    first, second, *_ = (repository / "configs" / f"{name}.yaml").read_text().splitlines()
    assert first.startswith(f"# grao fit --config configs/{name}.yaml")
    assert second.startswith("# Needs ")
