"""What ``grao init`` writes runs as it is; the README's first hour, typed as it stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from grao_lightning.command.init import init_command
from grao_lightning.faults import UserError

FILES = ["my.yaml", "my_data.jsonl", "my_held_out.jsonl", "my_rewards.py"]


def block(readme: str, name: str) -> str:
    """Return the code block that follows a mark in the README."""
    mark = f"<!-- own data and reward: {name} -->\n"
    assert readme.count(mark) == 1
    return re.search(r"```\w+\n(.*?)```", readme.partition(mark)[2], re.DOTALL)[1]


@pytest.fixture
def typed(tmp_path, repository, monkeypatch):
    """Return a function that runs a line in a shell in an empty folder and returns its output."""
    script = Path(sys.executable).with_name("grao")
    if not script.exists():
        pytest.skip("the package is not installed here")
    environment = {
        **os.environ,
        "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(repository),
    }
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> str:
        done = subprocess.run(
            line, shell=True, capture_output=True, text=True, timeout=240, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


def test_the_first_hour_of_the_readme_leads_to_a_model_that_answers(typed, repository):
    readme = (repository / "README.md").read_text()
    init, fit, export = block(readme, "commands").splitlines()
    assert (init.split()[1], fit.split()[1], export.split()[1]) == ("init", "fit", "export")
    typed(init)
    assert sorted(path.name for path in Path().iterdir()) == FILES
    config = Path("my.yaml").read_text()
    assert config.startswith(f"# {fit}\n# Needs nothing but this package; ")
    row = block(readme, "a row")
    with Path("my_data.jsonl").open("a") as data:
        data.write(row)
    Path("my_rewards.py").write_text(block(readme, "a reward"))

    text = typed(f"{fit} --trainer.max_steps 3")  # and none of the config's own validations
    assert "RAS %" in text
    folder = Path("runs/version_0")
    assert (folder / "checkpoints/best.ckpt").is_file()
    assert "function: my_rewards.kindness" in (folder / "config.yaml").read_text()
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in Path("my_held_out.jsonl").read_text().splitlines()]
    assert len(answers) == len(held_out) == 12

    typed(export)
    Path("generate.py").write_text(block(readme, "generate"))
    assert re.search(r"[a-z]{2}", typed("python generate.py"))


def test_files_that_are_there_stay_and_nothing_is_written_beside_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text("mine")
    with pytest.raises(UserError, match=r"my_rewards.py is there already and stays: remove it"):
        init_command([])
    assert [path.name for path in Path().iterdir()] == ["my_rewards.py"]
    assert Path("my_rewards.py").read_text() == "mine"
    with pytest.raises(UserError, match=r"cannot write to my_rewards\.py/x: Not a dir"):
        init_command(["my_rewards.py/x"])


def test_a_project_in_a_folder_of_its_own_is_for_the_policy_that_was_named(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    init_command(["mine/first"])
    assert sorted(path.name for path in Path("mine/first").iterdir()) == FILES
    assert "cd mine/first && grao fit --config my.yaml" in capsys.readouterr().out
    config = yaml.safe_load(Path("mine/first/my.yaml").read_text())
    assert config["model"]["init_args"]["policy"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    init_command(["other", "--policy", "./a folder: with # signs"])
    config = yaml.safe_load(Path("other/my.yaml").read_text())
    assert config["model"]["init_args"]["policy"] == "./a folder: with # signs"


def test_the_reward_that_is_written_favours_kind_words_and_not_length():
    from grao_lightning.command.init import _REWARD

    module: dict = {}
    exec(_REWARD, module)
    kind, plain, long = "Thank you, enjoy it!", "Cut it.", "thank you, enjoy " + "it " * 60
    scores = module["kindness"]([kind, plain, long], prompts=["?"] * 3, topic=["a"] * 3)
    assert scores[0] == 1 and scores[1] == 0 and scores[2] < 0
