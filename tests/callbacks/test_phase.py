"""How a stage before the step is run."""

import torch

from grao_lightning.batch import PromptBatch
from grao_lightning.callbacks.phase import clock, phase
from tests.runs import trainer


def test_a_stage_runs_in_the_steps_precision_without_gradients_and_its_times_add_up(tmp_path):
    batch = PromptBatch([], [], [], [], [], [])
    weight = torch.ones(2, 2, requires_grad=True)
    for precision, dtype in [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)]:
        before = batch.seconds.get("sample", 0.0)
        with phase(trainer(tmp_path, precision=precision), batch, "sample"):
            product = weight @ weight
        assert product.dtype == dtype and not product.requires_grad
        assert batch.seconds["sample"] > before
    assert (weight @ weight).requires_grad


def test_the_time_of_cuda_is_read_when_its_work_is_done(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    before = clock(torch.device("cpu"))
    assert not waited
    assert clock(torch.device("cuda", 1)) > before
    assert waited == [torch.device("cuda", 1)]
