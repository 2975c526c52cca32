"""What does not go with weights that are dealt out is refused before a model loads."""

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

from grao_lightning import DPOModule, GRAOModule, PromptDataModule, ShardedStrategy
from grao_lightning.data.sampler import even_batches
from grao_lightning.faults import UserError
from grao_lightning.language_model.lora import LoRA
from grao_lightning.modules.checks import run_faults
from tests.conftest import tiny_model
from tests.runs import stages, trainer


def faults(tmp_path, module=None, **options) -> str:
    run = trainer(tmp_path, callbacks=stages(), **{"strategy": "fsdp2", "devices": 1, **options})
    module = module or GRAOModule()
    return "\n".join(run_faults(run, module, PromptDataModule(), "fit"))


def test_the_name_of_the_strategy_is_known_and_faultless(tmp_path):
    assert faults(tmp_path) == ""


@pytest.mark.parametrize(
    ("module", "options", "told"),
    [
        (
            GRAOModule(master_weights=True),
            {},
            "model.master_weights must be false with trai",
        ),
        (None, {"precision": "16-true"}, "trainer.precision must be one of 32-true, 64-true, bf16"),
        (None, {"strategy": ShardedStrategy(replicas=2)}, "replicas must divide the 1 devices"),
        (
            GRAOModule(lora=LoRA()),
            {"strategy": ShardedStrategy(replicas=2), "devices": 4},
            "trainer.strategy.replicas must be 1 with model.lora: .*got 2",
        ),
        (None, {"strategy": ModelParallelStrategy()}, "must be auto, ddp or fsdp2.*use fsdp2"),
    ],
    ids=["masters", "float16", "copies", "copies of adapters", "Lightning's own"],
)
def test_settings_that_do_not_go_with_it_are_refused_with_the_fix(tmp_path, module, options, told):
    if module is not None:
        options = {"precision": "bf16-true", **options}
    with pytest.raises(AssertionError, match=told):
        assert faults(tmp_path, module, **options) == ""


@pytest.mark.parametrize("setting", ["policy", "reference_model"])
def test_a_model_that_is_handed_over_whole_is_refused(tmp_path, setting):
    module = DPOModule(**{setting: tiny_model("Llama")}, tokenizer="embedded:keywords")
    told = faults(tmp_path, module)
    assert f"model.{setting} must be a name, folder or file with trainer.strategy=fsdp2" in told
    assert "save it with save_pretrained(folder)" in told


@pytest.mark.parametrize("num_rows", [2, 3, 9, 16, 17])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_ranks_validate_each_row_once_in_equally_many_batches(num_rows, size):
    shares = [even_batches(num_rows, size, rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(row for share in shares for part in share for row in part) == [*range(num_rows)]
    assert len(shares[0]) == len(shares[1])
    lengths = [len(part) for share in shares for part in share]
    assert min(lengths) > 0 and max(lengths) <= size + (size == 1)


def test_fewer_rows_than_ranks_are_refused(tmp_path):
    data = PromptDataModule(validation_prompts=1)
    data.trainer = trainer(tmp_path, strategy="fsdp2", devices=2)
    data.examples["validation"] = [None] * 5
    with pytest.raises(UserError, match=r"data.validation_prompts must be at least 2 .*; got 1"):
        data.val_dataloader()
