"""The Trainer of Python is that of the command line, and a plain one is told what it lacks."""

import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from grao_lightning import (
    GRAOModule,
    GroupSampling,
    GroupScoring,
    PromptDataModule,
    ReferenceAwareClipping,
    make_trainer,
)
from grao_lightning.callbacks.checkpoint import LastCheckpoint, StopBetweenSteps
from grao_lightning.callbacks.console import StepProgressBar
from grao_lightning.command.fit import run
from grao_lightning.embedded.base import make_base
from grao_lightning.faults import UserError
from grao_lightning.modules.checks import run_faults
from tests.runs import SCORE, largest_difference, stages


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Mine(Callback):
    """A user's own."""


def parts(**options):
    sampling = GroupSampling(group_size=2, max_new_tokens=12)
    return make_trainer(
        [GroupScoring([SCORE], tie_tolerance=0.02), Mine(), sampling],
        **{"max_steps": 3, "accelerator": "cpu", **options},
    )


def test_a_run_leaves_what_the_command_line_leaves_its_last_step_validated(capsys):
    trainer = parts(val_check_interval=2)
    module = GRAOModule(policy="embedded:keywords-weak", learning_rate=1e-2)
    trainer.fit(module, datamodule=PromptDataModule(validation_prompts=8))
    assert "RAS %" in capsys.readouterr().out.partition("written: runs/version_0")[0]
    folder = Path("runs/version_0")
    assert trainer.log_dir == str(folder)
    names = {path.name for path in folder.rglob("*")}
    assert {"summary.json", "answers.jsonl", "best.ckpt", "last.ckpt"} <= names
    assert any(name.startswith("events.") for name in names)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validated_step"] == summary["steps"] == 3, "2 and 3 were validated"
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    saved = {
        name.removeprefix("policy."): value
        for name, value in state["state_dict"].items()
        if name.startswith("policy.")
    }
    assert largest_difference(saved, dict(module.policy.state_dict())) == 0.0


def test_its_callbacks_and_settings_are_those_of_the_command_line(monkeypatch, repository):
    config = str(repository / "configs/quickstart.yaml")
    more = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    monkeypatch.setattr(sys, "argv", ["grao", "fit", "--config", config, *more])
    theirs = run("fit").trainer
    ours = make_trainer(max_steps=1, accelerator="cpu", val_check_interval=50)

    def kinds(trainer) -> list[type]:  # what writes the config and hears signals is the command's
        own = ("SaveConfigCallback", StopBetweenSteps.__name__)
        return [type(part) for part in trainer.callbacks if type(part).__name__ not in own]

    assert kinds(ours) == kinds(theirs)
    for name in ("max_epochs", "val_check_interval", "log_every_n_steps", "num_sanity_val_steps"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert type(ours.logger) is type(theirs.logger)
    for one, other in zip(ours.checkpoint_callbacks, theirs.checkpoint_callbacks, strict=True):
        assert one.state_key == other.state_key and one.filename == other.filename


def test_stages_come_in_their_order_and_what_is_given_takes_the_place_of_a_default():
    best = ModelCheckpoint(monitor="val/reward", mode="max", filename="best")
    bar, clipping = StepProgressBar(), ReferenceAwareClipping(max_norm=0.5)
    scoring = GroupScoring([SCORE])
    trainer = make_trainer([bar, clipping, best, Mine(), scoring], max_steps=1)
    found = [type(part).__name__ for part in trainer.callbacks]
    assert found[:4] == ["Mine", "GroupSampling", "GroupScoring", "ReferenceAwareClipping"]
    assert len(set(found)) == len(found)
    assert {bar, clipping, best, scoring} <= set(trainer.callbacks)
    assert trainer.checkpoint_callbacks[0] is best
    assert isinstance(trainer.checkpoint_callbacks[1], LastCheckpoint)


def test_what_is_switched_off_is_left_out():
    off = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False}
    trainer = make_trainer(max_steps=1, **off)
    assert not trainer.checkpoint_callbacks and trainer.progress_bar_callback is None
    assert trainer.logger is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "must hold one GroupSampling; got 0.* grao_lightning.make_trainer"),
        ({"callbacks": stages()[::-1]}, "must come in the order.* grao_lightning.make_trainer"),
        ({"max_steps": -1}, "trainer.max_steps must be set.*: set it"),
        ({"val_check_interval": 1.0}, "nothing is validated: .* grao_lightning.make_trainer"),
        ({"devices": 2, "strategy": "ddp"}, "use_distributed_sampler must be False"),
    ],
)
def test_a_plain_trainer_is_told_what_it_lacks_and_the_fix(options, message):
    plain = Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": 2,
            "val_check_interval": 2,
            "logger": False,
            **options,
        }
    )
    faults = run_faults(plain, GRAOModule(), None, "fit")
    assert any(re.search(message, fault) for fault in faults), faults


