"""Signals: a run that one stops goes on as if it had not been; a second one kills."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback

from grao_lightning import GRAOModule
from grao_lightning.callbacks.checkpoint import LastCheckpoint, StopBetweenSteps
from grao_lightning.callbacks.stopping import Stopped, listening
from tests.runs import fit, largest_difference, stages, weights


class Interrupts(Callback):
    """Sends this process a signal in the middle of a step or of a validation."""

    def __init__(self, step: int, hook: str) -> None:
        self.step = step
        self.hook = hook

    def on_train_batch_start(self, trainer, *_) -> None:
        self._send(trainer, "step")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *_) -> None:
        if batch_idx == 0:
            self._send(trainer, "validation")

    def on_validation_end(self, trainer, *_) -> None:
        self._send(trainer, "validated")

    def on_train_end(self, trainer, *_) -> None:
        self._send(trainer, "end")

    def _send(self, trainer, hook: str) -> None:
        if (trainer.global_step, hook) == (self.step, self.hook):
            os.kill(os.getpid(), signal.SIGTERM)


class Figures(Callback):
    """Keeps what every validation and every step told, by step."""

    def __init__(self) -> None:
        self.validations: list[tuple[int, float, float]] = []
        self.losses: dict[int, float] = {}

    def on_validation_end(self, trainer, pl_module) -> None:
        found = trainer.callback_metrics
        figures = (found["val/reward"].item(), found["val/length"].item())
        self.validations.append((trainer.global_step, *figures))

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.losses[trainer.global_step] = pl_module.step_values["loss"]


STOPPING = {
    "between steps": (Interrupts(2, "step"), 3, [2]),
    "in a step that a validation follows": (Interrupts(1, "step"), 2, []),
    "in a validation": (Interrupts(2, "validation"), 2, []),
    "behind a validation": (Interrupts(2, "validated"), 2, [2]),
    "at the end": (Interrupts(4, "end"), 4, [2, 4]),
}


@pytest.mark.parametrize("how", STOPPING)
def test_a_run_that_a_signal_stops_goes_on_as_if_it_had_not_been(tmp_path, whole_run, how):
    interrupts, step, validated = STOPPING[how]
    whole, expected = whole_run
    saver = LastCheckpoint(tmp_path, filename="last", save_on_exception=True)
    before, after = Figures(), Figures()
    with pytest.raises(Stopped) as stopped, listening():
        run_of_four(
            tmp_path,
            [StopBetweenSteps(saver), interrupts, *stages(), before, saver],
            enable_checkpointing=True,
        )
    assert stopped.value.status == 143 and stopped.value.in_order
    assert saver.written == tmp_path / "last.ckpt"
    assert torch.load(saver.written, weights_only=False)["global_step"] == step
    assert [at for at, *_ in before.validations] == validated
    resumed = run_of_four(tmp_path, [*stages(), after], ckpt_path=str(saver.written))
    assert before.validations + after.validations == expected.validations
    assert before.losses | after.losses == expected.losses
    assert largest_difference(weights(whole), weights(resumed)) == 0.0


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, one_cache_for_all):
    """The run that is stopped, not stopped: its module and figures."""
    figures = Figures()
    module = run_of_four(tmp_path_factory.mktemp("whole"), [*stages(), figures])
    assert [at for at, *_ in figures.validations] == [2, 4]
    return module, figures


def run_of_four(folder, callbacks, **options):
    return fit(
        folder,
        module=GRAOModule(policy="embedded:keywords-weak", learning_rate=1e-3),
        data={"validation_prompts": 4, "validation_batch_size": 2},
        callbacks=callbacks,
        limit_val_batches=1.0,
        val_check_interval=2,
        max_steps=4,
        **options,
    )


def test_a_signal_before_the_first_step_leaves_no_checkpoint(tmp_path):
    saver = LastCheckpoint(tmp_path, filename="last", save_on_exception=True)
    with pytest.raises(Stopped) as stopped, listening():
        run_of_four(tmp_path, [*stages(), SignalInSetup(), saver], enable_checkpointing=True)
    assert not stopped.value.in_order
    assert saver.written is None and not list(tmp_path.glob("**/*.ckpt"))


class SignalInSetup(Callback):
    """A signal while the models load."""

    def setup(self, *_, stage) -> None:
        os.kill(os.getpid(), signal.SIGINT)
