"""How own functions are found, what is said where they are not, and that nothing is shadowed."""

import logging
import random
import sys
from pathlib import Path

import pytest

from grao_lightning.faults import UserError
from grao_lightning.rewards.importing import load_object, own_modules
from grao_lightning.rewards.protocol import RewardSpec

KIND = """\
def kindness(completions):
    return [1.0] * len(completions)

class Polite:
    pass
"""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The working directory, and the folder of a config."""
    here, beside = tmp_path / "here", tmp_path / "beside"
    here.mkdir()
    beside.mkdir()
    monkeypatch.chdir(here)
    return here, beside


@pytest.fixture
def load(folders):
    """Return a function: path -> what a command with the config finds."""

    def run(path: str):
        with own_modules(["--config", str(folders[1] / "config.yaml")]):
            return load_object(path)

    return run


def complaint(load, path: str) -> str:
    with pytest.raises(UserError) as error:
        load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("at", [0, 1], ids=["working directory", "beside the config"])
@pytest.mark.parametrize("path", ["mine.kindness", "mine:kindness", "mine.py:kindness"])
def test_own_functions_are_found_in_both_places(load, folders, at, path):
    (folders[at] / "mine.py").write_text(KIND)
    assert load(path)(["a", "b"]) == [1.0, 1.0]


def test_a_file_may_lie_anywhere_and_import_from_beside_it(load, folders):
    deep = folders[0] / "deep"
    deep.mkdir()
    (deep / "helper.py").write_text("ONE = 1.0\n")
    (deep / "my-mine.py").write_text("from helper import ONE\n" + KIND.replace("1.0", "ONE"))
    for path in ("deep/my-mine.py:kindness", f"{deep}/my-mine.py:kindness"):
        assert load(path)(["a"]) == [1.0]


def test_a_file_is_imported_once_however_it_is_named(folders):
    (folders[0] / "mine.py").write_text(KIND)
    with own_modules([]):
        names = ("mine.kindness", "mine.py:kindness", f"{folders[0]}/mine.py:kindness")
        assert len({id(load_object(name)) for name in names}) == 1


def test_own_files_break_no_library_and_a_hidden_one_is_said(load, folders, caplog):
    for name in ("random", "datasets"):
        (folders[0] / f"{name}.py").write_text(KIND + "def choice(completions):\n    return []\n")
    assert load("random.py:choice")([]) == []
    assert load("datasets.py:kindness")(["a"]) == [1.0]
    assert sys.modules["random"] is random and random.choice([1]) == 1
    with caplog.at_level(logging.WARNING):
        assert load("random.choice") == random.choice
    hidden = f"hides {folders[0]}/random.py: rename that file"
    assert hidden in caplog.text
    assert hidden in complaint(load, "random.kindness")


def test_one_name_for_two_files_that_differ_is_refused(load, folders):
    for folder, text in zip(folders, (KIND, KIND + "\n"), strict=True):
        (folder / "mine.py").write_text(text)
    for path in ("mine.kindness", "mine.py:kindness"):
        assert f"give the whole path, as in {folders[0]}/mine.py:name" in complaint(load, path)
    assert load(f"{folders[1]}/mine.py:kindness")(["a"]) == [1.0]
    (folders[0] / "mine.py").write_text(KIND + "\n")
    assert load("mine.kindness")(["a"]) == [1.0]


def test_own_modules_are_forgotten_with_their_run(folders):
    path = list(sys.path)
    for number, folder in enumerate(folders):
        (folder / "mine.py").write_text(f"def number(completions):\n    return [{number}]\n")
    found = []
    for folder in folders:
        (folders[0] / "mine.py").unlink(missing_ok=True) if folder is folders[1] else None
        with own_modules(["--config", str(folder / "config.yaml")]):
            found.append(load_object("mine.number" if folder is folders[1] else "mine.py:number"))
    assert [function([]) for function in found] == [[0], [1]]
    assert "mine" not in sys.modules and sys.path == path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("mine.kindnes", "mine.py has no 'kindnes'; it defines kindness, Polite: did you mean "),
        ("mine.py:kindnes", "it defines kindness, Polite: did you mean kindness?"),
        ("mine.py", "mine.py must be followed by :name; it defines kindness, Polite"),
        ("mien.kindness", "/here or {beside}, and no installed package mien: did you mean mine?"),
        ("mien.py:kindness", "no such file: mien.py (looked in {here}, {beside}): did you mean mi"),
        ("/no/mine.py:kindness", "no such file: /no/mine.py (looked in /no); give its path"),
        ("mine.sub.kindness", "mine has no module sub"),
        ("kindness", "give the path of a function or class as module.name, or as my_rewards.py:"),
        ("needy.f", "{here}/needy.py, line 2: ModuleNotFoundError: No module named 'nosuch'; inst"),
        ("needy.py:f", "{here}/needy.py, line 2: ModuleNotFoundError: No module named 'nosuch'"),
        ("broken.f", "{here}/broken.py, line 3: "),
        ("broken.py:f", "{here}/broken.py, line 3: "),
        ("leaving.f", "{here}/leaving.py, line 2: SystemExit: 3; mend that line"),
        ("mine.ONE", "ONE must be a function or class in {here}/mine.py; got 1"),
    ],
)
def test_what_cannot_be_found_is_one_line_with_the_fix(load, folders, path, expected):
    here, beside = folders
    (here / "mine.py").write_text(KIND + "ONE = 1\n")
    (here / "needy.py").write_text("import sys\nimport nosuch\n")
    (here / "broken.py").write_text("\n\ndef f(:\n")
    (here / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    text = complaint(load, path)
    assert text.startswith(f"cannot import {path!r}: ")
    assert expected.format(here=here, beside=beside) in text


def test_a_file_is_no_part_of_a_rewards_name():
    assert RewardSpec("my/rewards.py:kindness").label == "kindness"
    assert RewardSpec("rewards.kindness").label == "kindness"


def test_instances_that_cannot_be_called_and_classes_that_fail_are_faults(folders):
    Path("mine.py").write_text(KIND + "class Lost:\n    def __init__(self): {}['key']\n")
    with own_modules([]):
        for name, expected in (("Polite", "__call__"), ("Lost", "arguments of Lost: KeyError")):
            with pytest.raises(UserError, match=expected):
                RewardSpec(f"mine.{name}").load()
