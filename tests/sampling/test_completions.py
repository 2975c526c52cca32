"""Completions: independent of their batch, ended by every rule, told of as they grow."""

import pytest
import torch
from scipy import stats

from grao_lightning.embedded.base import keyword_tokenizer
from grao_lightning.language_model.sharing import share_prompts
from grao_lightning.sampling.completions import generation_mode, sample_completions
from grao_lightning.sampling.draw import SamplingSettings, row_uniforms
from tests.conftest import tiny_model

G, T = 3, 10
PROMPTS = [[1, 5, 6, 7, 8, 2], [1, 9, 2], [1, 10, 11, 12, 2]]
END = 3


def completions(model, prompts=PROMPTS, rows_at_once=100, first_index=0, progress=None, **options):
    settings = SamplingSettings(**{"max_new_tokens": T, "eos_ids": (END,), **options})
    uniforms = [
        row_uniforms(0, "train", 0, first_index + number, G, T) for number in range(len(prompts))
    ]
    return sample_completions(
        model,
        keyword_tokenizer(),
        prompts,
        uniforms,
        settings,
        rows_at_once=rows_at_once,
        progress=progress,
    )


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama", vocab_size=36)


def test_greedy_completions_equal_those_of_generate_by_itself(model):
    sampled = completions(model, temperature=0.0, eos_ids=())
    for number, prompt in enumerate(PROMPTS):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=T, do_sample=False, eos_token_id=-1
        )
        assert sampled.ids[number * G] == expected[0, len(prompt) :].tolist()


def test_completions_do_not_depend_on_the_batch_they_are_sampled_in(model):
    together = completions(model)
    in_parts = completions(model, rows_at_once=2)
    alone = [completions(model, [prompt], first_index=n) for n, prompt in enumerate(PROMPTS)]
    assert together.ids == in_parts.ids
    assert together.ids == [ids for part in alone for ids in part.ids]


def test_members_of_a_group_differ(model):
    first_group = completions(model).ids[:G]
    assert len({tuple(ids) for ids in first_group}) > 1


def test_every_end_of_sequence_id_ends_a_completion_and_is_its_last_token(model):
    without = completions(model, eos_ids=())
    assert all(len(ids) == T for ids in without.ids) and all(without.truncated)
    ends = (4, 5, 6, 7, 8, 9)
    for full, ids, truncated in zip(
        without.ids,
        *(getattr(completions(model, eos_ids=ends), name) for name in ("ids", "truncated")),
        strict=True,
    ):
        length = next((at + 1 for at, token in enumerate(full) if token in ends), T)
        assert ids == full[:length]
        assert truncated == (full[length - 1] not in ends)


def test_an_end_of_sequence_at_the_length_limit_is_no_truncation(model):
    full = completions(model, eos_ids=()).ids[0]
    ended = completions(model, eos_ids=(full[-1],))
    assert ended.ids[0][-1] == full[-1] and not ended.truncated[0]


def test_a_stop_string_ends_a_completion_and_is_left_out_of_its_text(model):
    words = completions(model, eos_ids=()).texts[0].split()
    stop = f"{words[2]} {words[3]}"
    stopped = completions(model, eos_ids=(), stop_strings=(stop,))
    assert stopped.texts[0].strip() == " ".join(words[:2])
    assert not stopped.truncated[0]
    assert len(stopped.ids[0]) < T


def test_the_models_own_generation_defaults_do_not_change_the_distribution(model):
    expected = completions(model).ids
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    model.generation_config.eos_token_id = 7
    try:
        assert completions(model).ids == expected
    finally:
        model.generation_config.repetition_penalty = 1.0
        model.generation_config.top_k = 50
        model.generation_config.eos_token_id = None


def test_generation_leaves_mode_and_settings_as_they_were(model):
    own_config = model.generation_config
    model.train()
    with generation_mode(model):
        assert not model.training
    assert model.training and model.generation_config is own_config
    model.eval()


def test_gradient_checkpointing_does_not_change_completions(model):
    expected = completions(model).ids
    checkpointed = tiny_model("Llama", vocab_size=36).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    assert completions(checkpointed).ids == expected


