"""Figures out of run folders: pairs are of one seed, and a base is not needed."""

import json
import math

import pytest

from grao_lightning.compare import command
from grao_lightning.compare.results import FinishedRun, compare_methods, figures_of
from grao_lightning.faults import UserError


@pytest.fixture
def write(tmp_path):
    """Return a function: name, seed, outcomes -> the run's folder as `FinishedRun`."""
    from torch.utils.tensorboard import SummaryWriter

    def written(name: str, seed: int, outcomes: list[float], base: float | None = 0.25):
        folder = tmp_path / f"{name}-{seed}"
        with SummaryWriter(str(folder)) as writer:
            if base is not None:
                writer.add_scalar("val/ras", base, 0)
            writer.add_scalar("val/ras", 0.5, 10)
            writer.add_scalar("train/num_tokens", 70.0, 9)  # sampled before the tenth update
        summary = {
            "seed": seed,
            "ties_as": "loss",
            "sampled_tokens": 0,
            "seconds_per_step": {"step": 1.0},
        }
        if base is not None:
            summary["base_ras"] = {"value": base}
        (folder / "summary.json").write_text(json.dumps(summary))
        rows = [
            {"index": n, "outcome": outcome, "reward": 0.0, "length": 1}
            for n, outcome in enumerate(outcomes)
        ]
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return FinishedRun(folder)

    return written


def test_a_difference_pairs_runs_of_one_seed_also_where_others_failed(write):
    """A lost seed 0, B seed 1: only seed 2 stands on both sides."""
    runs = {
        "A": [write("A", 1, [1, 1, 1, 1]), write("A", 2, [1, 1, -1, -1])],
        "B": [write("B", 0, [-1, -1, -1, -1]), write("B", 2, [1, 1, 1, -1])],
    }
    figures = {name: figures_of(of_name, {}) for name, of_name in runs.items()}
    compare_methods(runs, figures, "A")
    assert figures["B"].difference.value == 0.25
    assert figures["A"].difference is None


def test_runs_without_a_common_seed_have_no_difference(write):
    runs = {"A": [write("A", 0, [1, -1])], "B": [write("B", 1, [1, 1])]}
    figures = {name: figures_of(of_name, {}) for name, of_name in runs.items()}
    compare_methods(runs, figures, "A")
    assert figures["B"].difference is None and figures["B"].p_adjusted is None


def test_a_method_without_an_untrained_base_has_figures_and_a_curve_that_starts_later(write):
    with_base = figures_of([write("A", 0, [1, -1])], {})
    without = figures_of([write("B", 0, [1, -1], base=None)], {})
    assert with_base.curve["steps"] == [0, 10] and with_base.curve["ras"][0] == 0.25
    assert with_base.curve["tokens"] == [0, 70]
    assert without.curve["steps"] == [10] and without.ras.value == 0.5
    assert math.isnan(without.base_ras) and math.isnan(without.nag.value)


def test_a_missing_library_is_told_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "scipy" else object()
    )
    with pytest.raises(UserError, match=r"needs scipy: .* 'grao-lightning\[compare\]'"):
        command.compare_command(["--config", str(tmp_path / "none.yaml")])
