"""Models and tokenizers that Python hands over: trained in place, kept out of hyper-parameters."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grao_lightning import (
    DPOModule,
    GRAOModule,
    GRPOModule,
    PPOModule,
    PromptDataModule,
    RewardModule,
    SFTModule,
    export,
)
from grao_lightning.embedded.base import base_folder, keyword_tokenizer
from grao_lightning.faults import UserError
from grao_lightning.language_model.loading import load_classifier
from tests.conftest import tiny_model
from tests.runs import fit, largest_difference, stages, trainer, weights

SOURCE = "embedded:keywords-weak"
SAVED = {"limit_val_batches": 1, "val_check_interval": 2, "max_steps": 2}


@pytest.fixture(scope="module")
def folder(one_cache_for_all) -> str:
    return str(base_folder("keywords-weak"))


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def kept(tmp_path, module, **options):
    """Train a module for two steps, save it, and return the checkpoint's path."""
    run = trainer(tmp_path, callbacks=stages(), **{**SAVED, **options})
    run.fit(module, datamodule=PromptDataModule(validation_prompts=4))
    run.save_checkpoint(tmp_path / "kept.ckpt")
    return str(tmp_path / "kept.ckpt")


@pytest.mark.parametrize("method", [GRAOModule, GRPOModule, PPOModule, DPOModule, SFTModule])
def test_a_model_handed_over_is_trained_in_place_as_its_source_would_be(tmp_path, model, method):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    named = fit(tmp_path, module=method(policy=SOURCE, learning_rate=1e-3), max_steps=2)
    handed = fit(tmp_path, module=method(policy=model, learning_rate=1e-3), max_steps=2)
    assert handed.policy is model
    assert largest_difference(weights(named), weights(handed)) == 0.0
    assert largest_difference(before, weights(handed)) > 1e-4
    base = {name: value for name, value in handed.reference_model.model.state_dict().items()}
    assert largest_difference(before, base) == 0.0, "a copy from before training"


def test_a_backbone_handed_over_is_trained_in_place(tmp_path, folder):
    backbone, _ = load_classifier("", folder, num_labels=1)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    module = RewardModule(backbone=backbone, learning_rate=1e-3)
    path = kept(tmp_path, module)
    assert module.reward_model is backbone
    assert largest_difference(before, weights(module)) > 1e-4
    loaded = RewardModule.load_from_checkpoint(
        path, backbone=load_classifier("", folder, num_labels=1)[0]
    )
    assert largest_difference(weights(module), weights(loaded)) == 0.0
    export(path, str(tmp_path / "out"))


