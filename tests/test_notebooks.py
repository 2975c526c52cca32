"""The notebooks run from top to bottom and show what they promise."""

import re

import nbformat
import pytest
from nbclient import NotebookClient


@pytest.fixture
def quickstart(repository, tmp_path):
    """The executed notebook."""
    notebook = nbformat.read(repository / "notebooks" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit notebooks cleared"
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    return client.execute()


def test_quickstart_trains_beyond_the_reference_answers_and_plots_it(quickstart):
    outputs = [output for cell in quickstart.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    ras = next(line for line in printed.splitlines() if line.startswith("RAS %")).split()
    before, after = float(ras[-1]), float(ras[2])
    assert before < 50 < 85 < after
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1


@pytest.fixture
def comparison(repository):
    """The executed notebook on comparisons; it writes to a temporary folder."""
    notebook = nbformat.read(repository / "notebooks" / "compare_methods.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit notebooks cleared"
    where = {"metadata": {"path": str(repository / "notebooks")}}
    return NotebookClient(notebook, timeout=300, resources=where).execute()


def test_the_comparison_is_made_and_the_whole_ones_figures_are_shown(comparison):
    outputs = [output for cell in comparison.cells for output in cell.get("outputs", [])]
    data = [output.get("data", {}) for output in outputs]
    tables = ["".join(part["text/markdown"]) for part in data if "text/markdown" in part]
    made_here, on_dialogues = tables
    for method in ("GRAO", "GRPO", "DPO"):
        assert re.search(rf"^\| {method} +\| ", made_here, re.MULTILINE)
        assert f"| {method} | " in on_dialogues
    assert "| 11.0 | 1 | " in on_dialogues, "GRAO's one answer for all is told"
    assert sum("image/png" in part for part in data) == 3
    printed = "".join(output.get("text", "") for output in outputs)
    assert "ablation" in printed and "literal sign" in printed
