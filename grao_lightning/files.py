"""Files that are whole or not there."""

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
