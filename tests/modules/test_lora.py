"""Runs that train adapters: what they leave alone, what they keep, and what is made of it."""

import json
import os
from copy import deepcopy

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
    RewardModel,
    RewardModule,
    SFTModule,
    export,
)
from grao_lightning.batch import TokenRow
from grao_lightning.embedded.base import base_folder
from grao_lightning.faults import UserError
from grao_lightning.language_model.adapters import kept_adapters, new_adapters, saved_adapters
from grao_lightning.language_model.before_training import BeforeTraining
from grao_lightning.language_model.loading import load_model
from grao_lightning.language_model.logprobs import token_logprobs
from grao_lightning.language_model.lora import LoRA, quantization
from grao_lightning.language_model.sharing import share_prompts
from tests.conftest import tiny_model
from tests.runs import fit, largest_difference, stages, two_ranks, weights

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
    share_prompts(base)
    expected = token_logprobs(base, seen.rows).flat
    module.train()
    modes = [part.training for part in module.policy.modules()]

    def seen_inside(model):  # what needs a gradient stays so for strategies that look just now
        needs = [value.requires_grad for value in model.parameters()]
        return needs, any(part.training for part in model.modules())

    needs = [value.requires_grad for value in module.policy.parameters()]
    assert module.reference_model.inside(seen_inside) == (needs, False)
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
    path = kept(tmp_path, adapted(lora={"rank": 64}))
    export(path, str(tmp_path / "adapter"), adapter=True)
    size = os.path.getsize(tmp_path / "adapter/adapter_model.safetensors")
    assert os.path.getsize(path) <= 4 * size


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


@pytest.mark.parametrize("method", ALIGNMENT)
def test_an_adapter_goes_on_being_trained_from_where_it_was(tmp_path, method):
    """Its start, and not the model below, is then what the policy was before training."""
    seen, folder = Rows(), str(tmp_path / "adapter")
    export(kept(tmp_path, adapted(lora={"alpha": 3.0})), folder, adapter=True)
    start = load_model("", folder)
    module = adapted(method, {"rank": None}, policy=folder)
    fit(tmp_path, module=module, callbacks=[*stages(), seen], max_steps=2)
    assert module.adapters.config["r"] == 4 and module.adapters.config["lora_alpha"] == 3.0
    before = token_logprobs(start, seen.rows).flat.detach()
    frozen = token_logprobs(module.reference_model, seen.rows).flat
    own = token_logprobs(module.policy, seen.rows).flat.detach()
    torch.testing.assert_close(frozen, before, atol=1e-5, rtol=0)
    assert (own - before).abs().max() > 1e-4
    assert not any("start" in name for name in module.state_dict())


def test_an_adapter_is_merged_where_a_whole_model_is_asked_for(tmp_path):
    folder = str(tmp_path / "adapter")
    trained = adapted()
    export(kept(tmp_path, trained), folder, adapter=True)
    module = GRAOModule(policy=folder, reference_model=folder)
    seen = Rows()
    fit(tmp_path, module=module, callbacks=[*stages(), seen], max_steps=1)
    assert module.step_values["kl"] == 0.0, "one and the same model"
    expected = token_logprobs(trained.policy.eval(), seen.rows).flat.detach()
    frozen = token_logprobs(module.reference_model, seen.rows).flat
    torch.testing.assert_close(frozen, expected, atol=1e-5, rtol=0)
    assert not any("lora" in name for name in module.state_dict())


def test_an_adapter_of_a_reward_model_scores_as_the_model_it_was_trained_in(tmp_path):
    module, folder = adapted(RewardModule), str(tmp_path / "adapter")
    path = kept(tmp_path, module)
    export(path, folder, adapter=True)
    export(path, str(tmp_path / "merged"))
    texts = {"prompts": ["apple", "pear apple"], "completions": ["plum", "fig fig"]}
    found, expected = (RewardModel(str(tmp_path / name))(**texts) for name in ("adapter", "merged"))
    assert found == pytest.approx(expected, abs=1e-6) and len(set(found)) == 2
    goes_on = adapted(RewardModule, {"rank": None}, backbone=folder)
    fit(tmp_path, module=goes_on, max_steps=1)
    assert goes_on.adapters.config["r"] == 4


