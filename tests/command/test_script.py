"""The installed ``grao`` script in a user's own folders: own files, and real signals."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
import yaml

from grao_lightning.__main__ import main

REWARDS = """
from my_helper import WORDS

def kindness(completions):
    return [len(text.split()) / WORDS for text in completions]
"""
PARTS = """
import sys

from lightning.pytorch import Callback
from grao_lightning import GRAOModule

class MyGRAO(GRAOModule):
    pass

class Watcher(Callback):
    def on_train_start(self, trainer, pl_module):
        rank = trainer.global_rank  # one write a line, as ranks write into one file
        sys.stdout.write(f"watched {type(pl_module).__name__} on rank {rank}\\n")
"""
CONFIG = {
    "model": {"class_path": "my_parts.MyGRAO", "init_args": {"policy": "embedded:keywords"}},
    "data": {"train": "embedded:keywords", "prompts_per_step": 2, "validation_prompts": 2},
    "sampling": {"group_size": 2, "max_new_tokens": 4},
    "scoring": {
        "rewards": [{"function": "my_rewards.kindness"}],
        "judges": [{"function": "my_rewards.py:kindness", "name": "judge"}],
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 2000,
        "val_check_interval": 2000,
        "callbacks": [{"class_path": "my_parts.Watcher"}],
    },
}
STEP = re.compile(r"^step +([1-9][0-9]*)/", re.MULTILINE)


@pytest.fixture
def folder(tmp_path):
    """A folder with own modules, two that are named like libraries, and a config elsewhere.

    The reward lies beside the config, what it imports and the other modules in the folder itself.
    """
    here, beside = tmp_path / "here", tmp_path / "my configs"
    here.mkdir()
    beside.mkdir()
    (beside / "my_rewards.py").write_text(REWARDS)
    (here / "my_helper.py").write_text("WORDS = 10\n")
    (here / "my_parts.py").write_text(PARTS)
    for name in ("random", "datasets", "yaml"):
        (here / f"{name}.py").write_text("raise RuntimeError('no library')\n")
    (beside / "mine.yaml").write_text(yaml.safe_dump(CONFIG))
    return here


class Script:
    """``grao`` as it was installed, as a process that prints into a file."""

    def __init__(self, repository: Path, folder: Path, command: str) -> None:
        self.printed = folder / "printed.txt"
        scripts = sysconfig.get_path("scripts")
        with self.printed.open("w") as file:
            self.process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **os.environ,
                    "PATH": f"{scripts}:{os.environ['PATH']}",
                    "PYTHONPATH": str(repository),
                    "PYTHONUNBUFFERED": "1",
                },
                # Where tests run in the background, it would be ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def text(self) -> str:
        return self.printed.read_text()

    def until(self, holds) -> None:
        """Wait."""
        latest = time.monotonic() + 120
        while not holds():
            assert self.process.poll() is None and time.monotonic() < latest, self.text()[-3000:]
            time.sleep(0.02)

    def ends(self, status: int) -> str:
        """Return what was printed by a process that ended with a status and left nothing behind."""
        found = self.process.wait(timeout=120)
        text = self.text()
        assert found == status, text[-3000:]
        assert "Traceback" not in text
        latest = time.monotonic() + 5
        while self.lives() and time.monotonic() < latest:
            time.sleep(0.05)
        assert not self.lives()
        return text

    def lives(self) -> bool:
        """Return whether a process of the group is left."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture
def grao(folder, repository):
    """Return a function: command -> a `Script`; what is left of them is killed."""
    started: list[Script] = []

    def start(command: str) -> Script:
        started.append(Script(repository, folder, command))
        return started[-1]

    yield start
    for script in started:
        if script.lives():
            os.killpg(script.process.pid, signal.SIGKILL)
        script.process.wait()


def advice(text: str) -> str:
    """Return the command that goes on, the last line."""
    *_, before, command = text.rstrip().splitlines()
    assert before.startswith("grao: stopped by "), text
    return command.strip()


def test_fit_finds_own_parts_and_the_command_that_is_printed_goes_on(folder, grao):
    begun = "grao fit --config '../my configs/mine.yaml' --ckpt_path=null"
    script = grao(begun)
    script.until(lambda: STEP.search(script.text()))
    script.process.send_signal(signal.SIGINT)
    text = script.ends(130)
    assert "watched MyGRAO on rank 0" in text
    command = advice(text)
    last = "runs/version_0/checkpoints/last.ckpt"
    assert command == f"grao fit --config '../my configs/mine.yaml' --ckpt_path {last}"
    steps = torch.load(folder / last, weights_only=True)["global_step"]
    assert steps > 0
    resumed = grao(f"{command} --trainer.max_steps {steps + 1}")
    assert re.findall(STEP, resumed.ends(0)) == [str(steps + 1)]
    summary = json.loads((folder / "runs/version_1/summary.json").read_text())
    assert summary["steps"] == steps + 1


