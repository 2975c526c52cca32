"""Files that are whole or not there, and where those lie that runs share."""

import os
from pathlib import Path


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


def cache_folder() -> Path:
    """Return ``$GRAO_CACHE``, by default ``~/.cache/grao_lightning``; it need not exist."""
    return Path(os.environ.get("GRAO_CACHE", Path.home() / ".cache" / "grao_lightning"))