ROWS = [TokenRow([5, 6, 7], [9, 10, 11]), TokenRow([5, 6, 7], [12, 13])]


def drawn(family):
    """Return a small model in float64 with adapters far from zero, and these by name."""
    model = tiny_model(family).double()
    if family == "Mixtral":
        model.set_experts_implementation("eager")  # the others know no float64
    assert share_prompts(model)
    before = deepcopy(model)
    adapters = new_adapters("model.lora", model, LoRA(rank=3))
    generator = torch.Generator().manual_seed(1)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for value in trained.values():
        value.data = 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.double)
    return before, adapters, trained


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_gradients_of_adapters_are_those_of_the_models_own_loss(family, checkpointing):
    _, adapters, trained = drawn(family)
    model = adapters.peft.get_base_model()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found = token_logprobs(model, ROWS, weigh=lambda part, logprobs: torch.ones_like(logprobs))
    found.loss.backward()
    own = {name: value.grad.clone() for name, value in trained.items()}
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    for row in ROWS:
        ids = torch.tensor([row.prompt_ids + row.answer_ids])
        scores = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        (-scores.gather(1, torch.tensor(row.answer_ids)[:, None]).sum()).backward()
    for name, value in trained.items():  # the router computes in float32
        off = (own[name] - value.grad).abs().max() / value.grad.abs().max()
        assert off < 1e-6, name
    assert all(value.grad is None for value in model.parameters() if not value.requires_grad)


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_kept_adapters_are_the_same_again_and_merge_exactly(tmp_path, family):
    before, adapters, trained = drawn(family)
    model = adapters.peft.get_base_model()
    own = token_logprobs(model, ROWS).flat.detach()
    base = token_logprobs(before, ROWS).flat
    assert torch.equal(token_logprobs(BeforeTraining(model), ROWS).flat, base)
    assert (own - base).abs().max() > 0.01
    kept = kept_adapters("", deepcopy(before), adapters.config)
    kept.load({name: value.detach() for name, value in trained.items()})
    adapters.save(tmp_path, None)
    saved = saved_adapters("", deepcopy(before), str(tmp_path))
    for again in (kept, saved):
        assert (token_logprobs(again.merged(), ROWS).flat.detach() - own).abs().max() < 1e-12


def test_adapters_stay_float32_on_a_model_in_bfloat16(tmp_path):
    seen = Rows()
    module = adapted()
    callbacks = [*stages(), seen]
    fit(tmp_path, module=module, callbacks=callbacks, precision="bf16-true", max_steps=2)
    kinds = {value.dtype for value in module.policy.parameters() if value.requires_grad}
    assert kinds == {torch.float32}
    base = load_model("", SOURCE).bfloat16()
    assert largest_difference(dict(base.state_dict()), base_weights(module.policy)) == 0.0
    moved = [value for name, value in module.policy.named_parameters() if "lora_B" in name]
    assert any((value != value.bfloat16()).any() for value in moved), "not rounded in passing"


def test_two_processes_train_the_adapters_that_one_trains(tmp_path):
    options = {"precision": "64-true"}
    alone = fit(tmp_path, module=adapted(), **options)
    two_ranks(tmp_path, {}, {}, {**options, "model": {"lora": {"rank": 4}}})
    assert largest_difference(weights(alone), torch.load(tmp_path / "weights.pt")) < 1e-6


# -- what is refused, and what is told -------------------------------------------------------------


