"""Where rows come from: a hub name, a folder, or local JSONL, JSON, Parquet or CSV files."""

from __future__ import annotations

import gzip
import json
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets

_BUILDERS = {
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".json": "json",
    ".json.gz": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".csv.gz": "csv",
}
_BUILDER_OPTIONS: dict[str, dict[str, Any]] = {
    # A column first met after the first chunk (10 MB by default) is an error to `datasets`.
    "json": {"chunksize": 1 << 28},
    "parquet": {},
    # Otherwise the answers "NA", "None" or "null" are read as missing.
    "csv": {"keep_default_na": False, "na_values": [""]},
}


def load_rows(
    source: str | list[str],
    *,
    split: str,
    subset: str | None = None,
    data_dir: str | None = None,
    limit: int | None = None,
) -> datasets.Dataset:
    """Returns the rows of one split.

    A source is local if it exists on disk, looks like a path (starts with "/", "./", "../" or "~",
    or is a glob) or ends like a file that can be read (".jsonl", ".jsonl.gz", ".json", ".json.gz",
    ".parquet", ".csv", ".csv.gz"). Anything else is a hub name.

    Args:
        source: Hub name, folder, file, glob, or a list of files and globs. Files are read in the
            order given (a glob's by name); their columns may differ, what is absent becomes None.
        split: Split of a hub data set or folder. Files have no splits: all their rows are read.
        subset: Configuration of a hub data set or folder.
        data_dir: Folder inside a hub data set or folder.
        limit: Keep only the first rows; None keeps all.

    Returns:
        A data set with at least one row.

    Raises:
        FileNotFoundError: A local file or folder is missing, or a glob or folder matches no data.
        ConnectionError: The hub or the data set on it cannot be reached.
        ValueError: `limit` < 1, no sources, an unknown suffix, an empty or damaged file, files
            whose columns cannot be joined, an unknown split or subset.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"data limit must be >= 1 or null; got {limit}")
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise ValueError("data source must name at least one file or data set; got an empty list")
    with _quiet():
        folder = Path(sources[0]).expanduser()
        if len(sources) == 1 and (folder.is_dir() or not is_local(sources[0])):
            name = str(folder) if folder.is_dir() else sources[0]
            rows = _load_named(name, split, subset, data_dir)
        else:
            rows = _load_files(sources, split, subset, data_dir)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def is_local(source: str) -> bool:
    """Returns whether a source names something on this machine, existing or not."""
    return (
        source.startswith(("/", "./", "../", "~"))
        or source.endswith(tuple(_BUILDERS))
        or has_magic(source)
        or os.path.exists(source)
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps `datasets` from drawing bars and logging errors that are raised again in our words."""
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _load_named(name: str, split: str, subset: str | None, data_dir: str | None) -> Any:
    """Returns one split of a hub data set or of a folder."""
    try:
        return _not_empty(
            datasets.load_dataset(name, name=subset, data_dir=data_dir, split=split), name
        )
    except datasets.exceptions.DatasetNotFoundError as error:  # also a FileNotFoundError
        raise ConnectionError(_unreachable(name, error)) from None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data source {name!r}: {error}") from None
    except OSError as error:  # ConnectionError, HfHubHTTPError, LocalEntryNotFoundError
        raise ConnectionError(_unreachable(name, error)) from None
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"data source {name!r} cannot be read: {_first_line(error)}") from None
    except ValueError as error:  # names the splits or subsets there are
        raise ValueError(
            f"data source {name!r}, split {split!r}, subset {subset!r}: {error}"
        ) from None


def _unreachable(name: str, error: Exception) -> str:
    return (
        f"data source {name!r} is no local file or folder, and the hub did not give it: "
        f"{_first_line(error)}; check name and network, or give a local file "
        f"({', '.join(_BUILDERS)})"
    )


def _load_files(
    sources: list[str], split: str, subset: str | None, data_dir: str | None
) -> datasets.Dataset:
    """Returns the rows of all files, one after the other."""
    if "[" in split:
        raise ValueError(f"a split of local files cannot be sliced; got {split!r}: set a limit")
    for setting, value in (("subset", subset), ("data_dir", data_dir)):
        if value is not None:
            warnings.warn(f"data.{setting}={value!r} has no effect on local files", stacklevel=4)
    files = [file for source in sources for file in _expand(source)]
    # One by one, since `datasets` takes a list of files only if all have the first one's columns.
    parts = [_load_file(file) for file in files]
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:
        raise ValueError(
            f"the columns of {', '.join(map(str, files))} cannot be joined: {error}"
        ) from None


