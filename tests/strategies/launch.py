"""Scripts on several gloo ranks, with a time limit: ranks that wait for ever fail."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]


def on_ranks(script: str, folder: Path, *arguments: str, ranks: int = 2, limit: float = 100) -> Any:
    """Run a script of this folder on every rank and return what the first one told.

    Args:
        script: Its name.
        folder: First argument of the script; holds ``found.json`` afterwards.
        arguments: Further ones.
        ranks: Number of processes.
        limit: Seconds after which they are killed, and the test fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",  # so that Lightning starts no processes itself
    }
    command = [sys.executable, str(Path(__file__).parent / script), str(folder), *arguments]
    with tempfile.TemporaryFile("w+") as said:
        processes = [
            subprocess.Popen(
                command,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=said,
                stderr=said,
            )
            for rank in range(ranks)
        ]
        end = time.monotonic() + limit
        codes: list[int | None] = [None]
        while None in codes and time.monotonic() < end:
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
            if any(codes):  # one that failed leaves the others waiting
                break
        for process in processes:
            process.kill()
            process.wait()
        said.seek(0)
        if any(code != 0 for code in codes):
            pytest.fail(f"exit codes after at most {limit} s: {codes}\n{said.read()[-3000:]}")
    return json.loads((folder / "found.json").read_text())


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Any:
    """Return what a function finds in a new folder, also where several workers of pytest ask.

    The first one makes it, the others wait: ranks need their cores.

    Args:
        factory: Of pytest.
        name: Of what is found.
        make: (folder) -> what JSON can hold.
    """
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    file = shared / f"{name}.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(json.dumps(make(factory.mktemp(name))))
        return json.loads(file.read_text())