def test_a_checkpoint_of_other_adapters_is_refused_in_one_message(tmp_path):
    path = kept(tmp_path, adapted())

    def goes_on(module):
        fit(tmp_path, module=module, max_steps=3, ckpt_path=path)

    with pytest.raises(UserError, match=r"^model.lora.rank must be 4, as in the .*; got 8$"):
        goes_on(adapted(lora={"rank": 8}))
    with pytest.raises(UserError, match=r"^model.lora.alpha must be 8, as in the .*; got 5"):
        goes_on(adapted(lora={"alpha": 5.0}))
    with pytest.raises(UserError, match=r"^model.lora.target_modules must be .*; got .*q_proj"):
        goes_on(adapted(lora={"target_modules": ["q_proj"]}))
    with pytest.raises(UserError, match=r"holds adapters alone: set model.lora"):
        goes_on(GRAOModule(policy=SOURCE))
    with pytest.raises(UserError, match="must be the model that the checkpoint's adapters were"):
        goes_on(adapted(policy="embedded:keywords"))
    with pytest.raises(UserError, match="--policy must be the model that the adapter was trained"):
        export(path, str(tmp_path / "out"), policy="embedded:keywords")
    whole = kept(tmp_path / "whole", GRAOModule(policy=SOURCE))
    with pytest.raises(UserError, match=r"holds no adapters: remove model.lora"):
        fit(tmp_path, module=adapted(), max_steps=3, ckpt_path=whole)
    with pytest.raises(UserError, match="--adapter: the checkpoint holds no adapter"):
        export(whole, str(tmp_path / "out"), adapter=True)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_head_and_embeddings_take_no_adapter(tmp_path, name):
    module = adapted(lora={"target_modules": ["q_proj", name]})
    with pytest.raises(UserError, match=f"must not name the head or the embeddings.*got .*{name}"):
        fit(tmp_path, module=module, max_steps=1)


def test_a_name_of_no_module_is_refused_and_not_passed_over(tmp_path):
    module = adapted(lora={"target_modules": ["q_proj", "query"]})
    with pytest.raises(UserError, match=r"has no linear module query; .*q_proj"):
        fit(tmp_path, module=module, max_steps=1)


def test_faults_of_the_settings_are_told_together(tmp_path, monkeypatch):
    settings = {"rank": 0, "alpha": 0.0, "dropout": 1.0, "quantize": "nf3", "base": "somewhere"}
    faults = "\n".join(adapted(lora=settings, master_weights=True).faults())
    for told in (
        "model.lora.rank must be >= 1; got 0",
        "model.lora.alpha must be > 0; got 0.0",
        "model.lora.dropout must lie in [0, 1); got 1.0",
        "model.lora.quantize must be one of nf4; got 'nf3'",
        "model.lora.base has no effect unless model.policy is an adapter folder",
        "model.master_weights must be false with model.lora",
    ):
        assert told in faults
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "model.lora needs peft: pip install 'grao-lightning[lora]'" in adapted().faults()


def test_a_model_with_adapters_is_not_given_others():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_model("", SOURCE), LoraConfig(target_modules=["q_proj"]))
    (fault,) = [fault for fault in adapted(policy=model).faults() if "adapters already" in fault]
    assert "remove model.lora" in fault


def test_a_learning_rate_of_full_training_is_told(tmp_path, recwarn):
    told = "hardly moves an adapter"
    with pytest.warns(UserWarning, match=told):
        fit(tmp_path, module=adapted(learning_rate=1e-6), max_steps=1)
    recwarn.clear()
    fit(tmp_path, module=adapted(learning_rate=1e-4), max_steps=1)
    assert not any(told in str(warning.message) for warning in recwarn)


def test_adapters_of_modules_whose_weight_is_read_directly_are_told(caplog):
    options = {"state_size": 4, "intermediate_size": 48}
    targets = ["in_proj", "x_proj"]
    new_adapters("", tiny_model("Mamba", **options), LoRA(rank=2, target_modules=targets))
    assert "have no part" not in caplog.text
    targets = [*targets, "dt_proj"]  # multiplied by its weight, and never called
    new_adapters("", tiny_model("Mamba", **options), LoRA(rank=2, target_modules=targets))
    assert "2 adapters have no part in what it says" in caplog.text and "dt_proj" in caplog.text


