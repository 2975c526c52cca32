"""What a checkpoint on disk holds: a file, or the folder of shards that several ranks wrote."""

import zipfile
from pathlib import Path
from typing import Any

from grao_lightning.faults import UserError
from grao_lightning.files import put_back

#: Of a folder of shards: what lies where, by torch.distributed.checkpoint, and all but the tensors,
#: by Lightning.
CONTENTS, REST = ".metadata", "meta.pt"
_WEIGHTS, _OPTIMIZERS = "state_dict.", "optimizer_"
_OURS = b"pytorch-lightning_version"
_EXAMPLE = "runs/version_0/checkpoints/last.ckpt"


def is_sharded(path: Path) -> bool:
    """Return whether a path is a folder of shards, whole or not."""
    return path.is_dir() and ((path / CONTENTS).exists() or (path / REST).exists())


def checkpoint_fault(setting: str, source: str, *, goes_on: bool = False) -> str | None:
    """Return what is wrong with a checkpoint as far as can be told without loading it.

    Args:
        setting: Name of the setting, for the message.
        source: File or folder.
        goes_on: Whether a run shall go on from it, and not only read its weights.
    """
    path = Path(source).expanduser()
    put_back(path)
    if not path.exists():
        return (
            f"{setting}: no such file: {source}; give a checkpoint of grao fit, such as {_EXAMPLE}"
        )
    if path.is_dir() and (path / "config.json").is_file():
        return (
            f"{setting}: {source} is a Hugging Face folder, which model.policy takes; give a "
            f"checkpoint of grao fit, such as {_EXAMPLE}"
        )
    lacks = _lack_of_folder(path) if is_sharded(path) else _lack_of_file(path)
    if lacks:
        return f"{setting}: {source} is no checkpoint of grao fit, or is {lacks}; give a whole one"
    if goes_on and not _has_optimizer_states(path):
        return no_optimizer_states(setting, source)
    return None


def no_optimizer_states(setting: str, source: Any) -> str:
    """Return that no run can go on from a checkpoint of weights alone."""
    return (
        f"{setting}: {source} holds no optimiser states (it was saved with save_weights_only), so "
        "that no run can go on from it; give last.ckpt, or begin a new run from the folder that "
        "grao export makes of it"
    )


def read_checkpoint(setting: str, path: Path, *, optimizer_states: bool = False) -> dict[str, Any]:
    """Return what a checkpoint holds, of either kind in the form of a file.

    A folder needs no process group, nor the number of ranks that wrote it: every tensor is put
    together from its shards. Its list of contents is a pickle, as PyTorch makes it: like any, to be
    read from those one trusts.

    Args:
        setting: Name of the setting, for messages.
        path: File or folder.
        optimizer_states: Whether those of a folder are read too; a file's are, once they are used.

    Raises:
        UserError: It cannot be read, or is a folder that is cut off.
    """
    import torch
    from torch.distributed.checkpoint.api import CheckpointException

    fault = checkpoint_fault(setting, str(path)) if path.is_dir() else None
    if fault:
        raise UserError(fault)
    try:
        if path.is_dir():
            return _joined(path, optimizer_states=optimizer_states)
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content
    except (Exception, CheckpointException) as error:  # what is damaged fails in many ways
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"{setting}: {path} cannot be read: {reason}") from error


def _lack_of_file(path: Path) -> str | None:
    return None if _OURS in _outline(path) else "cut off"


def _lack_of_folder(path: Path) -> str | None:
    """Return what a folder of shards lacks."""
    for name in (CONTENTS, REST):
        if not (path / name).is_file():
            return f"cut off: {name} is missing"
    if _OURS not in _outline(path / REST):
        return f"cut off: {REST} is damaged"
    try:
        stored = _contents(path).storage_data.values()
    except Exception:  # a damaged pickle fails in many ways
        return f"cut off: {CONTENTS} is damaged"
    ends: dict[str, int] = {}
    for part in stored:
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in sorted(ends.items()):
        if not (path / name).is_file():
            return f"cut off: {name} is missing"
        if (path / name).stat().st_size < end:
            return f"cut off: {name} has {(path / name).stat().st_size} of {end} bytes"
    return None


def _has_optimizer_states(path: Path) -> bool:
    if path.is_dir():
        return any(name.startswith(_OPTIMIZERS) for name in _contents(path).state_dict_metadata)
    return b"optimizer_states" in _outline(path)


def _outline(path: Path) -> bytes:
    """Return all but the tensors of a file of ``torch.save``; nothing where it is none."""
    try:
        # The list of contents comes last, so a file that is cut off does not open.
        with zipfile.ZipFile(path) as archive:
            return b"".join(archive.read(name) for name in archive.namelist() if "data.pkl" in name)
    except (OSError, zipfile.BadZipFile):
        return b""


def _contents(path: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(path).read_metadata()


def _joined(path: Path, *, optimizer_states: bool) -> dict[str, Any]:
    import torch
    from torch.distributed.checkpoint import load

    contents = _contents(path)
    flat = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) if _is_tensor(entry) else None
        for name, entry in contents.state_dict_metadata.items()
        if name.startswith(_WEIGHTS) or optimizer_states
    }
    load(flat, checkpoint_id=path, no_dist=True)
    whole: dict[str, Any] = torch.load(path / REST, map_location="cpu", weights_only=True)
    found = _nested(flat, contents.planner_data)
    whole["state_dict"] = found.pop("state_dict")
    if found:
        names = sorted(found, key=lambda name: int(name.removeprefix(_OPTIMIZERS)))
        whole["optimizer_states"] = [_by_number(found[name]) for name in names]
    return whole


def _is_tensor(entry: Any) -> bool:
    return hasattr(entry, "properties")


def _nested(flat: dict[str, Any], paths: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Return nested dicts; the numbers of a list's items stay keys."""
    whole: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = paths[name]
        place = whole
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
    return whole


def _by_number(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimiser's state as ``Optimizer.state_dict`` has it, parameters by number."""
    groups = [state["param_groups"][number] for number in sorted(state["param_groups"])]
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "state": {numbers[name]: value for name, value in state.get("state", {}).items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in groups
        ],
    }
