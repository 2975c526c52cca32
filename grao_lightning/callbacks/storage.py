"""How checkpoints are written and read where every rank holds the whole model."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Trainer

from grao_lightning.files import put_back, put_in_place, remove, to_disk, unfinished_beside
from grao_lightning.language_model.checkpoints import is_sharded, read_checkpoint


class WholeFiles(TorchCheckpointIO):
    """Writes files that are whole or not there; reads folders of shards too.

    Lightning writes to memory first, then to the folder for temporary files, and moves that: a
    process that is killed meanwhile may leave half a checkpoint in the place of the last one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint beside its place, and move it there once it is on the disk."""
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = unfinished_beside(place)
        try:
            torch.save(checkpoint, unfinished)
            to_disk(unfinished)
        except BaseException:
            remove(unfinished)
            raise
        put_in_place(unfinished, place)

    def load_checkpoint(self, path: Any, *options: Any, **named: Any) -> dict[str, Any]:
        """Return what a checkpoint holds.

        Raises:
            UserError: It is a folder that cannot be read.
        """
        if _is_local_file_protocol(path):
            put_back(Path(path))
            if is_sharded(Path(path)):
                return read_checkpoint("ckpt_path", Path(path), optimizer_states=True)
        return super().load_checkpoint(path, *options, **named)


def use_whole_files(trainer: Trainer) -> None:
    """Have a trainer write such files, unless a plugin for checkpoints is set."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFiles()