def test_what_adapters_reach_and_that_they_drop_out_is_told(tmp_path, caplog):
    new_adapters("model.lora", tiny_model("Mixtral"), LoRA(rank=2))
    assert "its experts get adapters" in caplog.text and "get no adapter" not in caplog.text
    caplog.clear()
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    new_adapters("model.lora", tiny_model("Mixtral"), LoRA(rank=2, target_modules=attention))
    assert "% of the weights get no adapter" in caplog.text and "gate_up_proj" in caplog.text
    caplog.clear()
    fit(tmp_path, module=adapted(lora={"dropout": 0.1}), max_steps=0)
    assert "lora_dropout.default: 0.1" in caplog.text
    assert "get no adapter" not in caplog.text


# -- 4-bit weights below the adapters --------------------------------------------------------------


def test_gradients_on_4_bit_weights_are_those_on_the_same_weights_in_full(recwarn):
    """Also behind a pass without gradients, where bitsandbytes may pack its weights anew."""
    functional = pytest.importorskip("bitsandbytes.functional")
    options = quantization("nf4", torch.device("cpu"), lowered=False)
    model, whole = load_model("", SOURCE, **options), load_model("", SOURCE)
    for name, part in model.named_modules():
        state = getattr(getattr(part, "weight", None), "quant_state", None)
        if state is not None:
            full = functional.dequantize_4bit(part.weight.data, state)
            whole.get_submodule(name).weight.data = full
    gradients = []
    for one in (model, whole):
        new_adapters("model.lora", one, LoRA(rank=3))
        generator = torch.Generator().manual_seed(1)
        trained = {name: value for name, value in one.named_parameters() if value.requires_grad}
        for value in trained.values():
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
        with torch.no_grad():
            token_logprobs(BeforeTraining(one), ROWS)
        one.train()
        found = token_logprobs(one, ROWS, weigh=lambda part, logprobs: torch.ones_like(logprobs))
        found.loss.backward()
        gradients.append({name: value.grad for name, value in trained.items()})
    assert largest_difference(*gradients) < 1e-5
    assert max(value.abs().max() for value in gradients[0].values()) > 0.1
    assert not any("autograd kernel" in str(warning.message) for warning in recwarn)


def test_an_adapter_on_4_bit_weights_is_trained_kept_and_merged_into_the_whole_ones(tmp_path):
    pytest.importorskip("bitsandbytes")
    settings, seen = {"quantize": "nf4"}, Rows()
    start = adapted(lora=settings)
    fit(tmp_path, module=start, callbacks=[*stages(), seen], max_steps=0)
    before = {name: value.clone() for name, value in base_weights(start.policy).items()}
    assert before["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    whole = fit(tmp_path, module=adapted(lora=settings), max_steps=4)
    path, module = kept(tmp_path, adapted(lora=settings)), adapted(lora=settings)
    fit(tmp_path, module=module, callbacks=[*stages(), seen], max_steps=4, ckpt_path=path)
    assert largest_difference(whole.state_dict(), module.state_dict()) == 0.0
    after = base_weights(module.policy)
    whole_ones = [name for name in before if "quant_state" not in name]
    assert all(torch.equal(before[name], after[name]) for name in whole_ones)
    frozen = token_logprobs(module.reference_model, seen.rows).flat
    assert torch.equal(frozen, token_logprobs(start.policy, seen.rows).flat)

    notes = export(path, str(tmp_path / "merged"))
    assert any("full precision, not into those of nf4" in note for note in notes)
    written = load_model("", str(tmp_path / "merged"))
    expected = kept_adapters("", load_model("", SOURCE), module.adapters.config)
    state = torch.load(path, weights_only=True)["state_dict"]
    expected.load({name.removeprefix("policy."): value for name, value in state.items()})
    merged = dict(expected.merged().state_dict())
    assert largest_difference(merged, dict(written.state_dict())) < 1e-6


def test_4_bit_weights_are_refused_where_they_are_not_known_to_work(tmp_path):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match=r"trainer.precision must be one of .*; got 64-true"):
        fit(tmp_path, module=adapted(lora={"quantize": "nf4"}), precision="64-true")
    handed = adapted(lora={"quantize": "nf4"}, policy=load_model("", SOURCE))
    assert any(
        "needs a model.policy that is read from a name" in fault for fault in handed.faults()
    )
