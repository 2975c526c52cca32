"""Adapters that are added in one pass are peft's."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear

from grao_lightning.language_model.adapted_linear import add_in_one_pass


def pair(dtype=torch.float32, adapters=torch.float32, **settings):
    """Return a model with peft's adapters, and its copy that adds them in one pass."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.SiLU(), torch.nn.Linear(40, 8))
    config = LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False, **settings)
    theirs = get_peft_model(model.to(dtype), config, autocast_adapter_dtype=False)
    for name, part in theirs.named_parameters():
        if "lora_" in name:
            part.data = part.data.to(adapters)
    ours = deepcopy(theirs)
    add_in_one_pass(ours)
    assert all(type(part) is not Linear for part in ours.modules())
    return theirs, ours


def outcome(model, x, context=None):
    torch.manual_seed(1)
    with context or nullcontext():
        y = model(x)
    y.float().pow(2).sum().backward()
    return y, {name: part.grad for name, part in model.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"lora_bias": True},
                                      {"use_dora": True}])  # fmt: skip
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)])
def test_output_and_gradients_are_pefts(settings, shape):
    theirs, ours = pair(torch.double, torch.double, **settings)
    x = torch.randn(shape, dtype=torch.double)
    (one, first), (other, second) = outcome(theirs, x), outcome(ours, x)
    torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
    assert first.keys() == second.keys() and len(first) >= 4
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_is_pefts(dtype, autocast):
    theirs, ours = pair(dtype)
    x = torch.randn(6, 24, dtype=dtype)
    contexts = [torch.autocast("cpu", torch.bfloat16) if autocast else None for _ in range(2)]
    (one, first), (other, second) = outcome(theirs, x, contexts[0]), outcome(ours, x, contexts[1])
    assert one.dtype == other.dtype
    torch.testing.assert_close(other, one, rtol=0.02, atol=0.02)
    assert {name: grad.dtype for name, grad in first.items()} == {
        name: grad.dtype for name, grad in second.items()
    }


def test_switched_off_or_merged_it_is_what_peft_makes_of_it():
    theirs, ours = pair()
    x = torch.randn(3, 24)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(theirs(x), ours(x))
    theirs.merge_adapter()
    ours.merge_adapter()
    assert torch.equal(theirs(x), ours(x))
