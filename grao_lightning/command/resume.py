"""How a run that was stopped goes on: the command, with all that was given the first time."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


def resume_advice(written: Path | None, command: Sequence[str]) -> str:
    """Return how to go on, to be put behind what has happened.

    Args:
        written: The checkpoint that the run wrote last, or none.
        command: Program and arguments, as in ``sys.argv``.

    Returns:
        The same command where no step has ended yet: it begins, or goes on from its own checkpoint.
    """
    if written is None or not written.exists():
        return f"; no step has been saved{restart_advice(command)}"
    path = os.path.relpath(written) if written.is_relative_to(Path.cwd()) else str(written)
    changed = [command[0], *without(command[1:], "--ckpt_path"), "--ckpt_path", path]
    return f"; go on from its checkpoint with\n  {command_line(changed)}"


def restart_advice(command: Sequence[str]) -> str:
    """Return how to begin again, which keeps what has been finished."""
    return f"; start again with\n  {command_line(command)}"


def command_line(command: Sequence[str]) -> str:
    """Return the command as a shell reads it.

    >>> command_line(["/usr/bin/grao", "fit", "--config", "my run.yaml"])
    "grao fit --config 'my run.yaml'"
    """
    program = Path(command[0])
    name = f"{Path(sys.executable).name} -m grao_lightning"
    return " ".join(
        [name if program.name == "__main__.py" else program.name, *map(shlex.quote, command[1:])]
    )


def without(arguments: Sequence[str], option: str) -> list[str]:
    """Return the arguments without an option and its value.

    >>> without(["fit", "--ckpt_path", "a", "--ckpt_path=b", "--seed", "1"], "--ckpt_path")
    ['fit', '--seed', '1']
    """
    kept: list[str] = []
    value_follows = False
    for argument in arguments:
        if value_follows:
            value_follows = False
        elif argument == option:
            value_follows = True
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept
