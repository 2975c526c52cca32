"""Whole comparisons: figures, resuming, failures, the report."""

import base64
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from grao_lightning.compare.command import compare_command

STEPS = 6
PLAN = {
    "jobs": 2,
    "seeds": [0, 1],
    "against": "GRAO",
    "cases": {
        "weak base": {
            "model.init_args.policy": "embedded:keywords-weak",
            "trainer.max_steps": STEPS,
            "trainer.val_check_interval": 2,
            "data.validation_prompts": 24,
            "last_checkpoint.every_n_train_steps": 2,
        }
    },
    "methods": {
        "GRAO": {"config": "configs/quickstart.yaml"},
        "SFT": {"config": "configs/sft.yaml", "settings": {"data.prompts_per_step": 8}},
    },
    "sweep": {
        "seeds": [7],
        "trials": {
            "GRAO": [{"model.init_args.learning_rate": rate} for rate in (1e-3, 1e-5)],
            "SFT": [{"model.init_args.learning_rate": rate} for rate in (1e-3, 1e-5)],
        },
    },
    "studies": {
        "sign": {
            "case": "weak base",
            "entries": {
                "gated": {"method": "GRAO"},
                "literal": {"method": "GRAO", "settings": {"model.init_args.gate": False}},
            },
        }
    },
}


def start(repository, folder: Path, **changes) -> subprocess.Popen:
    """Start ``grao compare`` in a process group of its own."""
    folder.mkdir(exist_ok=True)
    plan = folder / "plan.yaml"
    plan.write_text(yaml.safe_dump({**PLAN, "output": str(folder), **changes}))
    return subprocess.Popen(
        [sys.executable, "-m", "grao_lightning", "compare", "--config", plan],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def flat(content, name="") -> dict[str, object]:
    """Return results by dotted name, without what the clock decides."""
    if isinstance(content, dict):
        parts = content.items()
    elif isinstance(content, list):
        parts = enumerate(content)
    else:
        return {} if "seconds" in name or "minutes" in name else {name: content}
    return {key: value for at, part in parts for key, value in flat(part, f"{name}.{at}").items()}


def runs(folder: Path, label: str) -> list[Path]:
    return sorted((folder / "runs").glob(f"{label}*"))


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory):
    """A whole comparison's folder and what it printed."""
    repository = Path(request.config.rootpath)
    folder = tmp_path_factory.mktemp("compare") / "whole"
    process = start(repository, folder)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-3000:]
    return folder, printed


def test_the_table_is_what_the_answers_say(finished):
    folder, _ = finished
    for method, figures in results(folder)["cases"]["weak base"].items():
        wins = []
        for seed in (0, 1):
            rate = figures["settings"]["model.init_args.learning_rate"]
            (run,) = (
                run
                for run in runs(folder, f"{method}-weak-base-seed-{seed}-")
                if settings_of(run) == {**figures["settings"]}
            )
            rows = [json.loads(line) for line in (run / "answers.jsonl").open()]
            assert rate in (1e-3, 1e-5)
            assert len(rows) == 24
            wins.append([row["reward"] > row["reference_answer_reward"] + 0.02 for row in rows])
            summary = json.loads((run / "summary.json").read_text())
            assert summary["ras"]["value"] == pytest.approx(np.mean(wins[-1]))
            assert summary["seed"] == seed and summary["steps"] == STEPS
        assert figures["ras"]["value"] == pytest.approx(np.mean(wins))
        assert figures["ras_by_seed"] == pytest.approx([np.mean(row) for row in wins])
        assert (figures["seeds"], figures["prompts"]) == (2, 24)
        assert figures["curve"]["steps"] == [0, 2, 4, 6]
        assert figures["curve"]["ras"][-1] == pytest.approx(figures["ras"]["value"])
        assert figures["curve"]["ras"][0] == pytest.approx(figures["base_ras"])


def settings_of(run: Path) -> dict:
    return json.loads((run / "finished.json").read_text())["settings"]


def test_the_difference_is_paired_and_grao_has_none(finished):
    methods = results(finished[0])["cases"]["weak base"]
    assert methods["GRAO"]["difference"] is None
    gap = methods["SFT"]["ras"]["value"] - methods["GRAO"]["ras"]["value"]
    assert methods["SFT"]["difference"]["value"] == pytest.approx(gap)
    assert methods["SFT"]["p_adjusted"] == methods["SFT"]["difference"]["p"]


def test_the_sweep_decides_by_its_own_seed(finished):
    folder, _ = finished
    content = results(folder)
    for method in ("GRAO", "SFT"):
        trials = [trial for trial in content["sweep"] if trial["method"] == method]
        assert [trial["value"] for trial in trials] == sorted(
            (trial["value"] for trial in trials), reverse=True
        )
        chosen = content["cases"]["weak base"][method]["settings"]
        assert trials[0]["settings"].items() <= chosen.items()
        assert len(runs(folder, f"{method}-weak-base-seed-7-")) == 2


