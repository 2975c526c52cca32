"""The checkpoint a run goes on from loses neither a step nor a validation."""

import pytest
import torch
from lightning.pytorch import Callback

from grao_lightning import GRAOModule
from grao_lightning.callbacks.checkpoint import LastCheckpoint
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
