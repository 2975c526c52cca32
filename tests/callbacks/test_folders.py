"""Hugging Face folders beside checkpoints: of their step, whole, and never at the run's expense."""

import threading

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM, AutoTokenizer

from grao_lightning import GRAOModule, RewardModule, SFTModule
from grao_lightning.callbacks import folders
from grao_lightning.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from grao_lightning.callbacks.exporting import Exported
from grao_lightning.callbacks.last_step import ValidateLastStep
from grao_lightning.command.export import export
from grao_lightning.faults import UserError
from grao_lightning.language_model.checkpoints import checkpoint_fault
from grao_lightning.language_model.lora import LoRA
from tests.runs import fit, largest_difference, stages, weights


class Weights(Callback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.of_step: dict[int, dict] = {}

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.of_step[trainer.global_step] = weights(pl_module)


def train(folder, *callbacks, module=None, **options):
    """Train four steps, validated every two; return the module."""
    return fit(
        folder,
        module=module or GRAOModule(policy="embedded:keywords-weak", learning_rate=1e-3),
        data={"prompts_per_step": 2, "validation_prompts": 2},
        callbacks=[*stages(), *callbacks],
        enable_checkpointing=True,
        **{"max_steps": 4, "limit_val_batches": 1.0, "val_check_interval": 2, **options},
    )


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(folder) -> dict[str, torch.Tensor]:
    """Return the weights that plain Hugging Face code finds in a folder, with its tokenizer."""
    assert AutoTokenizer.from_pretrained(folder).chat_template
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SFTModule, {}),
        (RewardModule, {}),
        (SFTModule, {"lora": LoRA(rank=2), "learning_rate": 1e-2}),
    ],
    ids=["policy", "reward model", "adapter"],
)
def test_the_folder_beside_the_best_checkpoint_is_what_export_makes_of_it(tmp_path, kind, settings):
    best = BestCheckpoint(dirpath=tmp_path, export=True)
    train(tmp_path, ValidateLastStep(), best, module=kind(**settings))
    export(str(tmp_path / "best.ckpt"), str(tmp_path / "exported"))
    assert content(tmp_path / "best") == content(tmp_path / "exported")
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "best", "exported"}


def test_folders_hold_the_weights_of_their_step_though_training_goes_on(tmp_path, monkeypatch):
    """Step 1's is written when step 2 has been taken; the run is that without folders."""
    at_step_two = threading.Event()
    save = Exported.save

    def late(self, folder) -> None:
        assert at_step_two.wait(30)
        save(self, folder)

    class Release(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            if trainer.global_step == 2:
                at_step_two.set()

    monkeypatch.setattr(Exported, "save", late)
    kept, last = Weights(), LastCheckpoint(tmp_path, export_every=3, filename="last")
    monkeypatch.setattr(last, "export_every", 1)
    module = train(tmp_path, kept, Release(), last)
    assert largest_difference(weights(module), weights(train(tmp_path / "plain"))) == 0.0
    for step in (1, 2, 3, 4):
        found = read(tmp_path / f"step_{step}")
        assert largest_difference(found, kept.of_step[step]) == 0.0
    assert largest_difference(kept.of_step[1], kept.of_step[2]) > 0


def test_steps_are_exported_at_their_interval_and_at_the_end(tmp_path):
    train(tmp_path, LastCheckpoint(tmp_path, export_every=3, filename="last"))
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_3", "step_4"}


def test_a_folder_that_cannot_be_written_is_told_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    def full(self, folder) -> None:
        (folder / "config.json").write_text("{")
        raise OSError("No space left on device")

    train(tmp_path, LastCheckpoint(tmp_path, export_every=4, filename="last"))
    before = content(tmp_path / "step_4")
    monkeypatch.setattr(Exported, "save", full)
    train(tmp_path, LastCheckpoint(tmp_path, export_every=2, filename="last"))
    assert caplog.text.count("was not written (No space left on device): the run goes on") == 2
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_4"}
    assert content(tmp_path / "step_4") == before


def test_a_folder_of_the_users_own_stays(tmp_path, caplog):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "mine").write_text("kept")
    train(tmp_path, ValidateLastStep(), BestCheckpoint(dirpath=tmp_path, export=True))
    assert "what lies there is no such folder, and stays" in caplog.text
    assert content(tmp_path / "best") == {"mine": b"kept"}


def test_the_folder_of_a_checkpoint_that_goes_goes_too(tmp_path):
    best = BestCheckpoint(dirpath=tmp_path, filename="best-{step}", export=True, monitor="step")
    train(tmp_path, ValidateLastStep(), best)
    assert {path.name for path in tmp_path.iterdir()} == {"best-step=4.ckpt", "best-step=4"}


def test_no_run_goes_on_from_weights_alone_and_they_export(tmp_path):
    best = BestCheckpoint(dirpath=tmp_path, save_weights_only=True)
    train(tmp_path, ValidateLastStep(), best)
    path = str(tmp_path / "best.ckpt")
    assert "optimizer_states" not in torch.load(path, weights_only=True)
    with pytest.raises(UserError, match=r"best\.ckpt holds no optimiser states .*give last\.ckpt"):
        train(tmp_path, ckpt_path=path, max_steps=6)
    assert checkpoint_fault("ckpt_path", path) is None
    assert "holds no optimiser states" in checkpoint_fault("ckpt_path", path, goes_on=True)
    export(path, str(tmp_path / "out"))
    read(tmp_path / "out")


def test_settings_of_the_last_checkpoint_that_leave_nothing_to_go_on_from_are_refused(tmp_path):
    last = LastCheckpoint(tmp_path, save_weights_only=True, export_every=0)
    with pytest.raises(UserError) as caught:
        train(tmp_path, last)
    assert "last_checkpoint.save_weights_only must be false" in str(caught.value)
    assert "last_checkpoint.export_every must be >= 1" in str(caught.value)


def test_a_folder_that_is_being_written_is_waited_for_at_the_end(tmp_path, monkeypatch):
    save = Exported.save

    def slow(self, folder) -> None:
        threading.Event().wait(0.3)
        save(self, folder)

    monkeypatch.setattr(Exported, "save", slow)
    train(tmp_path, LastCheckpoint(tmp_path, export_every=4, filename="last"))
    assert (tmp_path / "step_4").is_dir() and folders._writing.done()