def _expand(source: str) -> list[Path]:
    """Returns the files of one source, each existing and of a known suffix."""
    path = os.path.expanduser(source)
    if os.path.exists(path):
        found = [path]  # also a file whose name holds "[" or "*"
    elif has_magic(path):
        found = sorted(glob(path, recursive=True))
    elif is_local(source):
        found = []
    else:
        raise FileNotFoundError(
            f"data source {source!r} is no local file; a list may hold files only, so give it "
            "alone if it is a hub data set"
        )
    if not found:
        raise FileNotFoundError(
            f"data source {source!r}: no such file (looked in {Path.cwd()}); correct the path, or "
            "give a hub name (organisation/name)"
        )
    for file in found:
        if not file.endswith(tuple(_BUILDERS)) or os.path.isdir(file):
            raise ValueError(
                f"data source {file!r} must be a file ending in one of {', '.join(_BUILDERS)}; "
                "rename or convert it"
            )
    return [Path(file) for file in found]


def _load_file(file: Path) -> datasets.Dataset:
    """Returns the rows of one file."""
    builder = next(kind for suffix, kind in _BUILDERS.items() if file.name.endswith(suffix))
    if not file.stat().st_size:
        raise ValueError(f"data file {file} is empty (0 bytes); give one with at least one row")
    failure = None
    try:
        rows = datasets.load_dataset(
            builder, data_files=escape(str(file)), split="train", **_BUILDER_OPTIONS[builder]
        )
        rows.data.validate(full=True)  # bytes that are no UTF-8 are read without a word
    except Exception as error:  # `datasets` lets pyarrow's, pandas' and its own errors through
        failure = error
    # A line `null` is read as a row of nothing.
    if builder == "json" and (failure or _has_blank_row(rows)):
        _check_json(file)
    if failure:
        if "corresponds to no data" in str(failure) or isinstance(failure, StopIteration):
            raise ValueError(_no_rows(str(file)))
        raise ValueError(f"data file {file} cannot be read: {_first_line(failure)}")
    return _not_empty(rows, str(file))


def _not_empty(rows: datasets.Dataset, name: str) -> datasets.Dataset:
    if not len(rows):
        raise ValueError(_no_rows(name))
    return rows


def _no_rows(name: str) -> str:
    return f"data source {name!r} holds no rows; give one with at least one"


def _has_blank_row(rows: datasets.Dataset) -> bool:
    """Returns whether all values of some row are missing."""
    blank = None
    for column in rows.data.columns:
        nulls = column.is_null().to_numpy()
        blank = nulls if blank is None else blank & nulls
    return blank is not None and bool(blank.any())


def _check_json(file: Path) -> None:
    """Raises a ValueError about the first broken line, if there is one."""
    number = 0
    try:
        with _open(file) as stream:
            start = stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
            stream.seek(0)
            if start.startswith(b"[") and not file.name.endswith((".jsonl", ".jsonl.gz")):
                return _check_array(file, stream.read().decode("utf-8-sig"))
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    _check_line(file, number, line)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data file {file}, line {number}: must be UTF-8; {error.reason} at byte "
            f"{error.start}; convert the file"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"data file {file} is cut off or damaged (line {number}): {error}; copy it again"
        ) from None


def _open(file: Path) -> BinaryIO:
    """Opens by content as `datasets` does: a plain file may be called .gz."""
    with file.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(file, "rb")) if zipped else file.open("rb")


def _check_line(file: Path, number: int, line: bytes) -> None:
    text = line.decode("utf-8-sig").strip()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"broken JSON ({error.msg} at column {error.colno})"
    else:
        if isinstance(value, dict):
            return
        problem = "must be a JSON object such as {...}"
    raise ValueError(f"data file {file}, line {number}: {problem}: {_excerpt(text)}")


def _check_array(file: Path, text: str) -> None:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1]
        raise ValueError(
            f"data file {file}, line {error.lineno}: broken JSON ({error.msg} at column "
            f"{error.colno}): {_excerpt(line)}"
        ) from None
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise ValueError(
                f"data file {file}, element {number}: must be a JSON object such as {{...}}: "
                f"{_excerpt(json.dumps(value))}"
            )


def _excerpt(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _first_line(error: BaseException) -> str:
    """Returns what went wrong at the bottom of an error's chain, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
