"""Adapters on models whose weights are dealt out over two ranks, against one process."""

import pytest
import torch

from grao_lightning import GRAOModule, export
from grao_lightning.language_model.loading import load_model
from grao_lightning.language_model.logprobs import token_logprobs
from tests.runs import fit, largest_difference
from tests.strategies.adapted_runs import ROWS, RUNS, SOURCE, trained, weights
from tests.strategies.launch import on_ranks


def test_adapters_on_two_ranks_are_trained_as_in_one_process(tmp_path):
    adapter = str(tmp_path / "adapter")
    start = GRAOModule(policy=SOURCE, lora={"rank": 4}, learning_rate=1e-3)
    fit(tmp_path, module=start, max_steps=1)
    (tmp_path / "adapter").mkdir()
    start.adapters.save(tmp_path / "adapter", SOURCE)
    found = on_ranks("adapted_runs.py", tmp_path, adapter)
    for name in RUNS:
        module, norms = trained(tmp_path, name, adapter)
        assert found[name]["norms"] == pytest.approx(norms, rel=1e-6), name
        assert largest_difference(torch.load(tmp_path / f"{name}.pt"), weights(module)) < 2e-5, name
    assert found["grao"]["off base"] == 0.0
    assert found["grao"]["share"] <= 0.52
    assert found["resume"] == 0.0

    # the checkpoint is that of the second step, and holds the adapters alone
    export(str(tmp_path / "two.ckpt"), str(tmp_path / "out"))
    second, _ = trained(tmp_path, "grao", adapter, max_steps=2)
    written = load_model("", str(tmp_path / "out"), dtype=torch.double)
    own = token_logprobs(second.policy.eval(), ROWS).flat.detach()
    assert (token_logprobs(written, ROWS).flat.detach() - own).abs().max() < 1e-5
