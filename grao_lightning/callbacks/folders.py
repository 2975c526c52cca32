"""Hugging Face folders beside checkpoints, written while training goes on.

Training stands still while the weights are copied to the host, not while they are written. One
folder is written at a time: a copy of the weights is all that the host has to hold.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from grao_lightning.callbacks.exporting import Exported, exported, trained_in
from grao_lightning.faults import UserError
from grao_lightning.files import whole_folder

log = logging.getLogger(__name__)

_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="folders")
_writing: Future[None] | None = None
_told: set[str] = set()


def write_behind(trainer: Trainer, folder: Path) -> None:
    """Write what is trained, as ``grao export`` would, in a thread; all ranks call this.

    A folder that cannot be written is told in the log, and the run goes on.

    Args:
        trainer: Of the run.
        folder: Takes the place of an earlier one of that name once it is whole.
    """
    global _writing
    wait()
    content = _content(trainer)
    if not trainer.is_global_zero:
        return
    try:
        if folder.exists() and not (folder / "config.json").is_file():
            raise UserError("what lies there is no such folder, and stays")
        # Here and not in the thread: to make a model sets PyTorch's default dtype for a moment.
        ready = exported(trained_in(content, "the run"))
    except Exception as error:  # a folder is an extra: the run must not be lost with it
        _tell(folder, error)
        return
    for note in set(ready.notes) - _told:
        log.info("%s: %s", folder.name, note)
    _told.update(ready.notes)
    disable_progress_bar()  # it would be drawn over the run's own
    _writing = _thread.submit(_write, ready, folder)


def wait() -> None:
    """Wait until the folder that is being written lies there."""
    if _writing is not None:
        _writing.result()


def _write(ready: Exported, folder: Path) -> None:
    try:
        with whole_folder(folder) as place:
            ready.save(place)
    except Exception as error:
        _tell(folder, error)


def _tell(folder: Path, error: Exception) -> None:
    reason = str(error).strip().splitlines()[0] if str(error) else repr(error)
    log.warning(
        "%s was not written (%s): the run goes on; grao export makes one of a checkpoint",
        folder,
        reason,
    )


def _content(trainer: Trainer) -> dict[str, Any]:
    """Return what a checkpoint would hold for export, its tensors copied to the host of rank 0."""
    module = trainer.lightning_module
    content: dict[str, Any] = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
    }
    module.on_save_checkpoint(content)
    parameters = module.named_parameters(remove_duplicate=False)
    owners = {name: id(parameter) for name, parameter in parameters}
    copies: dict[Any, Tensor | None] = {}
    for name, value in content["state_dict"].items():
        owner = owners.get(name, name)  # a tied weight is copied once
        if owner not in copies:
            copies[owner] = _on_host(value, keep=trainer.is_global_zero)
        content["state_dict"][name] = copies[owner]
    return content


def _on_host(value: Tensor, *, keep: bool) -> Tensor | None:
    """Return a copy of a tensor; where it is sharded, all ranks bring their parts together."""
    whole = getattr(value, "full_tensor", None)
    if whole is not None:
        value = whole()
    return value.detach().to("cpu", copy=True) if keep else None