def test_faults_are_told_before_the_data_is_read():
    with pytest.raises(ValueError) as caught:
        Trainer(accelerator="cpu", logger=False).fit(
            GRAOModule(policy="./none"), datamodule=PromptDataModule(train="none.jsonl")
        )
    text = str(caught.value)
    for part in ("faults in the configuration", "./none", "none.jsonl", "GroupScoring"):
        assert part in text


def test_numbers_given_as_text_are_told_together():
    module = GRAOModule(policy="embedded:keywords-random", learning_rate="1e-5")
    trainer = make_trainer([GroupScoring([SCORE]), GroupSampling(group_size="8")], max_steps=1)
    with pytest.raises(UserError) as caught:
        trainer.fit(module, datamodule=PromptDataModule(wrong_reference_share="0.1"))
    for part in ("learning_rate must be a number; got '1e-5'", "size must be a number; got '8'"):
        assert part in str(caught.value)
    assert "wrong_reference_share must be a number; got '0.1'" in str(caught.value)


def test_batches_of_a_plain_loader_are_refused():
    rows = [{"prompt": "apple river", "completion": "apple"}]
    module = GRAOModule(policy="embedded:keywords-random")
    with pytest.raises(UserError, match=r"batches must be .*; got dict: pass datamodule=Prompt"):
        parts().fit(module, torch.utils.data.DataLoader(rows))


def test_a_program_without_logging_of_its_own_is_told_how_prompts_are_read(monkeypatch, capsys):
    ours = logging.getLogger("grao_lightning")
    for logger in (logging.getLogger(), ours):
        monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(ours, "propagate", True)
    monkeypatch.setattr(ours, "level", logging.NOTSET)
    for number in (1, 2):
        parts()
        PromptDataModule(tokenizer="embedded:keywords").setup("fit")
        assert capsys.readouterr().err.count("The first one:") == 1, f"with {number} Trainers"


def test_a_program_with_logging_of_its_own_is_left_its_settings(monkeypatch):
    ours, own = logging.getLogger("grao_lightning"), logging.NullHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [own])
    parts()
    assert not ours.handlers and ours.propagate and ours.level == logging.NOTSET


def test_the_readmes_script_gives_a_model_that_answers(repository, capsys):
    """As it stands: a tiny model lies where its name leads, and the user's files beside."""
    readme = (repository / "README.md").read_text()
    (script,) = re.findall(r"## In Python\n.*?```python\n(.*?)```", readme, flags=re.DOTALL)
    lines = [line for line in script.splitlines() if line.strip()]
    assert len(lines) <= 20
    (policy,) = re.findall(r'policy="([^"]+)"', script)
    for part in make_base(num_steps=20):
        part.save_pretrained(policy)
    rows = "".join(f'{{"prompt": "{word} river", "completion": "{word}"}}\n' for word in WORDS)
    for name in re.findall(r'"(\w+\.jsonl)"', script):
        Path(name).write_text(rows)
    exec(compile(script, "README.md", "exec"), {"__name__": "__main__"})
    answer = capsys.readouterr().out.splitlines()[-1]
    assert set(answer.split()) & {"apple", "river", *WORDS}, "words of its vocabulary"
    assert Path("my-model/model.safetensors").exists()


WORDS = ("apple", "bridge", "kettle", "yarn")
