"""The trial of sampling: not blind, once a model, and every failure is a fallback that is told."""

import warnings
from copy import deepcopy

import pytest
import torch
from transformers import DynamicCache

from grao_lightning import GRAOModule
from grao_lightning.faults import UserError
from grao_lightning.language_model.sharing import share_prompts, shares_prompts
from grao_lightning.sampling import trial
from grao_lightning.sampling.completions import generation_mode
from grao_lightning.sampling.trial import way_of
from grao_lightning.sampling.ways import PADDED, SAME_LENGTH, SHARED, SINGLE
from tests.language_model.architectures import build
from tests.sampling.test_architectures import PROMPTS, T, generated, ids
from tests.sampling.words import sample


def way(model):
    with generation_mode(model):
        return way_of(model)


@pytest.fixture
def trials(monkeypatch):
    """Count the trials."""
    counted = []
    tell = trial._tell

    def counting(model, *arguments):
        counted.append(model)
        tell(model, *arguments)

    monkeypatch.setattr(trial, "_tell", counting)
    return counted


def test_a_model_is_tried_once_and_again_when_its_class_or_attention_has_changed(trials):
    model = build("llama")
    share_prompts(model)
    for _ in range(3):
        sample(model, PROMPTS, 2, T)
    assert len(trials) == 1
    model.set_attn_implementation("eager")
    sample(model, PROMPTS, 2, T)
    assert len(trials) == 2
    model.__class__ = type("Other", (type(model),), {})
    sample(model, PROMPTS, 2, T)
    sample(model, PROMPTS, 2, T)
    assert len(trials) == 3


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_copy_of_a_model_that_was_tried_is_sampled_from_as_the_model_is(name, trials):
    model = build(name)
    share_prompts(model)
    found = sample(model, PROMPTS, 2, T)
    assert sample(deepcopy(model), PROMPTS, 2, T) == found
    assert len(trials) == 1


def test_a_policy_and_its_frozen_copy_are_tried_once_together(trials):
    module = GRAOModule(policy="embedded:keywords-weak")
    module.configure_model()
    for model in (module.policy, module.reference_model.model):
        sample(model, [[1, 2], [3]], 2, 3)
    assert trials == [module.policy]


def test_what_was_not_asked_to_share_prompts_does_not_and_that_is_no_warning(caplog):
    model = build("llama")
    assert way(model) is PADDED
    assert not caplog.text


def test_a_model_that_drops_out_attention_in_training_shares_prompts_in_sampling():
    fresh = build("gpt2", attn_pdrop=0.1)
    model = deepcopy(fresh)
    assert not share_prompts(model)
    assert sample(model, PROMPTS, 2, T).ids[::2] == [generated(fresh, p) for p in PROMPTS]
    assert way(model) is SHARED and not shares_prompts(model)


def test_a_model_that_shares_prompts_in_training_need_not_in_sampling(caplog):
    """Its states with a cache that is none of transformers' own are others."""
    fresh = build("llama")
    model = deepcopy(fresh)

    def shift(module, arguments, options):
        if not isinstance(options.get("cache"), DynamicCache | None):
            options["position_ids"] = options["position_ids"] * 2
        return arguments, options

    model.get_decoder().register_forward_pre_hook(shift, with_kwargs=True)
    assert share_prompts(model)
    assert sample(model, PROMPTS, 2, T).ids[::2] == [generated(fresh, p) for p in PROMPTS]
    assert way(model) is PADDED and shares_prompts(model)
    assert "not with every prompt read once: its logits differ" in caplog.text


def test_layers_that_count_in_blocks_longer_than_the_trial_get_no_padding(caplog):
    assert way(build("deepseek_v4")) is SAME_LENGTH
    assert "layers of heavily_compressed_attention count padding" in caplog.text


def test_a_model_that_selects_keys_gets_no_padding(caplog):
    model = build("llama")
    model.config.index_topk = 4
    assert way(model) is SAME_LENGTH
    assert "it selects keys" in caplog.text


def test_a_layer_that_asks_for_no_attention_while_decoding_is_seen(caplog):
    model = build("llama")
    attention = model.model.layers[1].self_attn
    own = attention.forward

    def forward(hidden_states, **options):
        if hidden_states.shape[1] == 1:
            return hidden_states, None
        return own(hidden_states, **options)

    attention.forward = forward
    assert share_prompts(model)
    assert way(model) is SINGLE
    assert "it asked for 1 attentions a token after 2 a prompt" in caplog.text


