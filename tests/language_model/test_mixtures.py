"""Mixtures of experts in float64: shared prompts in training and in sampling."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from grao_lightning.language_model.logprobs import token_logprobs
from grao_lightning.language_model.sharing import share_prompts
from grao_lightning.sampling.completions import generation_mode
from grao_lightning.sampling.trial import way_of
from grao_lightning.sampling.ways import SHARED
from tests.language_model.architectures import build
from tests.language_model.test_architectures import COEFFICIENTS, ROWS, weigh
from tests.sampling.test_architectures import PROMPTS, generated
from tests.sampling.words import sample

#: Heads of DeepSeek-V3 ask with 4 + 4 numbers; the values of its published models are smaller.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {}),
    "deepseek_v3": ("deepseek_v3", {"v_head_dim": 8}),
    "deepseek_v3, smaller values": ("deepseek_v3", {"v_head_dim": 4}),
    "deepseek_v3, larger values": ("deepseek_v3", {"v_head_dim": 12}),
    "moonlight": (
        "deepseek_v3",
        {"v_head_dim": 4, "q_lora_rank": None, "n_routed_experts": 8, "n_group": 2},
    ),
}


def double(name: str) -> Any:
    """Return an untouched model in float64, in which the grouped product of experts has no form."""
    family, options = MIXTURES[name]
    model = build(family, **options).double()
    model.set_experts_implementation("eager")
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MIXTURES)
def test_packs_of_experts_have_the_gradients_of_single_rows(name):
    alone = double(name)
    shared = deepcopy(alone)
    assert share_prompts(shared)
    logprobs = []
    for row, coefficient in zip(ROWS, COEFFICIENTS, strict=True):
        ids = torch.tensor([row.prompt_ids + row.answer_ids])
        logits = alone(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]
        found = logits.log_softmax(-1).gather(1, torch.tensor(row.answer_ids)[:, None])[:, 0]
        (-coefficient * found.mean()).backward()
        logprobs.append(found.detach())
    computed = token_logprobs(shared, ROWS, weigh=weigh)
    computed.loss.backward()
    # Positions are turned into angles in float32, also here.
    torch.testing.assert_close(torch.cat(computed.by_row()), torch.cat(logprobs), rtol=0, atol=1e-6)
    expected, got = gradients(alone), gradients(shared)
    assert expected.keys() == got.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for key, gradient in expected.items():
        size = gradient.norm().clamp(min=1e-3 * whole)  # of a gate's few numbers
        assert (got[key] - gradient).norm() <= 1e-6 * size, key


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_sample_what_generate_gives_for_each_row_alone(name):
    fresh = double(name)
    shared = deepcopy(fresh)
    assert share_prompts(shared)
    with generation_mode(shared):
        assert way_of(shared) is SHARED
    expected = [generated(fresh, prompt) for prompt in PROMPTS]
    assert sample(shared, PROMPTS, 3, 6).ids == [row for row in expected for _ in range(3)]
