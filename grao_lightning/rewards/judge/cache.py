"""Answers of the judge on disk, so that no question is paid for twice."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from grao_lightning.files import cache_folder

log = logging.getLogger(__name__)

_SCHEMA = """
create table if not exists answers (
    key blob primary key,
    answer text not null,
    prompt_tokens integer not null,
    completion_tokens integer not null,
    written_at text not null default current_timestamp
) without rowid
"""
_SELECT = "select answer from answers where key = ?"
_INSERT = (
    "insert or replace into answers (key, answer, prompt_tokens, completion_tokens) "
    "values (?, ?, ?, ?)"
)
_SECONDS_FOR_A_LOCK = 30.0
_Result = TypeVar("_Result")


def default_path() -> Path:
    """Return judge.sqlite in ``$GRAO_CACHE``, by default ``~/.cache/grao_lightning``."""
    return cache_folder() / "judge.sqlite"


def content_key(content: dict[str, Any]) -> bytes:
    """Return the SHA-256 of a JSON-like content, whatever the order of its names."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


class AnswerCache:
    """Raw answers by content, in one SQLite file that several processes may use at once.

    Every answer is committed by itself (write-ahead log): a killed process loses none that it had
    stored. A file that is no sound database is set aside with a warning and begun anew; one that
    cannot be used at all (no space, no permission, locked) costs the cache, never the run. The
    folder must lie on a disk of this machine: SQLite's log does not work across machines.

    Args:
        path: The file; its folder is made. None keeps nothing.
        told: Kinds of failure logged before: each is told once.
    """

    def __init__(self, path: Path | None, told: set[str]) -> None:
        self._path = path
        self._told = told
        self._connection: sqlite3.Connection | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the file open, for the thread that enters."""
        if self._path is not None:
            self._guarded(self._path, self._open)
        try:
            yield
        finally:
            self._close()

    def get(self, key: bytes) -> str | None:
        """Return the answer kept under a key, if there is one."""
        row = self._attempt(lambda connection: connection.execute(_SELECT, (key,)).fetchone())
        return row[0] if row else None

    def put(self, key: bytes, answer: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Keep an answer; a process killed after this has returned has not lost it."""
        values = (key, answer, prompt_tokens, completion_tokens)
        self._attempt(lambda connection: connection.execute(_INSERT, values))

    def _attempt(self, action: Callable[[sqlite3.Connection], _Result]) -> _Result | None:
        """Return what an action on the open file gives, None where it fails."""
        if self._path is None:
            return None

        def act(path: Path) -> _Result | None:
            return action(self._connection) if self._connection else None

        return self._guarded(self._path, act)

    def _guarded(self, path: Path, action: Callable[[Path], _Result]) -> _Result | None:
        try:
            try:
                return action(path)
            except sqlite3.OperationalError:
                raise  # full, locked, read-only: the file itself may be sound
            except sqlite3.DatabaseError as error:
                self._close()
                self._set_aside(path, error)
                self._open(path)
                return action(path)
        except (OSError, sqlite3.Error) as error:
            self._close()
            if "cache" not in self._told:
                self._told.add("cache")
                log.warning(
                    "the judge's cache %s cannot be used (%s), so every question is asked: free or "
                    "unlock it, or give the judge another cache",
                    path,
                    error,
                )
            return None

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._connection is None:
            with _locked(path):  # no timeout covers beginning the log while another writes
                self._connection = _connect(path)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _set_aside(self, path: Path, error: sqlite3.Error) -> None:
        with _locked(path):
            if _is_sound(path):  # another process was faster
                return
            aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
            for end in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{path}{end}", f"{aside}{end}")
        log.warning(
            "the judge's cache %s is no sound database (%s): it is kept as %s and begun anew, so "
            "questions answered before are asked again",
            path,
            error,
            aside.name,
        )


def _connect(path: Path) -> sqlite3.Connection:
    # Autocommit: a statement is a transaction.
    connection = sqlite3.connect(path, timeout=_SECONDS_FOR_A_LOCK, isolation_level=None)
    try:
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = normal")
        connection.execute(_SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection


def _is_sound(path: Path) -> bool:
    try:
        with contextlib.closing(_connect(path)) as connection:
            return connection.execute("pragma quick_check").fetchall() == [("ok",)]
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock beside a file; the system frees it when the holder dies."""
    with open(f"{path}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
