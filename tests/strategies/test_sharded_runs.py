"""``--trainer.strategy fsdp2`` takes the steps of ddp, on two ranks whose passes differ."""

from pathlib import Path
from typing import Any

import pytest

from tests.encoders import tiny_encoder_folder
from tests.mixtures import mixture
from tests.strategies.launch import on_ranks, once
from tests.strategies.sharded_runs import METHODS, RUNS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what two ranks found in all runs; starting them takes longer than the rest."""

    def find(folder: Path) -> Any:
        tiny_encoder_folder(folder / "encoder")
        for part in mixture("qwen3_moe").values():
            part.save_pretrained(folder / "mixture")
        return on_ranks("sharded_runs.py", folder, *METHODS, *RUNS, "resumed", "spread", limit=300)

    return once(tmp_path_factory, "sharded_runs", find)


@pytest.mark.parametrize("case", METHODS)
def test_three_steps_of_every_method_are_those_of_ddp(found, case):
    for rank in found[case]:
        assert len(rank["norms"]) == 3 and max(rank["norms"]) < 1e-6
        assert rank["weights"] < 2e-5
        assert not rank["other_tokens"]


def test_ranks_differ_in_passes_and_one_has_no_signal(found):
    first, second = found["GRAO"]
    pairs = zip(first["signals"], second["signals"], strict=True)
    assert any(one != other for one, other in pairs)
    for case in METHODS:
        first, second = found[case]
        assert first["passes"] != second["passes"], case


@pytest.mark.parametrize("case", METHODS)
def test_validation_on_uneven_shards_has_the_figures_of_ddp(found, case):
    for rank in found[case]:
        assert rank["figures"] > 3
        assert rank["validation"] < 1e-6


@pytest.mark.parametrize("case", METHODS)
def test_a_rank_keeps_its_share_of_weights_and_moments(found, case):
    assert max(rank["share"] for rank in found[case]) < 0.5 + 0.02


@pytest.mark.parametrize("case", ["64-true", "Reward, 64-true"])
def test_in_float64_the_steps_are_those_of_ddp(found, case):
    """A reward model's new head is drawn alike, whatever the precision."""
    for rank in found[case]:
        assert max(rank["norms"]) < 1e-12 and rank["weights"] < 1e-12


@pytest.mark.parametrize(("case", "tolerance"), [("bf16-true", 0.02), ("bf16-mixed", 0.05)])
def test_in_bfloat16_the_first_step_is_that_of_ddp_but_for_rounding(found, case, tolerance):
    for rank in found[case]:
        assert rank["norms"][0] < tolerance


def test_a_run_that_goes_on_equals_one_that_was_not_stopped(found):
    for rank in found["resumed"]:
        assert rank.pop("figures") < 1e-9, "validated by itself, from the checkpoint"
        assert rank == {"weights": 0.0, "moments": 0.0, "kl_weight": 0.0, "steps": 4}


def test_copies_of_the_whole_change_no_step(found):
    for rank in found["spread"]:
        assert rank["apart"] < 2e-5 and rank["share"] == 1.0
