"""The best checkpoint is always there; the one a run goes on from loses no step or validation."""

import math

import pytest
import torch
from lightning.pytorch import Callback

from grao_lightning import GRAOModule, RewardModule
from grao_lightning.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from grao_lightning.callbacks.last_step import ValidateLastStep
from grao_lightning.callbacks.storage import WholeFiles
from tests.runs import fit, largest_difference, stages, weights


class Validations(Callback):
    """Keeps the step of every validation that came to its end."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        self.steps.append(trainer.global_step)


class Killed(Exception):
    pass


class KillAfterSaving(Callback):
    """Ends the run at the first moment after the checkpoint was written."""

    def __init__(self, path) -> None:
        self.path = path

    def on_validation_start(self, *_) -> None:
        if self.path.exists():
            raise Killed

    def on_train_batch_start(self, *_) -> None:
        if self.path.exists():
            raise Killed


@pytest.mark.parametrize("every", [2, 3], ids=["on a validation", "between validations"])
def test_a_run_that_goes_on_has_every_validation_once(tmp_path, every):
    options = {"limit_val_batches": 1.0, "val_check_interval": 2, "max_steps": 6}
    data = {"validation_prompts": 4}

    def run(*callbacks, **more):
        validations = Validations()
        module = GRAOModule(policy="embedded:keywords-weak", learning_rate=1e-3)
        fit(
            tmp_path,
            module=module,
            data=data,
            callbacks=[*stages(), validations, *callbacks],
            **options,
            **more,
        )
        return module, validations.steps

    whole, steps = run()
    assert steps == [2, 4, 6]
    saver = LastCheckpoint(
        tmp_path, filename="last", every_n_train_steps=every, enable_version_counter=False
    )
    path = tmp_path / "last.ckpt"
    before = Validations()
    with pytest.raises(Killed):
        fit(
            tmp_path,
            module=GRAOModule(policy="embedded:keywords-weak", learning_rate=1e-3),
            data=data,
            callbacks=[*stages(), before, KillAfterSaving(path), saver],
            enable_checkpointing=True,
            **options,
        )
    assert torch.load(path, weights_only=False)["global_step"] == every
    resumed, after = run(ckpt_path=str(path))
    assert before.steps == [2] and after == [4, 6]
    assert largest_difference(weights(whole), weights(resumed)) == 0.0


class Figure(Callback):
    """Logs a figure of its own, one value a validation."""

    def __init__(self, name: str, values: list[float]) -> None:
        self.name, self.values = name, iter(values)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        pl_module.log(self.name, next(self.values), batch_size=1)


def best_of(folder, *callbacks, module=None, best=None, **options):
    """Return the best checkpoint's callback, and the steps of its weights and of validations."""
    best = best or BestCheckpoint(dirpath=folder)
    validations = Validations()
    options = {"max_steps": 3, "limit_val_batches": 1.0, "val_check_interval": 50, **options}
    fit(
        folder,
        module=module,
        data={"prompts_per_step": 2, "validation_prompts": 2},
        callbacks=[*stages(), validations, *callbacks, ValidateLastStep(), best],
        enable_checkpointing=True,
        **options,
    )
    kept = torch.load(folder / "best.ckpt", weights_only=False)["global_step"]
    return best, kept, validations.steps


def test_the_last_step_is_validated_and_the_best_is_kept_wherever_the_interval_ends(tmp_path):
    best, kept, validated = best_of(tmp_path)
    assert best.monitor == "val/ras" and best.mode == "max"
    assert (kept, validated) == (3, [3])
    assert best_of(tmp_path, max_steps=4, val_check_interval=3)[2] == [3, 4]
    assert best_of(tmp_path, max_steps=4, val_check_interval=2)[2] == [2, 4]


@pytest.mark.parametrize(
    ("monitor", "values", "step"),
    [
        ("own/figure", [math.nan, 0.2, 0.2, 0.1], 2),  # NaN is worst, and the first of ties stays
        ("own/figure", [math.nan] * 4, 1),
        ("own/loss", [0.3, 0.1, 0.1, 0.2], 2),
        ("own/error_high", [0.1, 0.2, 0.1, 0.2], 1),
    ],
)
def test_nan_and_ties_leave_a_best_checkpoint_and_losses_are_better_low(
    tmp_path, monitor, values, step
):
    best = BestCheckpoint(dirpath=tmp_path, monitor=monitor)
    options = {"max_steps": 4, "val_check_interval": 1}
    assert best_of(tmp_path, Figure(monitor, values), best=best, **options)[1] == step


def test_a_reward_model_is_judged_by_its_accuracy_without_being_told(tmp_path):
    module = RewardModule(backbone="embedded:keywords")
    best, kept, _ = best_of(tmp_path, module=module)
    assert (best.monitor, best.mode, kept) == ("val/accuracy", "max", 3)


def test_a_run_that_logs_none_of_the_figures_keeps_the_newest_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(GRAOModule, "validation_monitor", ("val/none", "max"))
    with pytest.warns(UserWarning, match="holds the newest weights, since val/none is not logged"):
        _, kept, _ = best_of(tmp_path, max_steps=4, val_check_interval=2)
    assert kept == 4


def test_a_run_that_was_at_its_end_goes_on_like_one_that_was_not(tmp_path):
    """The validation of the last step, and the best before it, change nothing of what follows."""

    def run(name: str, max_steps: int, **more):
        folder = tmp_path / name
        last = LastCheckpoint(folder, filename="last", every_n_train_steps=2)
        module = GRAOModule(policy="embedded:keywords-weak", learning_rate=1e-3)
        best_of(folder, last, module=module, max_steps=max_steps, **more)
        return module, str(folder / "last.ckpt")

    whole, _ = run("whole", 4)
    _, saved = run("parts", 2)
    assert torch.load(saved, weights_only=False)["global_step"] == 2
    resumed, _ = run("parts", 4, ckpt_path=saved)
    assert largest_difference(weights(whole), weights(resumed)) == 0.0


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    def full(content, path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    last = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"step": 1}, last)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(torch, "save", full)
        WholeFiles().save_checkpoint({"step": 2}, last)
    assert torch.load(last, weights_only=True) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