def test_a_reference_model_handed_over_is_frozen_and_left_alone(tmp_path, folder, model):
    base = AutoModelForCausalLM.from_pretrained(base_folder("keywords"), dtype=torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    module = GRAOModule(policy=model, reference_model=base, learning_rate=1e-3)
    fit(tmp_path, module=module, max_steps=1)
    assert module.reference_model.model is base and not any(
        p.requires_grad for p in base.parameters()
    )
    assert largest_difference(before, dict(base.state_dict())) == 0.0
    assert module.step_values["kl"] != 0, "another base than the policy's own"


def test_a_checkpoint_holds_no_object_and_goes_on_with_the_model_handed_over_again(
    tmp_path, folder, model
):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    module = GRAOModule(policy=model, tokenizer=tokenizer, learning_rate=1e-3)
    path = kept(tmp_path, module)
    hyper = torch.load(path, weights_only=True)["hyper_parameters"]
    assert hyper["policy"] == "handed over as LlamaForCausalLM"
    assert hyper["tokenizer"].startswith("handed over as ") and hyper["learning_rate"] == 1e-3
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = GRAOModule.load_from_checkpoint(path, policy=fresh, tokenizer=tokenizer)
    assert loaded.policy is fresh and loaded.learning_rate == 1e-3
    assert largest_difference(weights(module), weights(loaded)) == 0.0
    with pytest.raises(UserError, match=r"handed over as .*load_from_checkpoint\(path, policy="):
        GRAOModule.load_from_checkpoint(path)


def test_a_run_resumed_with_the_base_handed_over_again_equals_an_uninterrupted_one(
    tmp_path, model, recwarn
):
    base, spent = copy.deepcopy(model), copy.deepcopy(model)
    whole = fit(tmp_path, module=GRAOModule(policy=base, learning_rate=1e-3), max_steps=4)
    path = kept(tmp_path, GRAOModule(policy=spent, learning_rate=1e-3), limit_val_batches=0)
    recwarn.clear()
    options = {"max_steps": 4, "ckpt_path": path}
    resumed = fit(tmp_path, module=GRAOModule(policy=model, learning_rate=1e-3), **options)
    assert largest_difference(weights(whole), weights(resumed)) == 0.0
    told = "the reference model is not the one"
    assert not any(told in str(warning.message) for warning in recwarn)
    with pytest.warns(UserWarning, match=told):  # it has been trained: no base any more
        fit(tmp_path, module=GRAOModule(policy=spent, learning_rate=1e-3), **options)


def test_a_checkpoint_of_a_model_handed_over_is_exported(tmp_path, model):
    module = GRAOModule(policy=model, learning_rate=1e-3)
    export(kept(tmp_path, module), str(tmp_path / "out"))
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert largest_difference(weights(module), dict(written.state_dict())) == 0.0
    checkpoint = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    del checkpoint["source_files"]  # as where the tokenizer cannot be saved
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    with pytest.raises(UserError, match=r"--policy was handed over as .* give a hub name or fold"):
        export(str(tmp_path / "bare.ckpt"), str(tmp_path / "other"))


# -- what is refused -------------------------------------------------------------------------------


def refused(settings: dict) -> str:
    return "\n".join(GRAOModule(**settings).faults())


def test_what_is_no_model_to_train_is_refused_with_the_fix(model):
    assert "must be a source or a loaded model" in refused({"policy": torch.nn.Linear(2, 2)})
    assert "must be a causal language model; got LlamaModel" in refused({"policy": model.model})
    assert 'say reference_model="policy"' in refused({"policy": model, "reference_model": model})
    (fault,) = RewardModule(backbone=model).faults()
    assert "num_labels=1" in fault and "got LlamaForCausalLM" in fault
    assert "requires_grad_(True)" in refused({"policy": model.requires_grad_(False)})


def test_half_precision_weights_are_refused_where_small_steps_round_away(tmp_path, model):
    with pytest.raises(UserError, match=r"float32 weights .* round away in bfloat16"):
        fit(tmp_path, module=GRAOModule(policy=model.bfloat16()))


def test_a_model_without_a_tokenizer_is_refused_with_the_fix(tmp_path):
    model = tiny_model("Llama")
    with pytest.raises(UserError, match=r"model.tokenizer must be given .* pass tokenizer="):
        fit(tmp_path, module=GRAOModule(policy=model))
    model.config._name_or_path = "nowhere/to-be-found"
    with pytest.raises(UserError, match=r"model.tokenizer: cannot load 'nowhere/.* pass tokeni"):
        fit(tmp_path, module=GRAOModule(policy=model))


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(tmp_path):
    module = GRAOModule(policy=tiny_model("Llama", vocab_size=20), tokenizer=keyword_tokenizer())
    with pytest.raises(UserError, match=r"at most 20 tokens.* got 36: .*resize_token_embeddings"):
        fit(tmp_path, module=module)


def test_a_tokenizer_may_be_given_by_its_folder_alone(tmp_path):
    keyword_tokenizer().save_pretrained(tmp_path / "words")
    module = GRAOModule(policy=tiny_model("Llama"), tokenizer=str(tmp_path / "words"))
    assert fit(tmp_path, module=module, max_steps=1).tokenizer.get_vocab()["apple"] > 0


# -- whose tokenizer encodes the data --------------------------------------------------------------


def test_the_data_is_encoded_by_the_modules_tokenizer(tmp_path):
    """A forgotten tokenizer= trained on the embedded words in silence."""
    tokenizer = keyword_tokenizer()
    tokenizer.add_tokens(["zebra"])
    data = PromptDataModule(train=[{"prompt": "zebra", "completion": "zebra"}] * 8)
    module = SFTModule(policy=tiny_model("Llama"), tokenizer=tokenizer)
    callbacks = stages(scoring={"rewards": [lambda completions: [0.0] * len(completions)]})
    trainer(tmp_path, callbacks=callbacks, max_steps=1).fit(module, datamodule=data)
    batch = next(iter(data.train_dataloader()))
    assert batch.prompt_ids[0][-1] == tokenizer.get_vocab()["zebra"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tokenizer: tokenizer.add_tokens(["zebra"]), "36 tokens and 37 tokens .* 'zebra'"),
        (lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"), "chat templates"),
        (lambda tokenizer: setattr(tokenizer, "eos_token", "<pad>"), "eos_token_id is 3 in one"),
    ],
)
def test_another_tokenizer_for_the_data_is_refused(tmp_path, change, message):
    tokenizer = keyword_tokenizer()
    change(tokenizer)
    with pytest.raises(UserError, match=rf"data.tokenizer must read as .*{message}"):
        fit(tmp_path, data={"tokenizer": tokenizer})


def test_a_tokenizer_that_reads_alike_passes_whatever_it_is_called(tmp_path, folder):
    for tokenizer in (keyword_tokenizer(), "embedded:keywords", folder):
        assert fit(tmp_path, data={"tokenizer": tokenizer}, max_steps=1).step_values


def test_data_without_module_and_tokenizer_tells_what_is_needed():
    with pytest.raises(UserError, match=r"data.tokenizer must be set .*PromptDataModule\(tokeni"):
        PromptDataModule().setup("fit")
