"""Laws of the answers on disk: whole processes, real signals, real files."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grao_lightning.rewards.judge.cache import AnswerCache, content_key, default_path
from tests.rewards.judge.quality import honest, judge_of, judged, pairs
from tests.rewards.judge.scripted_server import Question, Reply, serving

ROOT = Path(__file__).parents[3]


def put(path: Path, *names: str, told: set[str] | None = None) -> None:
    cache = AnswerCache(path, set() if told is None else told)
    with cache.opened():
        for name in names:
            cache.put(name.encode(), f"answer of {name}", 1, 2)


def get(path: Path, *names: str) -> list[str | None]:
    cache = AnswerCache(path, set())
    with cache.opened():
        return [cache.get(name.encode()) for name in names]


def start(code: str, *arguments: object) -> subprocess.Popen:
    """Run code in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_answers_are_found_again_by_their_key(tmp_path):
    put(tmp_path / "a" / "b" / "judge.sqlite", "one", "two")
    found = get(tmp_path / "a" / "b" / "judge.sqlite", "two", "three", "one")
    assert found == ["answer of two", None, "answer of one"]


def test_no_path_keeps_nothing():
    cache = AnswerCache(None, set())
    with cache.opened():
        cache.put(b"one", "answer", 1, 2)
        assert cache.get(b"one") is None


def test_the_default_lies_in_the_projects_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAO_CACHE", str(tmp_path))
    assert default_path() == tmp_path / "judge.sqlite"
    monkeypatch.delenv("GRAO_CACHE")
    assert default_path() == Path.home() / ".cache" / "grao_lightning" / "judge.sqlite"


def test_the_key_changes_with_every_part_of_the_content_and_not_with_its_order():
    content = {"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": 0.0}
    assert content_key(content) == content_key(dict(reversed(content.items())))
    others = [
        {**content, "model": "n"},
        {**content, "messages": [{"role": "user", "content": "b"}]},
        {**content, "temperature": 0.1},
        {name: value for name, value in content.items() if name != "temperature"},
    ]
    assert len({content_key(other) for other in [content, *others]}) == 5


WRITER = """
import sys
from pathlib import Path
from grao_lightning.rewards.judge.cache import AnswerCache

path, name, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
cache = AnswerCache(path, set())
print("ready", flush=True)
with cache.opened():
    for i in range(number):
        cache.put(f"{name} {i}".encode(), f"answer {name} {i}", 1, 2)
        print(i, flush=True)
"""


def test_several_processes_write_at_once_and_nothing_is_lost(tmp_path):
    path = tmp_path / "judge.sqlite"
    writers = [start(WRITER, path, name, 200) for name in "abcd"]
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    names = [f"{name} {i}" for name in "abcd" for i in range(200)]
    assert get(path, *names) == [f"answer {name}" for name in names]


def test_a_killed_writer_loses_no_answer_it_had_stored(tmp_path):
    path = tmp_path / "judge.sqlite"
    for attempt in range(3):
        writer = start(WRITER, path, attempt, 10**9)
        stored = [line for _, line in zip(range(60), writer.stdout, strict=False)][1:]
        writer.send_signal(signal.SIGKILL)
        stored += writer.communicate()[0].splitlines()
        assert writer.returncode == -signal.SIGKILL
        names = [f"{attempt} {int(line)}" for line in stored if line.strip().isdigit()]
        assert len(names) >= 59
        assert get(path, *names) == [f"answer {name}" for name in names]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]


JUDGING = """
import sys
from tests.rewards.judge.quality import judged, pairs
from grao_lightning.rewards.judge import PairwiseJudge

judge = PairwiseJudge("scripted", base_url=sys.argv[1], cache=sys.argv[2], concurrency=4)
print("ready", flush=True)
print(judged(judge, pairs(60)), flush=True)
"""


