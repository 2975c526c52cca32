"""Laws of reading rows. Nothing here needs a network."""

import gzip
import json
import logging
import os
import subprocess
import sys
import traceback
import warnings

import datasets
import pytest

from grao_lightning.data.sources import load_rows

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c\n", "completion": "dé"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, content):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(content).to_parquet(path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)
    return str(path)


CSV = 'prompt,completion\na,b\n"c\n",dé\n'.encode()
CONTENT = {
    "rows.jsonl": lines(ROWS),
    "rows.jsonl.gz": lines(ROWS),
    "rows.json": json.dumps(ROWS, indent=1).encode(),
    "rows.json.gz": json.dumps(ROWS).encode(),
    "rows.parquet": ROWS,
    "rows.csv": CSV,
    "rows.csv.gz": CSV,
}


def failure(error_type, *args, **kwargs):
    """The message of an expected error; no inner error may be shown with it."""
    with pytest.raises(error_type) as caught:
        load_rows(*args, **{"split": "train", **kwargs})
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count("Traceback") == 1
    return str(caught.value)


@pytest.mark.parametrize("name", CONTENT)
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    assert load_rows(write(tmp_path / name, CONTENT[name]), split="any").to_list() == ROWS


def test_files_and_globs_are_read_in_order(tmp_path):
    for name in ("b1", "b0", "a"):
        write(tmp_path / f"{name}.jsonl", lines([{"x": name}]))
    rows = load_rows([str(tmp_path / "b*.jsonl"), str(tmp_path / "a.jsonl")], split="train")
    assert rows["x"][:] == ["b0", "b1", "a"]


def test_a_file_name_may_hold_glob_characters(tmp_path):
    source = write(tmp_path / "a[1].jsonl", lines(ROWS))
    assert len(load_rows(source, split="train")) == 2


def test_a_relative_file_and_a_home_file_are_local(tmp_path, monkeypatch):
    write(tmp_path / "rows.jsonl", lines(ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("rows.jsonl", "./rows.jsonl", "~/rows.jsonl"):
        assert len(load_rows(source, split="train")) == 2


def test_differing_columns_are_filled_with_none_within_and_across_files(tmp_path):
    first = write(tmp_path / "1.jsonl", lines([{"a": "x"}, {"b": "y"}]))
    second = write(tmp_path / "2.jsonl", lines([{"c": "z"}]))
    assert load_rows([first, second], split="train").to_list() == [
        {"a": "x", "b": None, "c": None},
        {"a": None, "b": "y", "c": None},
        {"a": None, "b": None, "c": "z"},
    ]


def test_a_column_first_met_after_the_default_chunk_is_read(tmp_path):
    rows = [{"a": "x" * 1000}] * 11_000 + [{"b": "late"}]  # over 10 MB
    assert load_rows(write(tmp_path / "r.jsonl", lines(rows)), split="train")[-1] == {
        "a": None,
        "b": "late",
    }


def test_messages_keep_their_keys(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}]
    source = write(tmp_path / "r.jsonl", lines(rows))
    assert load_rows(source, split="train").to_list() == rows


def test_csv_words_that_look_missing_are_text_and_empty_fields_are_missing(tmp_path):
    source = write(tmp_path / "r.csv", b"a,n\nNA,1\nNone,2\n,3\n")
    assert load_rows(source, split="train")["a"][:] == ["NA", "None", None]


def test_limit_keeps_the_first_rows_and_may_exceed_their_number(tmp_path):
    source = write(tmp_path / "r.jsonl", lines(ROWS))
    assert load_rows(source, split="train", limit=1).to_list() == ROWS[:1]
    assert len(load_rows(source, split="train", limit=9)) == 2
    assert "limit must be >= 1 or null; got 0" in failure(ValueError, source, limit=0)


def test_a_changed_file_is_read_anew(tmp_path):
    source = tmp_path / "r.jsonl"
    write(source, lines(ROWS))
    load_rows(str(source), split="train")
    write(source, lines([*ROWS, *ROWS]))
    os.utime(source, (1, 1))
    assert len(load_rows(str(source), split="train")) == 4


@pytest.mark.parametrize(
    "name", ["./none", "none.jsonl", "/no/such", "nosuch*", "../x.csv", "~/none"]
)
def test_a_missing_local_file_names_path_and_fix(name):
    text = failure(FileNotFoundError, name)
    assert repr(name) in text
    assert "no such file" in text and "correct the path" in text


def test_a_hub_name_in_a_list_is_refused(tmp_path):
    text = failure(FileNotFoundError, [write(tmp_path / "r.jsonl", lines(ROWS)), "org/name"])
    assert "'org/name' is no local file" in text


def test_an_empty_list_is_refused():
    assert "at least one file" in failure(ValueError, [])


def test_an_unknown_suffix_lists_the_valid_ones(tmp_path, monkeypatch):
    write(tmp_path / "r.txt", b"x")
    monkeypatch.chdir(tmp_path)
    text = failure(ValueError, "r.txt")
    assert "'r.txt'" in text and ".jsonl, .jsonl.gz, .json, .json.gz, .parquet, .csv" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.jsonl", b""),
        ("r.jsonl", b"\n\n"),
        ("r.jsonl.gz", b""),
        ("r.json", b"[]"),
        ("r.csv", b""),
        ("r.csv", b"a,b\n"),
    ],
)
def test_a_file_without_rows_is_named(tmp_path, name, content):
    text = failure(ValueError, write(tmp_path / name, content))
    assert name in text
    assert "at least one" in text


