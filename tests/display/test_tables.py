"""Markdown that can be read as it stands, and what figures look like in it."""

import math

from grao_lightning.display.tables import markdown, percent, without_nan


def test_columns_are_aligned_but_for_the_last_and_cells_stay_cells():
    rows = [["name", "a", "error"], ["x|y", "1", "two\nlines, long"], ["longer name", "22", ""]]
    assert markdown([("Title", "Note.", rows), ("Other", "", [["a"], ["b"]])]) == (
        "### Title\n\nNote.\n\n"
        "| name        | a  | error |\n"
        "|-------------|----|---|\n"
        "| x\\|y        | 1  | two lines, long |\n"
        "| longer name | 22 |  |\n"
        "\n### Other\n\n| a |\n|---|\n| b |\n"
    )


def test_shares_are_percent_with_their_interval_and_nothing_where_there_is_none():
    assert percent((0.5, 0.25, 0.751)) == "50.0 [25.0, 75.1]"
    assert percent((0.5, -0.25, 0.75, 0.03), "+") == "+50.0 [-25.0, +75.0]"
    assert percent((math.nan, math.nan, math.nan)) == ""


def test_json_gets_null_for_nan():
    content = {"a": [1.5, math.nan, {"b": math.nan, "c": "nan"}], "d": None, "e": math.inf}
    assert without_nan(content) == {"a": [1.5, None, {"b": None, "c": "nan"}], "d": None} | {
        "e": math.inf
    }
