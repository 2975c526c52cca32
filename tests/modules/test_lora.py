"""Runs that train adapters: what they leave alone, what they keep, and what is made of it."""

import json
import os

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from grao_lightning import (
    DPOModule,
    GRAOModule,
    GRPOModule,
    PPOModule,
    RewardModule,
    SFTModule,
    export,
)
from grao_lightning.embedded.base import base_folder
from grao_lightning.language_model.loading import load_model
from grao_lightning.language_model.logprobs import token_logprobs
from tests.runs import fit, largest_difference, stages, weights

SOURCE = "embedded:keywords-weak"
ALIGNMENT = (GRAOModule, GRPOModule, PPOModule, DPOModule, SFTModule)


def adapted(method=GRAOModule, lora=None, **options):
    source = method.source_setting.rpartition(".")[2]
    settings = {"rank": 4, **(lora or {})}
    return method(**{source: SOURCE, "learning_rate": 1e-3, "lora": settings, **options})


def kept(tmp_path, module, **options):
    """Train for two steps and return the module and the checkpoint's path."""
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, filename="two")
    callbacks = [*stages(), saver]
    fit(tmp_path, module=module, callbacks=callbacks, enable_checkpointing=True,
        **{"max_steps": 2, **options})  # fmt: skip
    return str(tmp_path / "saved/two.ckpt")


def base_weights(model) -> dict[str, torch.Tensor]:
    """Return the weights below the adapters by their names in the model alone."""
    return {
        name.replace(".base_layer", ""): value.detach().clone()
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }


class Rows(Callback):
    """Keeps the rows of the newest batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.rows = batch.reference_answer_rows()


@pytest.mark.parametrize("method", ALIGNMENT)
def test_the_base_stays_as_it_is_and_is_the_reference_model_bit_for_bit(tmp_path, method):
    base, seen = load_model("", SOURCE), Rows()
    module = adapted(method)
    fit(tmp_path, module=module, callbacks=[*stages(), seen], max_steps=0)
    assert module.reference_model.model is module.policy, "no second copy"
    fit(tmp_path, module=module, callbacks=[*stages(), seen], max_steps=3)
    trained = [name for name, value in module.named_parameters() if value.requires_grad]
    assert all("lora_" in name or name.startswith("value_head") for name in trained)
    optimised = [id(p) for g in module.trainer.optimizers[0].param_groups for p in g["params"]]
    assert sorted(optimised) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    assert largest_difference(dict(base.state_dict()), base_weights(module.policy)) == 0.0
    from grao_lightning.language_model.sharing import share_prompts

    share_prompts(base)
    expected = token_logprobs(base, seen.rows).flat
    modes = [part.training for part in module.policy.modules()]
    frozen = token_logprobs(module.reference_model, seen.rows).flat
    assert torch.equal(frozen, expected)
    assert [part.training for part in module.policy.modules()] == modes
    own = token_logprobs(module.policy, seen.rows).flat.detach()
    assert (own - expected).abs().max() > 1e-3, "the policy itself has moved"
    assert trained == [name for name, value in module.named_parameters() if value.requires_grad]


@pytest.mark.parametrize("method", [GRAOModule, PPOModule, RewardModule])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_checkpoint_holds_what_is_trained_and_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path, method, dropout
):
    def made():
        return adapted(method, {"dropout": dropout})

    whole = fit(tmp_path, module=made(), max_steps=4)
    path = kept(tmp_path, made())
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all("lora_" in name or "score" in name or "value_head" in name for name in state)
    resumed = fit(tmp_path, module=made(), max_steps=4, ckpt_path=path)
    assert largest_difference(weights(whole), weights(resumed)) == 0.0
    loaded = method.load_from_checkpoint(path)
    assert set(state) == {name for name, value in loaded.named_parameters() if value.requires_grad}
    for name, value in loaded.named_parameters():
        assert not value.requires_grad or torch.equal(value, state[name])


def test_a_checkpoint_takes_at_most_four_times_the_adapter(tmp_path):
    source = str(tmp_path / "base")
    path = kept(tmp_path, adapted(lora={"rank": 64}))
    export(path, str(tmp_path / "adapter"), adapter=True)
    size = os.path.getsize(tmp_path / "adapter/adapter_model.safetensors")
    assert os.path.getsize(path) <= 4 * size, source


@pytest.mark.parametrize("method", [GRAOModule, RewardModule])
def test_an_exported_model_is_the_trained_one_merged_or_as_base_and_adapter(tmp_path, method):
    from peft import PeftModel

    module = adapted(method)
    path = kept(tmp_path, module, max_steps=2)
    export(path, str(tmp_path / "merged"))
    export(path, str(tmp_path / "adapter"), adapter=True)
    trained = module.trained_model.eval()
    auto = AutoModelForCausalLM if method is GRAOModule else AutoModelForSequenceClassification
    ids = torch.arange(4, 24)[None]
    expected = trained(input_ids=ids).logits
    merged = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not any("lora" in name for name in merged.state_dict())
    options = {} if method is GRAOModule else {"num_labels": 1}
    base = auto.from_pretrained(base_folder("keywords-weak"), dtype=torch.float32, **options)
    base.config.pad_token_id = merged.config.pad_token_id
    before = base(input_ids=ids).logits
    with_adapter = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    for model in (merged, with_adapter):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
    assert (before - expected).abs().max() > 1e-4
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == SOURCE
