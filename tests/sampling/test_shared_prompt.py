"""The fast path of sampling against generate."""

import warnings

import pytest
import torch

from grao_lightning.embedded.base import keyword_tokenizer
from grao_lightning.language_model.sharing import share_prompts
from grao_lightning.sampling.completions import sample_completions
from grao_lightning.sampling.draw import SamplingSettings, row_uniforms
from grao_lightning.sampling.shared_prompt import _Groups
from tests.conftest import tiny_model

PROMPTS = [[1, 5, 6, 7, 8, 2], [1, 9], [1, 10, 11, 12, 2], [4]]
T = 12


def sample(model, group_size: int, prompts=PROMPTS, **options):
    settings = SamplingSettings(**{"max_new_tokens": T, "eos_ids": (3,), **options})
    uniforms = [
        row_uniforms(0, "train", 0, number, group_size, T) for number in range(len(prompts))
    ]
    return sample_completions(
        model, keyword_tokenizer(), prompts, uniforms, settings, rows_at_once=64
    )


def both(family: str, group_size: int, **options):
    """Sample through generate and on the fast path from the same model."""
    model = tiny_model(family, vocab_size=36)
    plain = sample(model, group_size, **options)
    assert share_prompts(model)
    return plain, sample(model, group_size, **options)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mixtral", "Gemma"])
def test_greedy_completions_equal_those_of_generate_token_for_token(family):
    plain, fast = both(family, 2, temperature=0.0, eos_ids=())
    assert fast.ids == plain.ids


@pytest.mark.parametrize("group_size", [1, 2, 5, 16])
@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_sampled_completions_equal_those_of_generate_for_the_same_numbers(family, group_size):
    """Many end tokens, so that rows leave at different times and whole prompts run out."""
    plain, fast = both(family, group_size, eos_ids=(3, 4, 5, 6, 7, 8))
    assert fast.ids == plain.ids
    assert fast.truncated == plain.truncated
    assert len({len(ids) for ids in fast.ids}) > 1, "lengths must be uneven"


def test_rows_that_ended_leave_the_batch_and_so_do_prompts_without_rows(monkeypatch):
    sizes = []
    keep = _Groups.keep

    def watched(groups, kept):
        keep(groups, kept)
        keys, _values = groups._of_prompts[0]
        sizes.append((len(groups.rows), len(keys)))

    model = tiny_model("Llama", vocab_size=36)
    assert share_prompts(model)
    sample(model, 1)  # the trial is over
    monkeypatch.setattr(_Groups, "keep", watched)
    sample(model, 4, eos_ids=tuple(range(3, 12)))
    rows, prompts = zip(*sizes, strict=True)
    assert list(rows) == sorted(rows, reverse=True) and rows[-1] < 8
    assert prompts[-1] < 4


def test_each_prompt_is_read_once_whatever_the_group_size(monkeypatch):
    model = tiny_model("Llama", vocab_size=36)
    assert share_prompts(model)
    sample(model, 1)  # the trial is over
    seen = []
    decoder = model.get_decoder()
    original = decoder.forward

    def forward(*args, **kwargs):
        seen.append(kwargs["input_ids"].shape)
        return original(*args, **kwargs)

    monkeypatch.setattr(decoder, "forward", forward)
    sample(model, 16, eos_ids=())
    assert seen[0] == (4, 6), "four prompts, the longest of six tokens"
    assert seen[1:] == [(64, 1)] * (T - 1)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float64])
def test_other_precisions_sample_too(precision):
    model = tiny_model("Qwen3", vocab_size=36)
    expected = sample(model, 3, temperature=0.0)  # through generate
    assert share_prompts(model)
    fast = sample(model.to(precision), 3, temperature=0.0)
    # Rounding may turn a close call; most greedy tokens of a random model are none.
    same = sum(left == right for left, right in zip(expected.ids, fast.ids, strict=True))
    assert same >= (12 if precision == torch.float64 else 6)


def test_autocast_samples_in_lower_precision():
    model = tiny_model("Qwen3", vocab_size=36)
    assert share_prompts(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(sample(model, 3).ids)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mixtral"])
def test_the_cache_is_handed_over_by_the_name_that_the_model_knows(family):
    """Newer versions of transformers warn of the old name, and will drop it."""
    model = tiny_model(family, vocab_size=36)
    assert share_prompts(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        sample(model, 2)
