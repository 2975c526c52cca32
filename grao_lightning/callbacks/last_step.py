"""The last step of a run is validated like the others."""

from typing import Any

from lightning.pytorch import Callback, Trainer


class ValidateLastStep(Callback):
    """Asks for a validation after ``max_steps``, on which ``val_check_interval`` need not fall.

    It is part of the training, so that ``best.ckpt``, curves and summary take it in.
    """

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop the run where it ends anyway: Lightning validates before it stops."""
        if 0 <= trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True