def test_after_kill_9_amid_judging_only_what_had_not_been_answered_is_asked(tmp_path):
    pytest.importorskip("openai")
    cache = tmp_path / "judge.sqlite"

    def slow(question: Question) -> Reply:
        return Reply(honest(question).text, delay=0.05)

    with serving(slow) as server:
        process = start(JUDGING, server.base_url, cache)
        deadline = time.monotonic() + 60
        while len(server.questions) < 40 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        time.sleep(0.2)  # what was in flight runs out
        before = server.times_asked
        assert 40 <= sum(before.values()) < 120, "it was killed in the middle"

        process = start(JUDGING, server.base_url, cache)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        after = server.times_asked
    with serving(honest) as other:
        expected = judged(judge_of(other), pairs(60))
    assert output.splitlines()[-1] == str(expected)
    assert len(after) == 120
    twice = [text for text, times in after.items() if times > 1]
    assert max(after.values()) <= 2
    assert set(twice) <= set(before)
    assert len(twice) <= 4, "only what was in flight: four at once"


# Files that are no use


@pytest.mark.parametrize(
    "content", [b"no database at all" * 100, b"SQLite format 3\0" + b"x" * 5000]
)
def test_a_corrupt_file_is_set_aside_with_a_warning_and_begun_anew(tmp_path, caplog, content):
    path = tmp_path / "judge.sqlite"
    path.write_bytes(content)
    put(path, "one")
    assert get(path, "one") == ["answer of one"]
    aside = [file for file in tmp_path.iterdir() if ".corrupt-" in file.name]
    assert [file.read_bytes() for file in aside] == [content]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert str(path) in told[0] and aside[0].name in told[0] and "begun anew" in told[0]


def test_a_file_damaged_in_the_middle_does_not_stop_the_judge(tmp_path, caplog):
    path = tmp_path / "judge.sqlite"
    put(path, *(str(i) for i in range(2000)))
    with path.open("r+b") as file:  # the first page, with the schema, stays
        file.seek(4096)
        file.write(b"\xde\xad" * (path.stat().st_size // 2 - 2048))
    cache = AnswerCache(path, set())
    with cache.opened():
        assert [cache.get(str(i).encode()) for i in range(2000)] == [None] * 2000
        cache.put(b"new", "answer", 1, 2)
        assert cache.get(b"new") == "answer"
    assert "no sound database" in caplog.text


def test_processes_that_meet_a_corrupt_file_together_set_one_aside(tmp_path):
    path = tmp_path / "judge.sqlite"
    path.write_bytes(b"no database" * 1000)
    writers = [start(WRITER, path, name, 20) for name in "abc"]
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    assert len([file for file in tmp_path.iterdir() if ".corrupt-" in file.name]) == 1
    names = [f"{name} {i}" for name in "abc" for i in range(20)]
    assert get(path, *names) == [f"answer {name}" for name in names]


def test_a_place_that_cannot_be_written_costs_the_cache_and_not_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    told: set[str] = set()
    for _ in range(2):  # two batches: told once
        put(tmp_path / "file" / "judge.sqlite", "one", told=told)
    assert len(caplog.records) == 1
    assert "cannot be used" in caplog.text and "give the judge another cache" in caplog.text


def test_another_programs_database_is_left_alone(tmp_path, caplog):
    path = tmp_path / "theirs.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("create table answers (mine text)")
        connection.execute("insert into answers values ('precious')")
    put(path, "one")
    assert get(path, "one") == [None]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("select * from answers").fetchall() == [("precious",)]
    assert "cannot be used" in caplog.text


def test_an_answer_no_longer_readable_is_asked_again(tmp_path):
    pytest.importorskip("openai")
    path = tmp_path / "judge.sqlite"
    with serving(honest) as server:
        judge = judge_of(server, cache=str(path))
        expected = judged(judge, pairs(1))
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("update answers set answer = 'both are nice'")
        assert judged(judge, pairs(1)) == expected
        assert len(server.questions) == 4
