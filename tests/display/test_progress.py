"""The line that says how far a long piece of work is."""

import io

import pytest

from grao_lightning.display import progress
from grao_lightning.display.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def minutes(monkeypatch):
    """Return a list that holds the time, in minutes."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: 60 * now[0])
    return now


def test_time_left_is_that_of_what_was_done_in_this_run(minutes):
    stream = io.StringIO()
    line = ProgressLine("runs", stream)
    line(4, 10)  # four had been finished before
    minutes[0] += 3
    line(6, 10, "a, b")  # two in 3 minutes: four take 6
    minutes[0] += 6
    line(10, 10)
    assert stream.getvalue().splitlines() == [
        "runs 4/10, 0.0 min",
        "runs 6/10, 3.0 min, about 6.0 left: a, b",
        "runs 10/10, 9.0 min",
    ]


def test_a_terminal_has_one_line_that_is_written_over(minutes):
    stream = Terminal()
    line = ProgressLine("pairs", stream)
    line(0, 2)
    line(2, 2)
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.endswith("pairs 2/2, 0.0 min\n")
    assert text.count("\r\033[K") == 2
