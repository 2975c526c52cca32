"""Every architecture in sampling: the tokens that its own generate gives a row alone."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from grao_lightning.faults import UserError
from grao_lightning.language_model.sharing import share_prompts
from grao_lightning.sampling.completions import generation_mode
from grao_lightning.sampling.draw import row_uniforms
from grao_lightning.sampling.trial import way_of
from grao_lightning.sampling.ways import PADDED, SAME_LENGTH, SHARED, SINGLE
from tests.language_model.architectures import ARCHITECTURES, END, FURTHER, VOCABULARY, build
from tests.sampling.words import sample

T = 6

#: Architectures that do not read every prompt once, by the way they are sampled in.
WAYS = {
    PADDED: {
        # other structures than full attention
        "afmoe", "beam", "cohere2", "cohere2_moe", "cwm", "exaone4", "exaone_moe", "falcon_mamba",
        "gemma2", "gemma3_text", "gpt_oss", "granite_swa", "granitemoe_swa", "inkling_text",
        "jamba", "kolibri1", "lara_mini", "lfm2", "lfm3", "llama4_text", "mamba", "mimo_v2_flash",
        "minimax", "ministral", "mistral, window", "olmo3", "olmo_hybrid",
        "phi3, longrope and window", "qwen3_next", "vaultgemma",
        # attention that takes none of ours, or gives ours what it does not take
        "bloom", "doge", "falcon", "flint", "gpt_neo", "gpt_neox_japanese", "gpt_oss, full layers",
        "mpt", "nemotron", "openai-gpt", "stablelm", "xglm",
        # heads of their own
        "bert", "big_bird", "electra", "ernie", "megatron-bert", "modernbert-decoder", "rembert",
    },
    SAME_LENGTH: {"bart", "deepseek_v4", "hy_v4", "recurrent_gemma", "roformer", "trocr"},
    SINGLE: {
        "camembert", "cpmant", "data2vec-text", "dory", "roberta", "roberta-prelayernorm", "rwkv",
        "xlm", "xlm-roberta", "xlm-roberta-xl",
    },
}  # fmt: skip
#: Architectures that cannot be sampled from, nor by their own generate, and what is said of them.
REFUSED = {
    "bailing_hybrid": "get_seq_length",  # for these four: two recurrent layers and no others
    "blenderbot-small": "IndexError",
    "deepseek_v32, full layers": "update_indexer",
    "glm_moe_dsa, full layers": "update_indexer",
    "qwen3_5_moe_text": "get_seq_length",
    "qwen3_5_text": "get_seq_length",
    "qwen4_exp_text": "get_seq_length",
}
#: Its own generate, of which training sees other probabilities.
TOLD = WAYS[SINGLE] - {"rwkv"}


def ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY - 3, (length,), generator=generator).tolist()


PROMPTS = [ids(length, seed) for seed, length in enumerate((40, 1, 3, 7, 7, 18))]
PROMPTS[3][4] = END  # which is padding too


def generated(fresh: Any, prompt: list[int], length: int = T) -> list[int]:
    """Return what an untouched model generates for a prompt alone."""
    model = deepcopy(fresh)  # some remember the rows before
    with generation_mode(model), torch.no_grad():
        tokens = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=GenerationConfig(
                max_new_tokens=length, do_sample=False, pad_token_id=END
            ),
        )
    return tokens[0, len(prompt) :].tolist()


def check(name: str, group_size: int) -> Any:
    """Compare greedy completions with those of generate and return the model they came from."""
    fresh = build(name)
    model = deepcopy(fresh)
    share_prompts(model)
    attention = model.config._attn_implementation
    sampled = sample(model, PROMPTS, group_size, T).ids
    expected = [generated(fresh, prompt) for prompt in PROMPTS]
    assert sampled == [row for row in expected for _ in range(group_size)]
    assert model.config._attn_implementation == attention
    return model


TABLE = [
    *sorted(ARCHITECTURES),
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in FURTHER),
]


@pytest.mark.parametrize("name", TABLE)
def test_greedy_completions_are_those_of_generate_for_each_row_alone(name, caplog):
    fresh = build(name)
    model = deepcopy(fresh)
    share_prompts(model)
    attention = model.config._attn_implementation
    group_size = 1 + sum(map(ord, name)) % 8
    if name in REFUSED:
        with pytest.raises(UserError, match=f"cannot be sampled from.*{REFUSED[name]}"):
            sample(model, PROMPTS, group_size, T)
        with pytest.raises((ValueError, IndexError)):
            generated(fresh, PROMPTS[0])
        return
    sampled = sample(model, PROMPTS, group_size, T).ids
    expected = [generated(fresh, prompt) for prompt in PROMPTS]
    assert sampled == [row for row in expected for _ in range(group_size)]
    assert model.config._attn_implementation == attention
    way = next((way for way, names in WAYS.items() if name in names), SHARED)
    with generation_mode(model):
        assert way_of(model) is way, caplog.text
    assert (f"are sampled {way.name}" in caplog.text) == (way is not SHARED)
    assert ("other probabilities" in caplog.text) == (name in TOLD)


# The limits of the two are 24 and 16 tokens.
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "generate"])
@pytest.mark.parametrize("name", ["phi3, longrope", "minicpm3, longrope", "llama, dynamic NTK"])
def test_rows_on_both_sides_of_a_limit_of_frequencies_and_across_it(name, shared):
    fresh = build(name)
    model = deepcopy(fresh)
    if shared:
        share_prompts(model)
    prompts = [ids(length, length) for length in (30, 5, 20, 11, 26, 14, 16, 17, 24, 25, 20)]
    for _ in range(2):  # what a model remembers of the rows before is forgotten
        sampled = sample(model, prompts, 2, 8).ids
        assert sampled[::2] == sampled[1::2] == [generated(fresh, prompt, 8) for prompt in prompts]


FAMILIES = [
    "llama", "qwen3", "mixtral", "jetmoe", "gemma2", "phi3, longrope", "llama, dynamic NTK",
    "qwen3_next", "recurrent_gemma", "rwkv", "bart",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_completion_is_a_function_of_its_prompt_and_its_numbers_alone(name):
    """Random batches, groups and ``rows_at_once``; many end tokens, so that rows leave early."""
    rng = np.random.default_rng(0)
    model = build(name)
    share_prompts(model)
    options = {"temperature": 1.0, "eos_ids": tuple(range(0, VOCABULARY, 6))}
    prompts = [ids(int(length), seed) for seed, length in enumerate(rng.integers(1, 41, 8))]
    uniforms = [row_uniforms(0, "train", 0, number, 8, T) for number in range(len(prompts))]
    alone = [
        [sample(model, [prompt], 1, T, uniforms=[row[None]], **options).ids[0] for row in rows[:4]]
        for prompt, rows in zip(prompts, uniforms, strict=True)
    ]
    assert len({len(row) for rows in alone for row in rows}) > 3, "lengths must be uneven"
    for _ in range(5):
        chosen = rng.permutation(len(prompts))[: rng.integers(1, len(prompts) + 1)]
        group_size = int(rng.integers(1, 5))
        sampled = sample(
            model, [prompts[number] for number in chosen], group_size, T,
            uniforms=[uniforms[number][:group_size] for number in chosen],
            rows_at_once=int(rng.integers(1, 65)), **options,
        ).ids  # fmt: skip
        assert sampled == [row for number in chosen for row in alone[number][:group_size]]
