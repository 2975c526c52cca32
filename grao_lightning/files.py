"""Files and folders that are whole or not there, and where those lie that runs share."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_UNFINISHED, _BEFORE = ".unfinished", ".before"


def write_whole(path: Path, content: str) -> None:
    """Write a text so that a reader, or a killed process, never leaves half of it.

    Args:
        path: Its folder is made where there is none.
        content: The whole text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    # As the text has them: csv ends its lines itself.
    with unfinished.open("w", encoding="utf-8", newline="") as file:
        file.write(content)
    os.replace(unfinished, path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside a path, which takes its place once it is filled and on the disk.

    What lies at the path stays whole until then; see `put_back` for a process that is killed.

    Args:
        path: Of the folder; the folder around it is made where there is none.
    """
    unfinished = unfinished_beside(path)
    remove(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for file in unfinished.rglob("*"):
            if file.is_file():
                to_disk(file)
    except BaseException:
        remove(unfinished)
        raise
    put_in_place(unfinished, path)


def unfinished_beside(path: Path) -> Path:
    """Return where what shall lie at a path is written."""
    return path.with_name(path.name + _UNFINISHED)


def put_in_place(unfinished: Path, path: Path) -> None:
    """Move a file or folder to a path, in the place of what is there."""
    if unfinished.is_file() and not path.is_dir():
        os.replace(unfinished, path)
        return
    before = path.with_name(path.name + _BEFORE)
    put_back(path)
    remove(before)
    if path.exists():
        os.rename(path, before)  # no folder takes a full one's place in one move
    os.rename(unfinished, path)
    remove(before)


def put_back(path: Path) -> None:
    """Put back what a process that was killed between the moves of `put_in_place` had set aside."""
    before = path.with_name(path.name + _BEFORE)
    if before.exists() and not path.exists():
        with suppress(FileNotFoundError):  # another rank has put it back
            os.rename(before, path)


def remove(path: Path) -> None:
    """Remove a file or folder, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until a file lies on the disk, and a machine that stops does not lose it."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def cache_folder() -> Path:
    """Return ``$GRAO_CACHE``, by default ``~/.cache/grao_lightning``; it need not exist."""
    return Path(os.environ.get("GRAO_CACHE", Path.home() / ".cache" / "grao_lightning"))
