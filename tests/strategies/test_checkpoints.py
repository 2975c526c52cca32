"""Folders of shards: whole or not there, read by any number of ranks, exported exactly."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from grao_lightning.command.export import export
from grao_lightning.faults import UserError
from grao_lightning.language_model.checkpoints import checkpoint_fault, is_sharded, read_checkpoint
from tests.runs import largest_difference
from tests.strategies import ranks

SECONDS = 120


def on_ranks(number: int, folder: Path, *runs: dict) -> subprocess.CompletedProcess[str]:
    """Carry out runs on several processes; a hang fails."""
    return subprocess.run(
        [sys.executable, ranks.__file__, str(number), str(folder), json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_cache_for_all) -> Path:
    """Return a folder of runs of four steps on two ranks.

    ``killed`` was killed while it wrote its second checkpoint, ``resumed`` went on from its first,
    ``from_file`` from the file of a single device, ``whole`` was let alone, ``failed`` failed in
    its fourth step on both ranks.
    """
    folder = tmp_path_factory.mktemp("runs")
    killed = on_ranks(2, folder, {"name": "killed", "killed_at": 4})
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert (folder / "killed/last.ckpt.unfinished").is_dir(), "it was killed while it wrote"
    ranks.run(folder, "file", ranks=1, strategy="auto", max_steps=2)
    done = on_ranks(
        2,
        folder,
        {"name": "whole", "best": {"save_weights_only": True, "export": True}},
        {"name": "resumed", "resume": str(folder / "killed/last.ckpt")},
        {"name": "from_file", "resume": str(folder / "file/last.ckpt")},
        {"name": "failed", "failing": [3, [0, 1]]},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def final(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def test_a_run_killed_while_it_saved_goes_on_as_if_it_had_not_been(runs):
    assert read_checkpoint("x", runs / "killed/last.ckpt")["global_step"] == 2
    assert largest_difference(final(runs, "whole"), final(runs, "resumed")) == 0.0
    assert {path.name for path in (runs / "whole").iterdir()} == {"last.ckpt", "step_4"}


def test_four_ranks_go_on_from_what_two_wrote(runs):
    path = str(runs / "killed/last.ckpt")
    done = on_ranks(4, runs, {"name": "four", "resume": path})
    assert done.returncode == 0, done.stderr[-2000:]
    assert largest_difference(final(runs, "whole"), final(runs, "four")) < 1e-6


def test_two_ranks_go_on_from_the_file_of_one_device(runs):
    assert (runs / "file/last.ckpt").is_file()
    assert largest_difference(final(runs, "whole"), final(runs, "from_file")) < 1e-6


@pytest.mark.parametrize("strategy", ["fsdp2", "auto"])
def test_one_rank_goes_on_from_what_two_wrote(runs, strategy):
    """With the strategy of a single device too, which reads the folder like a file."""
    path = str(runs / "killed/last.ckpt")
    ranks.run(runs, strategy, ranks=1, strategy=strategy, resume=path)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert largest_difference(final(runs, "whole"), final(runs, strategy)) < 1e-6
    assert is_sharded(runs / strategy / "last.ckpt") == (strategy == "fsdp2")


def test_folders_export_exactly_and_so_does_the_run_itself(runs, tmp_path):
    export(str(runs / "whole/last.ckpt"), str(tmp_path / "out"))
    for folder in (tmp_path / "out", runs / "whole/step_4"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert largest_difference(model.state_dict(), final(runs, "whole")) == 0.0
        assert "distributed_config" not in (folder / "config.json").read_text()
    left, right = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (tmp_path / "out", runs / "whole/step_4")
    )
    assert left == right


def test_the_best_may_be_kept_without_optimiser_states(runs, tmp_path):
    path = runs / "best.ckpt"
    assert "optimizer_states" not in read_checkpoint("x", path, optimizer_states=True)
    assert size(path) < 0.5 * size(runs / "whole/last.ckpt")
    assert checkpoint_fault("ckpt_path", str(path)) is None
    assert "holds no optimiser states" in checkpoint_fault("ckpt_path", str(path), goes_on=True)
    with pytest.raises(UserError, match="holds no optimiser states"):
        ranks.run(tmp_path, "auto", ranks=1, strategy="auto", resume=str(path))
    assert AutoModelForCausalLM.from_pretrained(runs / "best")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def spoil(folder: Path, how: str) -> None:
    if how == "cut off":
        path = folder / "__1_0.distcp"
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "damaged":
        (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-100])
    else:
        (folder / how).unlink()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (".metadata", ".metadata is missing"),
        ("meta.pt", "meta.pt is missing"),
        ("__1_0.distcp", "__1_0.distcp is missing"),
        ("cut off", "__1_0.distcp has"),
        ("damaged", ".metadata is damaged"),
    ],
)
def test_a_folder_that_is_cut_off_is_one_message(runs, tmp_path, how, told):
    folder = shutil.copytree(runs / "whole/last.ckpt", tmp_path / "bad.ckpt")
    assert checkpoint_fault("ckpt_path", str(folder)) is None
    spoil(folder, how)
    fault = checkpoint_fault("ckpt_path", str(folder))
    assert fault.startswith(f"ckpt_path: {folder} is no checkpoint of grao fit, or is cut off: ")
    assert told in fault and "\n" not in fault
    with pytest.raises(UserError, match="is cut off"):
        export(str(folder), str(tmp_path / "out"))
    with pytest.raises(UserError, match="is cut off"):
        ranks.run(tmp_path, "auto", ranks=1, strategy="auto", resume=str(folder))


# -- a rank that fails -----------------------------------------------------------------------------


def test_ranks_save_after_a_failure_only_together_and_after_the_same_step(runs):
    found = [json.loads((runs / f"joined_{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [[True, False, False], [True, False]]


def test_a_failure_of_all_ranks_leaves_the_step_before_it(runs):
    assert checkpoint_fault("x", str(runs / "failed/last.ckpt"), goes_on=True) is None
    assert read_checkpoint("x", runs / "failed/last.ckpt")["global_step"] == 3


@pytest.mark.exhaustive
def test_a_rank_that_fails_alone_ends_the_run_with_the_checkpoint_before(tmp_path):
    done = on_ranks(2, tmp_path, {"name": "alone", "failing": [3, [1]]})
    assert done.returncode != 0
    assert "rank 1 failed alone, and no rank can save without the others" in done.stderr
    assert read_checkpoint("x", tmp_path / "alone/last.ckpt")["global_step"] == 2
