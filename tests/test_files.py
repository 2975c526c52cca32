"""Files and folders are whole or not there, also where a process is killed in the middle."""

import os

import pytest

from grao_lightning.files import put_back, put_in_place, whole_folder


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_takes_its_place_only_when_it_is_whole(tmp_path):
    place = tmp_path / "model"
    with whole_folder(place) as folder:
        (folder / "weights").write_text("1")
        assert not place.exists()
    with pytest.raises(KeyboardInterrupt), whole_folder(place) as folder:
        assert names(folder) == set()
        (folder / "weights").write_text("2")
        raise KeyboardInterrupt
    assert names(tmp_path) == {"model"} and (place / "weights").read_text() == "1"
    with whole_folder(place) as folder:
        (folder / "other").write_text("3")
    assert names(tmp_path) == {"model"} and names(place) == {"other"}


def test_what_a_killed_process_left_does_not_get_into_the_next_folder(tmp_path):
    (tmp_path / "model.unfinished").mkdir()
    (tmp_path / "model.unfinished" / "rest").write_text("old")
    with whole_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("1")
    assert names(tmp_path) == {"model"} and names(tmp_path / "model") == {"weights"}


@pytest.mark.parametrize("moves", [1, 2])
def test_a_process_killed_between_its_moves_leaves_one_whole_folder(tmp_path, monkeypatch, moves):
    """Killed after the given number of moves: the new or the old one is found again."""
    place, new = tmp_path / "last.ckpt", tmp_path / "last.ckpt.unfinished"
    for folder, text in ((place, "old"), (new, "new")):
        folder.mkdir()
        (folder / "shard").write_text(text)
    rename, done = os.rename, []

    def dies(*paths) -> None:
        rename(*paths)
        done.append(paths)
        if len(done) == moves:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", dies)
        put_in_place(new, place)
    put_back(place)
    assert (place / "shard").read_text() == ("old" if moves == 1 else "new")
    put_in_place(new if new.exists() else place, place) if moves == 1 else None
    assert (place / "shard").read_text() == "new"


def test_a_file_takes_the_place_of_a_folder_and_a_folder_that_of_a_file(tmp_path):
    place, new = tmp_path / "last.ckpt", tmp_path / "last.ckpt.unfinished"
    place.mkdir()
    new.write_text("file")
    put_in_place(new, place)
    assert names(tmp_path) == {"last.ckpt"} and place.read_text() == "file"
    new.mkdir()
    put_in_place(new, place)
    assert names(tmp_path) == {"last.ckpt"} and place.is_dir()