def test_single_rows_are_read_with_the_models_own_attention():
    model = build("llama")
    attention = model.model.layers[0].self_attn
    own = attention.forward

    def forward(*arguments, **options):
        output, weights = own(*arguments, **options)
        return output * (2 if attention.config._attn_implementation == "sdpa" else 1), weights

    attention.forward = forward
    assert not share_prompts(model)
    assert way(model) is PADDED


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.01), (torch.bfloat16, 1.5)])
def test_a_fault_of_decoding_is_told_from_rounding(dtype, factor):
    model = build("llama").to(dtype)

    def scale(module, arguments, options, output):
        if not isinstance(options.get("cache"), DynamicCache | None):
            output.last_hidden_state = output.last_hidden_state * factor
        return output

    model.get_decoder().register_forward_hook(scale, with_kwargs=True)
    assert share_prompts(model)
    assert way(model) is PADDED


def test_attention_that_is_not_ours_is_seen_though_the_first_ids_have_no_embedding(caplog):
    """Ids that training never saw decay to nothing; StableLM and Nemotron never ask for ours."""
    fresh = build("stablelm")
    with torch.no_grad():
        fresh.get_input_embeddings().weight[:10] = 0
    model = deepcopy(fresh)
    share_prompts(model)
    assert sample(model, PROMPTS, 2, T).ids[::2] == [generated(fresh, p) for p in PROMPTS]
    assert way(model) is PADDED, caplog.text


def test_learned_sinks_that_are_still_zero_are_no_reason_to_share():
    """They will be trained, and our attention does not take them."""
    model = build("gpt_oss, full layers")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.fill_(-1e4)
    share_prompts(model)
    assert way(model) is PADDED


@pytest.mark.parametrize("told", [True, False])
def test_windows_longer_than_the_trial_are_seen(told, monkeypatch):
    model = build("mistral", sliding_window=100, attention_dropout=0.1)
    if not told:
        monkeypatch.setattr(trial, "obstacle", lambda model: None)
    share_prompts(model)
    assert way(model) is PADDED


def test_layers_that_count_the_tokens_of_a_pass_get_no_padding(caplog):
    """Llama4's temperature of attention: from token 8192 on, here from 30 on."""
    fresh = build("llama4_text, full layers", no_rope_layers=[1, 0], attn_scale=1.0, floor_scale=30)
    model = deepcopy(fresh)
    share_prompts(model)
    prompts = [ids(length, length) for length in (45, 26, 3)]
    sampled = sample(model, prompts, 2, 2 * T).ids
    assert sampled[::2] == [generated(fresh, prompt, 2 * T) for prompt in prompts]
    assert way(model) is SAME_LENGTH


def test_a_head_that_is_replaced_after_the_trial_is_sampled_from():
    model = build("llama")
    share_prompts(model)
    sample(model, PROMPTS, 2, T)
    model.lm_head.register_forward_hook(lambda module, inputs, output: -output)
    fresh = deepcopy(model)
    fresh.set_attn_implementation("sdpa")
    assert sample(model, PROMPTS, 2, T).ids[::2] == [generated(fresh, p) for p in PROMPTS]
    assert way(model) is PADDED


def test_logits_that_are_all_the_same_prove_nothing(caplog):
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    share_prompts(model)
    assert way(model) is SINGLE


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_whatever_fails_in_a_trial_is_the_next_way_and_its_reason_is_told(
    failing, monkeypatch, caplog
):
    decode = trial._logits_of_way
    left = [SHARED, PADDED, SAME_LENGTH][failing - 1 :]

    def fail(model, way, rows):
        if way in (SHARED, PADDED, SAME_LENGTH)[:failing]:
            raise MemoryError(f"no room {way.name}")
        return decode(model, way, rows)

    monkeypatch.setattr(trial, "_logits_of_way", fail)
    model = build("llama")
    share_prompts(model)
    assert way(model) is [*left, SINGLE][1]
    assert caplog.text.count("MemoryError (no room") == failing


def test_a_model_that_fails_in_every_way_is_refused_with_the_reasons(monkeypatch):
    def fail(model, way, rows):
        raise ZeroDivisionError(f"never {way.name}")

    monkeypatch.setattr(trial, "_logits_of_way", fail)
    model = build("llama")
    share_prompts(model)
    with pytest.raises(UserError, match=r"LlamaForCausalLM cannot be sampled.*one at a time"):
        way(model)


def test_the_trial_draws_no_random_numbers_of_the_run():
    model = build("llama")
    share_prompts(model)
    before = torch.get_rng_state()
    way(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "qwen3_moe", "gpt2"])
def test_a_model_in_half_precision_is_not_refused_for_its_rounding(name):
    model = build(name).bfloat16()
    share_prompts(model)
    assert way(model) is SHARED


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_sampling_calls_nothing_that_transformers_will_drop(name):
    model = build(name)
    share_prompts(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        sample(model, PROMPTS, 2, T)


def test_a_row_that_the_model_has_no_positions_for_is_refused_before_it_is_read():
    model = build("gpt2, positions of 64")
    share_prompts(model)
    sample(model, [ids(58, 0)], 1, T)
    with pytest.raises(UserError, match=r"65 tokens.*positions for 64"):
        sample(model, [ids(4, 1), ids(59, 0)], 1, T)
