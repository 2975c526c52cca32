"""Activations that are computed again are those that would have been kept, and fewer are."""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM

from grao_lightning.language_model.recomputed import cheap_activations_recomputed, is_recomputed

KINDS = {
    "llama": {},
    "gemma2": {"head_dim": 32},
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4},
}


def model_of(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoConfig

    common = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = AutoConfig.for_model(kind, vocab_size=64, **(KINDS[kind] or common))
    if kind == "gemma2":
        config.update(common)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def passed(model, context) -> dict[str, torch.Tensor]:
    ids = torch.arange(2 * 200).view(2, 200) % 64
    model.zero_grad()
    with context:
        states = model(ids, use_cache=False).logits
    (states.double() ** 2).mean().backward()
    named = model.named_parameters()
    return {name: part.grad.clone() for name, part in named if part.grad is not None}


def kept_bytes(model) -> tuple[int, int]:
    """Return what autograd saves of a pass besides weights, and how much of it is recomputed."""
    weights = {part.untyped_storage().data_ptr() for part in model.parameters()}
    found: dict[int, tuple[torch.UntypedStorage, bool]] = {}

    def pack(values):
        storage = values.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage, is_recomputed(values)
        return values

    passed(model, torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values))
    sizes = [(storage.nbytes(), again) for storage, again in found.values()]
    return sum(size for size, _ in sizes), sum(size for size, again in sizes if again)


@pytest.mark.parametrize("frozen_norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_to_the_bit(kind, dtype, frozen_norms):
    model = model_of(kind, dtype)
    for name, part in model.named_parameters():
        part.requires_grad_(not (frozen_norms and ("norm" in name or "ln_" in name)))
    usual = passed(model, nullcontext())
    again = passed(model, cheap_activations_recomputed())
    assert usual and all(torch.equal(usual[name], again[name]) for name in usual)


def test_two_fifths_of_a_llamas_activations_are_not_kept():
    kept, again = kept_bytes(model_of("llama", torch.float32))
    assert again / kept > 0.4


def test_gradients_of_gradients_are_the_same():
    def second(context):
        torch.manual_seed(0)
        x = torch.randn(200, 100, dtype=torch.double, requires_grad=True)
        weight = torch.randn(100, 100, dtype=torch.double, requires_grad=True)
        with context:
            y = torch.nn.functional.silu(x) * x.sin() @ weight
        (first,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), [x, weight])

    usual, again = second(nullcontext()), second(cheap_activations_recomputed())
    for one, other in zip(usual, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("changed", ["what is kept", "what it is computed from"])
def test_a_change_in_place_is_refused(changed):
    x = torch.randn(200, 200, requires_grad=True)
    base = x + 1
    with cheap_activations_recomputed():
        y = torch.nn.functional.silu(base) @ torch.randn(200, 200, requires_grad=True)
        z = base.exp() if changed == "what is kept" else y
    (z if changed == "what is kept" else base).detach().add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        z.sum().backward()
