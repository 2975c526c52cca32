"""Every path off CPU against float64 on it: log-probabilities, gradients, tokens, attention."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from grao_lightning.batch import TokenRow
from grao_lightning.embedded.base import keyword_tokenizer
from grao_lightning.language_model import masked
from grao_lightning.language_model.logprobs import token_logprobs
from grao_lightning.language_model.packing import pack_rows
from grao_lightning.language_model.ragged import repeated
from grao_lightning.language_model.sharing import share_prompts
from grao_lightning.sampling.completions import sample_completions
from grao_lightning.sampling.draw import SamplingSettings, draw_tokens, row_uniforms
from tests.conftest import VOCABULARY, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("plain_products")]

#: Of rotary positions float32 is kept in any precision, which bounds what float64 gives.
LARGEST_ERROR = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1}
DTYPES = pytest.mark.parametrize("dtype", LARGEST_ERROR, ids=lambda dtype: str(dtype)[6:])


def model(**options: Any) -> Any:
    """Return a model whose heads are of a size that kernels of CUDA take."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny_model("Llama", max_position_embeddings=1024, **{**sizes, **options})


def rows() -> list[TokenRow]:
    """Return rows over several blocks of 128, of two shared prompts and one that is not."""
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=draw).tolist()

    prompts = [ids(150), ids(3), ids(40)]
    lengths = [[5, 90, 1, 140], [130, 2], [7]]
    return [TokenRow(p, ids(n)) for p, own in zip(prompts, lengths, strict=True) for n in own]


def computed(model: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities and the gradient of a weighted sum, of all weights together."""
    weights = torch.linspace(-1, 1, sum(len(row.answer_ids) for row in rows()), device=device)
    found = token_logprobs(model, rows(), weigh=lambda part, _: weights[part])
    found.loss.backward()
    gradient = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    return found.flat.detach().double().cpu(), gradient.cpu()


@pytest.fixture(scope="module")
def expected() -> tuple[torch.Tensor, torch.Tensor]:
    return computed(model().double(), torch.device("cpu"))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@DTYPES
@pytest.mark.parametrize("way", ["packed", "packed, part by part", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_log_probabilities_and_gradients_are_those_of_float64_on_cpu(
    device, dtype, way, checkpointing, expected, monkeypatch
):
    policy = model().to(dtype)
    if way != "padded":
        assert share_prompts(policy)
    if way == "packed, part by part":
        monkeypatch.setattr(masked, "flex_works", lambda *_: False)
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
    found = computed(policy.to(device), device)
    for own, other in zip(found, expected, strict=True):
        assert relative(own, other) < LARGEST_ERROR[dtype]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=["bf16", "16"])
def test_under_autocast_log_probabilities_and_gradients_are_near(device, precision, expected):
    policy = model().to(device)
    assert share_prompts(policy)
    with torch.autocast(device.type, precision):
        found = computed(policy, device)
    for own, other in zip(found, expected, strict=True):
        assert relative(own, other) < LARGEST_ERROR[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("depth", [64, 128])
def test_flex_attention_works_here(device, dtype, depth, monkeypatch):
    """Its trial compares outputs and gradients with a dense mask."""
    if device.type != "cuda":
        from torch.nn.attention import flex_attention as module

        monkeypatch.setattr(masked, "_flex", lambda: module.flex_attention)
        monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    masked.trial(device, dtype, 8, 2, depth)


@torch.no_grad()
def test_packs_of_many_sizes_are_compiled_a_few_times_and_attended_alike(device):
    """Beyond a limit of versions flex_attention would run uncompiled, with all scores in memory.

    Compiled on CPU too, where it knows no gradients.
    """
    draw = torch.Generator().manual_seed(0)
    torch._dynamo.utils.counters.clear()
    for number in range(1, 10):
        pack = pack_rows([TokenRow([1] * 30 * number, [2] * 25 * number)] * 3).padded(masked.BLOCK)
        parts = [
            torch.randn(1, heads, len(pack.ids), 16, generator=draw).to(device)
            for heads in (4, 2, 2)
        ]
        found, expected = (
            masked.attend(*parts, mask(pack, device), 0.25)
            for mask in (masked.block_mask, masked.parts_of)
        )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_part_by_part_gives_what_a_dense_mask_gives(device, dtype):
    pack = pack_rows(rows()).padded(masked.BLOCK)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, len(pack.ids), 64, generator=draw).to(device, dtype).requires_grad_()
        for heads in (8, 2, 2)
    )
    outputs = (
        masked.attend(query, key, value, masked.parts_of(pack, device), 0.125),
        F.scaled_dot_product_attention(
            query, repeated(key, 4), repeated(value, 4),
            attn_mask=pack.mask().to(device), scale=0.125,
        ),
    )  # fmt: skip
    both = [
        (part, *torch.autograd.grad(part, (query, key, value), torch.ones_like(part)))
        for part in outputs
    ]
    error = LARGEST_ERROR[dtype]
    torch.testing.assert_close(*both, rtol=error, atol=error)


def test_greedy_completions_are_those_of_float64_on_cpu(device):
    policy = model(vocab_size=36)
    prompts = [[1, 5, 6, 7, 8, 2], [1, 9, 2], [1, 10, 11, 12, 2]]
    uniforms = [row_uniforms(0, "train", 0, number, 2, 16) for number in range(3)]
    settings = SamplingSettings(max_new_tokens=16, temperature=0.0, eos_ids=(3,))
    found = [
        sample_completions(
            one, keyword_tokenizer(), prompts, uniforms, settings, rows_at_once=100
        ).ids
        for one in (policy.to(device).float(), policy.to("cpu").double())
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}], ids=str)
def test_tokens_are_drawn_as_on_cpu(device, options):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 1000, generator=draw)
    uniforms = torch.rand(500, dtype=torch.double, generator=draw)
    settings = SamplingSettings(1, temperature=0.7, **options)
    found = draw_tokens(logits.to(device), uniforms.to(device), settings).cpu()
    assert (found != draw_tokens(logits, uniforms, settings)).sum() <= 2, "rounding at a border"
