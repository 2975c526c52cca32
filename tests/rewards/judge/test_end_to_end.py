"""A real model behind a real server judges real pairs in a real training step.

Needs GRAO_TEST_HH (folder) and GRAO_TEST_SMOLLM2 (GGUF file), and about a minute.
"""

import asyncio
import gzip
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from grao_lightning.__main__ import main
from grao_lightning.rewards.judge import PairwiseJudge
from grao_lightning.rewards.judge.prompts import CRITERIA, TEMPLATE, render
from grao_lightning.rewards.judge.verdicts import read_verdict

pytest.importorskip("openai")
ROOT = Path(__file__).parents[3]
CONVERT = """
import sys
from grao_lightning.language_model.loading import load_model, load_tokenizer

load_model("policy", sys.argv[1]).save_pretrained(sys.argv[2])
load_tokenizer("policy", sys.argv[1]).save_pretrained(sys.argv[2])
"""
NUM_PROMPTS, GROUP_SIZE = 1, 2
SECONDS_TO_START = 300  # 20 on an idle core


@pytest.fixture(scope="module")
def gguf() -> str:
    path = os.environ.get("GRAO_TEST_SMOLLM2")
    if not path:
        pytest.skip("GRAO_TEST_SMOLLM2 (path of a GGUF file) is not set")
    return path


@pytest.fixture(scope="module")
def short_pairs(tmp_path_factory) -> Path:
    """Return a file with the HH rows of the shortest prompts, as they are."""
    folder = os.environ.get("GRAO_TEST_HH")
    if not folder:
        pytest.skip("GRAO_TEST_HH (folder with the HH files) is not set")
    with gzip.open(Path(folder) / "harmless-base.train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rows.sort(key=lambda row: len(row["chosen"]))
    path = tmp_path_factory.mktemp("hh") / "short.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    return path


@pytest.fixture(scope="module")
def server(gguf, tmp_path_factory) -> Iterator[tuple[str, str]]:
    """Serve SmolLM2 by ``transformers serve``; return address and model."""
    for module in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'transformers[serving]'")
    folder = tmp_path_factory.mktemp("server") / "smollm2"  # the server reads no local GGUF file
    # In a process of its own, which gives the memory back.
    subprocess.run([sys.executable, "-c", CONVERT, gguf, folder], check=True, cwd=ROOT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "log"
    command = [Path(sys.executable).with_name("transformers"), "serve", folder]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not is_up(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.kill()
        process.wait()


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def said(base_url: str, model: str, question: str) -> str:
    """Return what the server says to a question, asked without any of our code."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0.0,
        "max_tokens": 24,
        "stop": ["\n"],
    }
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def test_a_training_step_is_rewarded_by_what_a_real_server_says(
    server, short_pairs, tmp_path, monkeypatch, repository, capfd
):
    base_url, model = server
    calls = []
    original = PairwiseJudge.__call__

    async def recorded(self, prompts, completions, reference_answers):
        verdicts = await original(self, prompts, completions, reference_answers)
        calls.append((list(zip(prompts, completions, reference_answers, strict=True)), verdicts))
        return verdicts

    monkeypatch.setattr(PairwiseJudge, "__call__", recorded)
    monkeypatch.chdir(tmp_path)
    judge = {
        "function": "grao_lightning.rewards.judge.PairwiseJudge",
        "arguments": {
            "criterion": "harmlessness",
            "base_url": base_url,
            "model": model,
            "api_key_variable": None,
            "max_tokens": 24,
            "extra_body": {"stop": ["\n"]},
            "concurrency": 2,
            "timeout": 120,
            "cache": str(tmp_path / "judge.sqlite"),
        },
    }
    changes = {
        "model.init_args.policy": model,
        "data.train": short_pairs,
        "data.validation": short_pairs,
        "data.data_dir": "null",
        "data.prompts_per_step": NUM_PROMPTS,
        "data.validation_prompts": 1,
        "sampling.group_size": GROUP_SIZE,
        "sampling.max_new_tokens": 8,
        "scoring.rewards": json.dumps([judge]),
        "trainer.precision": "bf16-true",
        "trainer.max_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.num_sanity_val_steps": 0,
    }
    config = repository / "configs/judge_hh.yaml"
    arguments = [f"--{name}={value}" for name, value in changes.items()]
    monkeypatch.setattr(sys, "argv", ["grao", "fit", "--config", str(config), *arguments])
    assert main() == 0, capfd.readouterr().err
    for checkpoint in tmp_path.rglob("*.ckpt"):
        checkpoint.unlink()  # pytest would keep it, 270 MB, for three sessions

    assert len(calls) == 1
    pairs, verdicts = calls[0]
    assert len(pairs) == NUM_PROMPTS * GROUP_SIZE
    assert any(verdict is not None for verdict in verdicts)
    hh = [json.loads(line)["chosen"] for line in short_pairs.read_text().splitlines()]
    for (prompt, completion, answer), verdict in zip(pairs[:1], verdicts, strict=False):
        assert any(dialogue.endswith(answer) for dialogue in hh)
        first, second = (
            read_verdict(
                said(
                    base_url,
                    model,
                    render(TEMPLATE, CRITERIA["harmlessness"], prompt, *texts),
                )
            )
            for texts in ((completion, answer), (answer, completion))
        )
        known = first is not None and second is not None
        assert verdict == ((first if first == -second else 0) if known else None)

    # The same pairs again, by a judge made anew: from the file, with the server not asked.
    again = PairwiseJudge(**judge["arguments"])
    prompts, completions, answers = (list(column) for column in zip(*pairs, strict=True))
    assert asyncio.run(original(again, prompts, completions, answers)) == verdicts
    tokens, _ = again.statistics()["completion_tokens"]
    assert tokens == 0 or None in verdicts