def test_two_ranks_find_own_parts_and_stop_together(folder, grao):
    ranks = "--trainer.devices 2 --trainer.strategy ddp"
    script = grao(f"grao fit --config '../my configs/mine.yaml' {ranks}")
    script.until(lambda: STEP.search(script.text()))
    script.process.send_signal(signal.SIGTERM)  # to the first rank alone
    text = script.ends(143)
    assert {f"watched MyGRAO on rank {rank}" in text for rank in (0, 1)} == {True}
    assert text.count("grao: stopped by SIGTERM") == 1
    command = shlex.split(advice(text))
    assert command[-2] == "--ckpt_path" and (folder / command[-1]).exists()


def test_compare_finds_own_parts_and_stops_with_all_its_runs(folder, grao):
    plan = {
        "output": "compared",
        "jobs": 2,
        "seeds": [0],
        "cases": {"own": {"trainer.max_steps": 2}},
        "methods": {
            "short": {"config": "../my configs/mine.yaml"},
            "long": {
                "config": "../my configs/mine.yaml",
                "settings": {
                    "trainer.max_steps": 100000,
                    "trainer.val_check_interval": 100000,
                    "last_checkpoint.every_n_train_steps": 5,
                },
            },
        },
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    script = grao("grao compare --config plan.yaml --jobs=1")
    runs = folder / "compared" / "runs"
    script.until(lambda: list(runs.glob("long*/checkpoints/last.ckpt")))
    started = time.monotonic()
    script.process.send_signal(signal.SIGINT)
    text = script.ends(130)
    assert time.monotonic() - started < 15  # 5 s at most to save, on a busy machine
    assert advice(text) == "grao compare --config plan.yaml --jobs=1"
    assert len(list(runs.glob("short*/finished.json"))) == 1
    assert not list(runs.glob("long*/finished.json"))
    (log,) = runs.glob("long*/log.txt")
    assert "grao: stopping at the end of this step" in log.read_text()
    assert (log.parent / "checkpoints/last.ckpt").exists()


def test_judge_check_finds_own_scorers_and_keeps_what_is_scored(folder, grao):
    (folder / "slow.py").write_text(
        "import time\n\ndef slow(completions):\n    print('scoring')\n    time.sleep(60)\n"
    )
    config = {
        "scorers": [{"function": name} for name in ("my_rewards.py:kindness", "slow.py:slow")],
        "pairs": 4,
        "data": {"train": "embedded:keywords"},
    }
    (folder.parent / "my configs" / "check.yaml").write_text(yaml.safe_dump(config))
    command = "grao judge-check --config '../my configs/check.yaml'"
    script = grao(command)
    script.until(lambda: "scoring" in script.text())
    script.process.send_signal(signal.SIGTERM)
    text = script.ends(143)
    assert re.search(r"\| slow +\| after 0 of 4 pairs \| interrupted", text)
    assert advice(text) == command
    scorers = json.loads((folder / "runs/judge-check/results.json").read_text())["scorers"]
    assert scorers["kindness"]["judged"] == 4


def test_validate_finds_what_the_run_found_and_stops_at_once(folder, monkeypatch, capsys):
    """From another folder, by the config that the run left."""

    def status(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["grao", *arguments])
        return main()

    monkeypatch.chdir(folder)
    steps = ("--trainer.max_steps=1", "--trainer.limit_val_batches=0")
    assert status("fit", "--config", "../my configs/mine.yaml", *steps) == 0
    monkeypatch.chdir(folder.parent)
    left = ("validate", "--config", "here/runs/version_0/config.yaml")
    more = ("--trainer.limit_val_batches=1", "--trainer.logger=false")
    assert status(*left, *more) == 0
    (folder / "my_helper.py").write_text("import os\n\nos.kill(os.getpid(), 2)\n")
    assert status(*left, *more) == 130
    assert capsys.readouterr().err.endswith("grao: stopped by SIGINT\n")


WAITING = """
import time
from grao_lightning.callbacks.stopping import asked, defer, listening

with listening():
    defer(True)
    print("begun", flush=True)
    while not asked():
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_kills_but_an_echo_of_the_first_does_not(repository, number):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "begun\n"
    for _ in range(2):  # as `timeout` sends it to the process and to its group
        process.send_signal(number)
    assert process.stdout.readline() == "asked\n"
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == -number
    assert "Traceback" not in errors and "once more stops at once" in errors


def test_a_signal_that_is_ignored_stays_ignored(repository):
    """As that of a terminal is for a command in the background."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING.replace("not asked()", "True")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.kill()
    process.communicate()
