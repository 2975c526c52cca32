"""Every architecture in training: log-probs and gradients of its rows one by one, or a refusal."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from grao_lightning.batch import TokenRow
from grao_lightning.language_model.attention import SHARED
from grao_lightning.language_model.logprobs import token_logprobs
from grao_lightning.language_model.sharing import share_prompts
from tests.language_model.architectures import ARCHITECTURES, END, FURTHER, VOCABULARY, build

_EXCHANGED = "its family has an attention that cannot be exchanged"
_WINDOWS = "it has layers of full_attention, sliding_attention"
_LINEAR = "it has layers of full_attention, linear_attention"
_LAYOUT = "its layers do not hand on who shares what"
_SILENT = "not all of its 2 layers ask our attention"
_TRANSFORM = "unknown way (cls.predictions.transform.dense.weight takes part)"
_DENSE = "unknown way (lm_head.dense.weight takes part)"

#: Architectures whose rows each read their own prompt in training, and what the log says of it.
REFUSED = {
    "bart": _SILENT,
    "bert": _TRANSFORM,
    "bloom": _EXCHANGED,
    "cohere2": _WINDOWS,
    "deepseek_v32, full layers": "its attention takes indices, which ours does not",
    "dory": "modeling_dory.DoryLMHead, no plain Linear)",
    "exaone4": _WINDOWS,
    "falcon": _EXCHANGED,
    "falcon_mamba": "it has layers of linear_attention",
    "gemma2": _WINDOWS,
    "gemma3_text": _WINDOWS,
    "glm_moe_dsa, full layers": "its attention takes indices, which ours does not",
    "gpt_neo": _EXCHANGED,
    "gpt_oss": _WINDOWS,
    "gpt_oss, full layers": "its attention takes s_aux, which ours does not",
    "jamba": _LINEAR,
    "lfm2": "it has layers of conv, full_attention",
    "llama4_text": "it has layers of chunked_attention",
    "mamba": "it has layers of linear_attention",
    "minimax": _LINEAR,
    "mistral, window": "it attends in a sliding window (sliding_window=8)",
    "mpt": _EXCHANGED,
    "nemotron": _LAYOUT,
    "olmo3": _WINDOWS,
    "phi3, longrope and window": "it attends in a sliding window (sliding_window=90)",
    "qwen3_next": _LINEAR,
    "recurrent_gemma": "it has layers of linear_attention, sliding_attention",
    "rwkv": _EXCHANGED,
    "stablelm": _LAYOUT,
    "vaultgemma": _WINDOWS,
    "xglm": _EXCHANGED,
    "xlm": _EXCHANGED,
}
#: The same of the architectures that only the marker `exhaustive` runs.
FURTHER_REFUSED = {
    "afmoe": "it has layers of sliding_attention",
    "bailing_hybrid": "it has layers of linear_attention",
    "beam": _WINDOWS,
    "big_bird": _TRANSFORM,
    "blenderbot-small": _SILENT,
    "camembert": _DENSE,
    "cohere2_moe": "it has layers of sliding_attention",
    "cpmant": _EXCHANGED,
    "cwm": _WINDOWS,
    "data2vec-text": _DENSE,
    "deepseek_v4": "it has layers of heavily_compressed_attention",
    "doge": "its layers attend by a mask of their own",
    "electra": "unknown way (generator_predictions.LayerNorm.weight takes part)",
    "ernie": _TRANSFORM,
    "exaone_moe": "it has layers of sliding_attention",
    "flint": "its attention takes s_aux, which ours does not",
    "gpt_neox_japanese": _EXCHANGED,
    "granite_swa": _WINDOWS,
    "granitemoe_swa": _WINDOWS,
    "hy_v4": "it has layers of indexed_attention",
    "inkling_text": "it has layers of hybrid_sliding",
    "kolibri1": "it has layers of sliding_attention",
    "lara_mini": "it has layers of linear_attention, sliding_attention",
    "lfm3": "it has layers of conv",
    "megatron-bert": _TRANSFORM,
    "mimo_v2_flash": _WINDOWS,
    "ministral": "it has layers of sliding_attention",
    "modernbert-decoder": _WINDOWS,
    "olmo_hybrid": _LINEAR,
    "openai-gpt": _EXCHANGED,
    "qwen3_5_moe_text": "it has layers of linear_attention",
    "qwen3_5_text": "it has layers of linear_attention",
    "qwen4_exp_text": "it has layers of linear_attention",
    "rembert": "unknown way (cls.predictions.dense.weight takes part)",
    "roberta": _DENSE,
    "roberta-prelayernorm": _DENSE,
    "roformer": _TRANSFORM,
    "trocr": _EXCHANGED,
    "xlm-roberta": _DENSE,
    "xlm-roberta-xl": _DENSE,
}


def groups() -> list[TokenRow]:
    """Return 14 rows of prompts of 1 to 40 tokens, in groups of 1 to 8, out of order.

    Padding and the end of sequence, the same token, stand inside and at the end.
    """
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=generator).tolist()

    rows = []
    for length, size in ((1, 3), (40, 2), (7, 8), (18, 1)):
        prompt = [*ids(length - 1), 5]
        if length == 7:
            prompt[3] = END
        rows += [TokenRow(prompt, [*ids(1 + 5 * at % 11), END]) for at in range(size)]
    return rows[::2] + rows[1::2]


ROWS = groups()
COEFFICIENTS = torch.linspace(-1, 1, len(ROWS))


def one_by_one(name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return what an untouched model gives for each row alone: log-probs, and their gradient."""
    logprobs, gradients = [], {}
    fresh = build(name)
    for row, coefficient in zip(ROWS, COEFFICIENTS, strict=True):
        model = deepcopy(fresh)  # some keep frequencies of what they have read
        ids = torch.tensor([row.prompt_ids + row.answer_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]
        found = logits.log_softmax(-1).gather(1, torch.tensor(row.answer_ids)[:, None])[:, 0]
        (-coefficient * found.mean()).backward()
        logprobs.append(found.detach())
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[key] = gradients.get(key, 0) + parameter.grad
    return logprobs, gradients


def weigh(part: slice, logprobs: Tensor) -> Tensor:
    lengths = torch.tensor([len(row.answer_ids) for row in ROWS])
    return (COEFFICIENTS / lengths).repeat_interleave(lengths)[part]


def assert_near(found: Any, expected: dict[str, Tensor]) -> None:
    """Compare gradients, each by its own size unless that is a rounding error of the whole."""
    whole = torch.stack([part.norm() for part in expected.values()]).norm()
    gradients = {key: p.grad for key, p in found.named_parameters() if p.grad is not None}
    assert all(key in gradients for key in expected)
    for key, gradient in gradients.items():
        against = expected.get(key, torch.zeros_like(gradient))
        assert (gradient - against).norm() <= 1e-4 * against.norm().clamp(min=1e-3 * whole), key


EVERYTHING = [
    *ARCHITECTURES,
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in FURTHER),
]


@pytest.mark.parametrize("name", EVERYTHING)
def test_logprobs_and_gradients_are_those_of_single_rows(name, caplog):
    reason = (REFUSED | FURTHER_REFUSED).get(name)
    logprobs, gradients = one_by_one(name)
    model = build(name)
    own = model.config._attn_implementation
    assert share_prompts(model) == (reason is None), caplog.text
    assert model.config._attn_implementation == (SHARED if reason is None else own)
    assert (reason or "") in caplog.text
    computed = token_logprobs(model, ROWS, weigh=weigh)
    for found, expected in zip(computed.by_row(), logprobs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    computed.loss.backward()
    assert_near(model, gradients)
    if model.supports_gradient_checkpointing:
        model.zero_grad()
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        token_logprobs(model, ROWS, weigh=weigh).loss.backward()
        assert_near(model, gradients)


def test_the_page_of_architectures_is_what_its_command_writes():
    from tests.language_model.architectures_page import PAGE, page

    def table(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("|")]

    assert table(PAGE.read_text()) == table(page())