def test_the_first_of_several_stop_strings_ends_the_text(model):
    words = completions(model, eos_ids=()).texts[0].split()
    stops = (f"{words[4]} {words[5]}", f"{words[2]} {words[3]}")
    stopped = completions(model, eos_ids=(), stop_strings=stops)
    assert stopped.texts[0].strip() == " ".join(words[:2])
    # A stop string that reaches back into one that ended with the same token.
    nested = (words[3], f"{words[2]} {words[3]}")
    assert completions(model, eos_ids=(), stop_strings=nested).texts[0].strip() == " ".join(
        words[:2]
    )


@pytest.mark.parametrize("eos_ids", [(), tuple(range(3, 12))], ids=["all cut off", "most end"])
@pytest.mark.parametrize("shared", [False, True], ids=["generate", "shared"])
def test_progress_tells_after_each_position_how_many_rows_have_not_ended(shared, eos_ids):
    model = tiny_model("Llama", vocab_size=36)
    assert not shared or share_prompts(model)
    told = []
    sampled = completions(
        model, eos_ids=eos_ids, progress=lambda *now: told.append(now), rows_at_once=2 * G
    )
    lengths = [len(ids) for ids in sampled.ids]
    expected = []
    for part in (lengths[: 2 * G], lengths[2 * G :]):  # two prompts at once, then the third
        waiting = len(lengths) - 2 * G if len(part) == 2 * G else 0
        for tokens in range(1, max(part) + 1):
            expected.append((tokens, waiting + sum(length > tokens for length in part)))
    assert told == expected
    assert told[-1] == (max(lengths[2 * G :]), 0)
    assert (len(set(lengths)) > 1) == bool(eos_ids)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("shared", [False, True], ids=["generate", "shared"])
def test_sampled_tokens_follow_the_models_softmax_of_logits_over_temperature(shared, temperature):
    """First tokens, then second tokens given the first, against the model read row by row.

    The seed is fixed, so the test cannot fail by chance now and then; with another seed a right
    sampler would fall below 1e-4 with that chance, once for each of about 25 p-values.
    """
    vocabulary, draws = 12, 6000
    model = tiny_model("Llama", vocab_size=vocabulary)
    assert not shared or share_prompts(model)
    settings = SamplingSettings(max_new_tokens=2, temperature=temperature)
    prompts = [[1, 5, 6, 7, 2], [4, 3]]  # uneven, so that one of them is padded
    uniforms = [row_uniforms(0, "train", 0, number, draws, 2) for number in range(len(prompts))]
    sampled = sample_completions(
        model, keyword_tokenizer(), prompts, uniforms, settings, rows_at_once=2 * draws
    )
    pairs = torch.tensor(sampled.ids).view(len(prompts), draws, 2)

    def pvalue(context: list[int], drawn: torch.Tensor) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([context]), use_cache=False).logits[0, -1].double()
        expected = torch.softmax(logits / temperature, dim=0) * len(drawn)
        counts = torch.bincount(drawn, minlength=vocabulary)
        often = expected >= 5  # chi-square needs that many; the rest is one class
        classes = [
            torch.cat([part[often], part[~often].sum()[None]]) for part in (counts, expected)
        ]
        counts, expected = (part[classes[1] > 0] for part in classes)
        return stats.chisquare(counts, expected).pvalue

    for prompt, first, second in zip(prompts, pairs[..., 0], pairs[..., 1], strict=True):
        assert pvalue(prompt, first) > 1e-4
        common = [token for token in range(vocabulary) if (first == token).sum() >= 200]
        assert len(common) >= 4, "second tokens need enough draws behind several first ones"
        for token in common:
            assert pvalue([*prompt, token], second[first == token]) > 1e-4


def test_a_text_as_written_keeps_special_tokens_but_the_one_that_ended_it(model):
    """The tokenizer's special tokens are 0 to 3; those of its vocabulary are drawn in turn."""
    found = completions(model, eos_ids=(3,), max_new_tokens=T)
    inside = [row[:-1] if row[-1] == 3 else row for row in found.ids]
    assert any({0, 1, 2} & set(row) for row in inside), "no special token was written"
    assert any(row[-1] == 3 for row in found.ids), "none ended"
    tokenizer = keyword_tokenizer()
    assert found.written == [tokenizer.decode(row) for row in inside]
    assert found.written != found.texts
    assert found.prompt_ends == [tokenizer.decode(prompt) for prompt in PROMPTS]