def test_a_studys_entry_that_equals_the_tables_is_not_run_again(finished):
    folder, printed = finished
    assert not list(folder.glob("runs/*/checkpoints")), "kept without being asked for"
    study, table = results(folder)["studies"]["sign"], results(folder)["cases"]["weak base"]
    assert study["gated"]["ras"] == table["GRAO"]["ras"]
    assert study["literal"]["settings"]["model.init_args.gate"] is False
    assert "runs 6/6" in printed  # 2 methods + 1 new entry, 2 seeds each


def test_the_report_holds_tables_pictures_and_answers_in_one_file(finished):
    folder, printed = finished
    page = (folder / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 3  # curves, terms, study
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for data in pictures)
    assert "http" not in page
    assert page.count("class=prompt") == 10
    assert page.count("<td>untrained base</td>") == 10
    markdown = (folder / "report.md").read_text()
    assert markdown in printed
    ras = 100 * results(folder)["cases"]["weak base"]["SFT"]["ras"]["value"]
    assert re.search(rf"\| SFT +\| {ras:.1f} \[", markdown)
    with (folder / "results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["name"] for row in rows] == ["GRAO", "SFT"]
    assert 100 * float(rows[1]["ras_value"]) == pytest.approx(ras)


def test_a_run_in_a_worker_equals_grao_fit_in_a_process_of_its_own(finished, repository, tmp_path):
    """The worker had carried out other runs before."""
    folder, _ = finished
    run = runs(folder, "SFT-weak-base-seed-1-")[0]
    arguments = [f"--{name}={value}" for name, value in settings_of(run).items()]
    subprocess.run(
        [
            *(sys.executable, "-m", "grao_lightning", "fit", "--config", "configs/sft.yaml"),
            *arguments,
            "--seed_everything=1",
            f"--trainer.logger.init_args.save_dir={tmp_path}",
        ],
        cwd=repository,
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )
    ours, alone = (
        [json.loads(line) for line in (where / "answers.jsonl").open()]
        for where in (run, tmp_path / "version_0")
    )
    assert ours == alone


def test_killed_and_started_again_it_gives_the_same_table(finished, repository, tmp_path):
    folder = tmp_path / "killed"
    process = start(repository, folder, jobs=1)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:  # in the middle of a run that has a checkpoint
        half = [
            file
            for file in folder.glob("runs/GRAO*seed-0*/checkpoints/last.ckpt")
            if not (file.parents[1] / "finished.json").exists()
        ]
        if half or process.poll() is not None:
            break
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert half, "nothing was cut off"
    assert not (folder / "results.json").exists()
    before = {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/finished.json")}
    assert before, "nothing had finished"
    start(repository, folder, jobs=1).communicate(timeout=300)
    assert "Restor" in (half[0].parents[1] / "log.txt").read_text(), (
        "it went on from its checkpoint"
    )
    ours, theirs = flat(results(folder)), flat(results(finished[0]))
    assert {
        name: (ours.get(name), theirs.get(name))
        for name in ours.keys() | theirs.keys()
        if ours.get(name) != theirs.get(name)
    } == {}
    assert all(file.stat().st_mtime_ns == when for file, when in before.items())


def test_a_run_that_fails_is_told_and_the_others_go_on(repository, tmp_path, monkeypatch, capsys):
    methods = {
        "GRAO": PLAN["methods"]["GRAO"],
        "broken": {"config": "configs/quickstart.yaml", "settings": {"model.init_args.betaa": 1}},
    }
    changes = {"methods": methods, "sweep": None, "studies": {}, "seeds": [0]}
    process = start(repository, tmp_path / "f", **changes, keep_checkpoints=True)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "broken weak base seed 0" in printed.replace("-", " ") and "betaa" in printed
    content = results(tmp_path / "f")
    assert list(content["cases"]["weak base"]) == ["GRAO"]
    assert len(content["failed"]) == 1
    assert (runs(tmp_path / "f", "GRAO")[0] / "checkpoints" / "last.ckpt").exists()
    assert "Failed runs" in (tmp_path / "f" / "report.md").read_text()


def test_the_report_alone_is_made_again_from_what_there_is(
    finished, repository, monkeypatch, capsys
):
    folder, _ = finished
    monkeypatch.chdir(repository)
    before = results(folder)
    (folder / "report.html").unlink()
    plan = str(folder / "plan.yaml")
    assert compare_command(["--config", plan, "--report_only"]) == 0
    assert (folder / "report.html").exists()
    assert results(folder) == before
