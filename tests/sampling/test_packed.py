"""Packed weights give what plain ones give, for as long as the model does not change."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from grao_lightning.embedded.base import keyword_tokenizer
from grao_lightning.language_model.adapters import new_adapters
from grao_lightning.language_model.lora import LoRA
from grao_lightning.language_model.sharing import share_prompts
from grao_lightning.language_model.trial import decoder_of
from grao_lightning.sampling import packed as module
from grao_lightning.sampling import shared_prompt
from grao_lightning.sampling.completions import sample_completions
from grao_lightning.sampling.draw import SamplingSettings, row_uniforms
from grao_lightning.sampling.packed import packed, product_with
from grao_lightning.sampling.trial import way_of
from grao_lightning.sampling.ways import SHARED
from tests.conftest import tiny_model

PROMPTS = [[1, 5, 6, 7, 8, 2], [1, 9]]
T = 6
pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


@pytest.fixture
def model():
    """A model whose linear modules are worth packing."""
    made = tiny_model("Llama", vocab_size=300, hidden_size=256, intermediate_size=320)
    assert share_prompts(made)
    return made


def sample(model):
    settings = SamplingSettings(max_new_tokens=T, eos_ids=())
    uniforms = [row_uniforms(0, "train", 0, number, 3, T) for number in range(len(PROMPTS))]
    return sample_completions(
        model, keyword_tokenizer(), PROMPTS, uniforms, settings, rows_at_once=64
    ).ids


def forwards(model):
    """Return the names of the modules whose forward pass is another than their class's."""
    return {name for name, part in model.named_modules() if "forward" in vars(part)}


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(300,), (1, 300), (16, 1, 300), (3, 7, 300)])
def test_a_packed_product_is_that_of_a_linear_module(shape, bias):
    weight, x = torch.randn(500, 300), torch.randn(shape)
    added = torch.randn(500) if bias else None
    y = product_with(weight, added)(x)
    assert y.shape == (*shape[:-1], 500)
    torch.testing.assert_close(y, F.linear(x, weight, added), rtol=1e-5, atol=1e-4)
    sideways = torch.randn(300, 5).t()
    torch.testing.assert_close(
        product_with(weight, added)(sideways), F.linear(sideways, weight, added),
        rtol=1e-5, atol=1e-4,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_precision_is_that_of_a_linear_module(dtype, autocast):
    weight, x = torch.randn(500, 300, dtype=dtype), torch.randn(16, 300, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        product = product_with(weight, weight[:, 0])
        y, expected = product(x), F.linear(x, weight, weight[:, 0])
    assert y.dtype == expected.dtype
    tolerance = 1e-5 if y.dtype != torch.bfloat16 else 2e-2
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=10 * tolerance)


def test_decoding_reads_packed_weights_and_gives_the_model_back(model, monkeypatch):
    way_of(model)
    seen = []

    def watched(decoder, *arguments):
        seen.append(forwards(decoder))
        return decode(decoder, *arguments)

    decode = shared_prompt._decode
    monkeypatch.setattr(shared_prompt, "_decode", watched)
    fast = sample(model)
    every = {name for name, part in decoder_of(model).named_modules()
             if isinstance(part, torch.nn.Linear) and part.weight.numel() >= 2**16}  # fmt: skip
    assert len(every) >= 5 and seen == [every] * (T - 1)
    assert not forwards(model)
    monkeypatch.setattr(module, "_worth_packing", lambda weight: False)
    assert sample(model) == fast
    assert seen[-1] == set()


def test_weights_that_have_changed_are_packed_anew(model, monkeypatch):
    before = sample(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.1)
    after = sample(model)
    monkeypatch.setattr(module, "_worth_packing", lambda weight: False)
    assert sample(model) == after != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_part_of_what_is_packed(dtype):
    model = tiny_model("Llama", vocab_size=300, hidden_size=256, intermediate_size=320).to(dtype)
    adapters = new_adapters("model.lora", model, LoRA(rank=4))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    x = torch.randn(5, 256, dtype=dtype)
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        trained = layer(x)
        with packed(model.model):
            on = layer(x)
            assert "forward" in vars(layer) and "forward" not in vars(layer.base_layer)
        with adapters.peft.disable_adapter(), packed(model.model):
            off = layer(x)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(on, trained, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(off, layer.base_layer(x), rtol=tolerance, atol=tolerance)
    assert (on - off).abs().max() > 0.1
    assert not forwards(model)


def test_the_model_is_given_back_when_decoding_fails(model):
    with pytest.raises(ZeroDivisionError), packed(model):
        assert forwards(model)
        raise ZeroDivisionError
    assert not forwards(model)


def test_the_trial_sees_a_packed_product_that_is_wrong(model, monkeypatch, caplog):
    def wrong(weight, bias):
        return lambda x: F.linear(x, weight.roll(1, 0), bias)

    monkeypatch.setattr(module, "product_with", wrong)
    assert way_of(model) is not SHARED
    assert "not with every prompt read once: its logits differ" in caplog.text
