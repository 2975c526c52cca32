"""The package's shape: what may import what, what users may import, how long a function may be."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import grao_lightning

_LONGEST_FUNCTION = 50

# Whoever takes a name away takes it from users' scripts and configs.
_PUBLIC = {
    "DPOModule",
    "GRAOModule",
    "GRPOModule",
    "GroupSampling",
    "GroupScoring",
    "LoRA",
    "PPOModule",
    "PromptDataModule",
    "ReferenceAwareClipping",
    "RewardModel",
    "RewardModule",
    "RewardSpec",
    "SFTModule",
    "ShardedStrategy",
    "__version__",
    "bradley_terry_loss",
    "export",
    "grao_objective",
    "group_advantages",
    "make_trainer",
}
_PUBLIC_METRICS = {
    "Estimate",
    "GainKind",
    "MeanWithInterval",
    "NormalizedAlignmentGain",
    "RelativeAdversarialScore",
    "ShareWithInterval",
    "TiesAs",
    "compare",
    "mean_interval",
    "normalized_alignment_gain",
    "relative_adversarial_score",
    "wilson_interval",
}


def _contract(folder: Path) -> subprocess.CompletedProcess[str]:
    """Hold a copy of the package against the contract in its `pyproject.toml`."""
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache"],
        cwd=folder,
        env={"PATH": "", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def copy(repository: Path, tmp_path: Path) -> Path:
    """Return a folder with a copy of the package and its contract."""
    shutil.copy(repository / "pyproject.toml", tmp_path)
    shutil.copytree(repository / "grao_lightning", tmp_path / "grao_lightning")
    return tmp_path


def test_no_import_runs_back_up(copy: Path) -> None:
    kept = _contract(copy)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    assert "0 broken" in kept.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("objectives/ratio.py", "import grao_lightning.batch", "imports point one way"),
        ("callbacks/phase.py", "import grao_lightning.modules.sft", "imports point one way"),
        ("sampling/draw.py", "import grao_lightning.rewards.missing", "imports point one way"),
        ("metrics/pairs.py", "import lightning", "pure maths imports torch alone"),
        ("language_model/head.py", "import lightning", "models and sampling know no Lightning"),
    ],
)
def test_an_import_that_runs_back_up_breaks_the_contract(
    copy: Path, file: str, line: str, broken: str
) -> None:
    path = copy / "grao_lightning" / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    result = _contract(copy)
    assert result.returncode == 1
    assert f"{broken} BROKEN" in result.stdout


def test_a_new_file_must_take_its_place_in_the_contract(copy: Path) -> None:
    (copy / "grao_lightning" / "helpers.py").write_text("")
    result = _contract(copy)
    assert result.returncode == 1
    assert "helpers" in result.stdout + result.stderr


def test_each_room_says_what_may_never_be_imported_there(repository: Path) -> None:
    rooms = [path.parent for path in (repository / "grao_lightning").glob("*/__init__.py")]
    assert len(rooms) > 10
    for room in rooms:
        said = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
        assert "never" in said and "import" in said, room.name


def test_the_top_of_the_package_has_at_most_20_rooms(repository: Path) -> None:
    top = [
        path.stem
        for path in (repository / "grao_lightning").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    ]
    assert len(top) <= 20, sorted(top)


def test_tests_mirror_the_package(repository: Path) -> None:
    rooms = {path.parent.name for path in (repository / "grao_lightning").glob("*/__init__.py")}
    tested = {path.parent.name for path in (repository / "tests").glob("*/test_*.py")}
    assert rooms <= tested, rooms - tested


def test_no_function_is_longer_than_a_screen(repository: Path) -> None:
    too_long = [
        f"{path.relative_to(repository)}: {node.name}"
        for path in (repository / "grao_lightning").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= _LONGEST_FUNCTION
    ]
    assert not too_long


def test_public_names_stay() -> None:
    assert set(grao_lightning.__all__) == _PUBLIC
    for name in _PUBLIC:
        assert getattr(grao_lightning, name) is not None


def test_public_metrics_stay() -> None:
    import grao_lightning.metrics

    assert set(grao_lightning.metrics.__all__) == _PUBLIC_METRICS
    for name in _PUBLIC_METRICS:
        assert getattr(grao_lightning.metrics, name) is not None