@pytest.mark.parametrize(
    ("content", "line", "excerpt"),
    [
        (b'{"a": "x"}\n{"a": \n{"a": "z"}\n', 2, '{"a":'),
        (b'{"a"\n{"a": "z"}\n', 1, '{"a"'),
        (b'{"a": "x"}\n\n{"a": "cut of', 3, '{"a": "cut of'),
        (b'{"a": "x"}\n' * 3 + b'{"a": ' + b"9" * 99 + b"\n", 4, '{"a": ' + "9" * 51 + "..."),
        (b'{"a": "x"}\n[1, 2]\n', 2, "[1, 2]"),
        (b"[1, 2]\n[3]\n", 1, "[1, 2]"),
        (b'{"a": "x"}\n"text"\n', 2, '"text"'),
        (b'{"a": "x"}\nnull\n', 2, "null"),
        (b"7\n", 1, "7"),
    ],
)
def test_a_broken_line_is_named_by_file_number_and_excerpt(tmp_path, content, line, excerpt):
    for name in ("r.jsonl", "r.jsonl.gz"):
        text = failure(ValueError, write(tmp_path / name, content))
        assert f"{name}, line {line}: " in text
        assert text.endswith(excerpt)


def test_a_late_broken_line_is_found(tmp_path):
    content = b'{"a": "%s"}\n' % (b"x" * 1000) * 11_000 + b"{oops}\n"  # beyond the first chunk
    assert "line 11001: broken JSON" in failure(ValueError, write(tmp_path / "r.jsonl", content))


def test_a_broken_array_names_the_line_and_a_stray_element_its_number(tmp_path):
    text = failure(ValueError, write(tmp_path / "r.json", b'[{"a": 1},\n {"a": }]'))
    assert "r.json, line 2: broken JSON" in text
    text = failure(ValueError, write(tmp_path / "s.json", b'[{"a": 1}, 3]'))
    assert "s.json, element 2: must be a JSON object" in text


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    text = failure(ValueError, write(tmp_path / "r.jsonl", b'{"a": "x"}\n{"a": "\xe9"}\n'))
    assert "r.jsonl, line 2: must be UTF-8" in text


def test_a_gzip_file_cut_off_is_named(tmp_path):
    path = tmp_path / "r.jsonl.gz"
    path.write_bytes(gzip.compress(lines({"a": str(i)} for i in range(999)))[:-200])
    assert "r.jsonl.gz is cut off or damaged" in failure(ValueError, str(path))


def test_a_broken_parquet_file_is_named(tmp_path):
    path = tmp_path / "r.parquet"
    path.write_bytes(b"nope")
    assert "r.parquet cannot be read" in failure(ValueError, str(path))


def test_files_whose_columns_clash_are_named(tmp_path):
    sources = [
        write(tmp_path / f"{name}.jsonl", lines([{"a": value}]))
        for name, value in (("one", "x"), ("two", [1]))
    ]
    text = failure(ValueError, sources)
    assert "one.jsonl" in text and "two.jsonl" in text and "cannot be joined" in text


def test_settings_without_effect_on_files_warn(tmp_path):
    source = write(tmp_path / "r.jsonl", lines(ROWS))
    with pytest.warns(UserWarning, match=r"data\.subset='s' has no effect"):
        load_rows(source, split="train", subset="s")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_rows(source, split="train")


def test_a_sliced_split_of_a_file_is_refused(tmp_path):
    source = write(tmp_path / "r.jsonl", lines(ROWS))
    assert "'train[:1]': set a limit" in failure(ValueError, source, split="train[:1]")


def test_a_folder_has_splits_and_a_missing_one_lists_them(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    write(tmp_path / "d" / "train.jsonl", lines(ROWS))
    write(tmp_path / "d" / "test.jsonl", lines(ROWS[:1]))
    write(tmp_path / "d" / "sub" / "train.jsonl", lines(ROWS * 2))
    folder = str(tmp_path / "d")
    assert len(load_rows(folder, split="test")) == 1
    assert len(load_rows(folder, split="train", data_dir="sub")) == 4
    text = failure(ValueError, folder, split="valid")
    assert "split 'valid'" in text and "['train', 'test']" in text
    assert "'s'" in failure(ValueError, folder, subset="s")
    assert "nope" in failure(FileNotFoundError, folder, data_dir="nope")


def test_an_unreachable_hub_names_the_source_and_says_that_files_work():
    code = "from grao_lightning.data.sources import load_rows; load_rows('org/name', split='train')"
    run = subprocess.run(  # the offline switch is read at import
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.stderr.count("Traceback") == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ConnectionError: data source 'org/name' is no local file or folder")
    assert "give a local file" in last


@pytest.mark.parametrize("bars", [True, False])
def test_progress_bars_stay_as_they_were_and_none_is_drawn(tmp_path, capfd, bars):
    was_disabled = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if bars else datasets.disable_progress_bars)()
    try:
        load_rows(write(tmp_path / "r.jsonl", lines(ROWS)), split="train")
        failure(ValueError, write(tmp_path / "s.jsonl", b'{"a": "x"}\n{"a": "cut'))
        assert datasets.are_progress_bars_disabled() is not bars
    finally:
        (datasets.disable_progress_bars if was_disabled else datasets.enable_progress_bars)()
    assert capfd.readouterr() == ("", "")


def test_datasets_logs_nothing_about_a_fault_that_we_tell(tmp_path, caplog):
    logger = logging.getLogger("datasets")  # does not propagate to the root logger
    logger.addHandler(caplog.handler)
    try:
        failure(ValueError, write(tmp_path / "r.jsonl", b'{"a": "x"}\n{"a": "cut'))
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []
