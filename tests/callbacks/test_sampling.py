"""What the sampling stage asks of the sampler: settings, randomness, who answers."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from grao_lightning.batch import Completions, PromptBatch
from grao_lightning.callbacks import sampling as stage
from grao_lightning.callbacks.sampling import GroupSampling
from grao_lightning.embedded.base import keyword_tokenizer
from grao_lightning.language_model.loading import eos_ids
from grao_lightning.sampling.draw import SamplingSettings, row_uniforms
from tests.runs import trainer_at


def prompts(*indices: int) -> PromptBatch:
    number = len(indices)
    return PromptBatch(
        indices=list(indices),
        prompt_ids=[[1, 5, 2]] * number,
        prompts=["q"] * number,
        reference_answer_ids=[[5, 3]] * number,
        reference_answers=["y"] * number,
        columns=[{}] * number,
    )


@pytest.fixture
def module() -> SimpleNamespace:
    return SimpleNamespace(
        policy="the policy",
        reference_model="the base",
        policy_source="embedded:keywords-random",
        tokenizer=keyword_tokenizer(),
        eos_ids=lambda: (3,),
        samples=True,
        trains_on_groups=True,
    )


@pytest.fixture
def calls(monkeypatch) -> list[SimpleNamespace]:
    """What the sampler was called with; it answers with two tokens, every other one cut off."""
    made: list[SimpleNamespace] = []

    def sample(model, tokenizer, prompt_ids, uniforms, settings, **options):
        made.append(SimpleNamespace(model=model, uniforms=uniforms, settings=settings, **options))
        group_size = len(uniforms[0])
        rows = len(prompt_ids) * group_size
        ends = [number % 2 == 1 for number in range(rows)]
        return Completions([[5, 6]] * rows, ["a b"] * rows, ends, group_size)

    monkeypatch.setattr(stage, "sample_completions", sample)
    return made


def test_every_setting_reaches_the_sampler(module, calls):
    sampling = GroupSampling(
        group_size=3,
        temperature=0.3,
        top_k=4,
        top_p=0.8,
        min_p=0.1,
        max_new_tokens=5,
        stop_strings=["yarn"],
        rows_at_once=7,
    )
    sampling.on_train_batch_start(trainer_at(0), module, prompts(0), 0)
    assert calls[0].settings == SamplingSettings(
        max_new_tokens=5,
        temperature=0.3,
        top_k=4,
        top_p=0.8,
        min_p=0.1,
        eos_ids=(3,),
        stop_strings=("yarn",),
    )
    assert calls[0].rows_at_once == 7
    assert calls[0].uniforms[0].shape == (3, 5)


def test_training_draws_anew_at_every_step_from_seed_step_and_row_alone(module, calls, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    sampling = GroupSampling(group_size=2, max_new_tokens=4)
    for step, batch_idx in [(0, 0), (7, 0), (7, 5)]:
        sampling.on_train_batch_start(trainer_at(step), module, prompts(30, 40), batch_idx)
    for step, call in zip((0, 7, 7), calls, strict=True):
        for index, uniforms in zip((30, 40), call.uniforms, strict=True):
            assert torch.equal(uniforms, row_uniforms(11, "train", step, index, 2, 4))
    assert [call.model for call in calls] == ["the policy"] * 3


def test_validation_gives_policy_and_base_the_same_numbers_at_every_step(module, calls):
    sampling = GroupSampling(group_size=2, max_new_tokens=4)
    for step in (0, 50):
        sampling.on_validation_batch_start(trainer_at(step), module, prompts(30), 0)
    assert [call.model for call in calls] == ["the policy", "the base", "the policy"]
    for call in calls:
        assert torch.equal(call.uniforms[0], row_uniforms(0, "validation", 0, 30, 1, 4))


def test_a_method_that_learns_from_reference_answers_alone_samples_in_validation_only(
    module, calls
):
    module.trains_on_groups = False
    sampling = GroupSampling()
    sampling.on_train_batch_start(trainer_at(0), module, prompts(0), 0)
    assert not calls
    sampling.on_validation_batch_start(trainer_at(0), module, prompts(0), 0)
    assert len(calls) == 2


def test_the_share_cut_off_is_logged_and_spoken_of_only_above_one_half(module, calls, recwarn):
    batch = prompts(0)
    GroupSampling(group_size=5).on_train_batch_start(trainer_at(0), module, batch, 0)
    values = batch.statistics.reduced(lambda values, _: values)
    assert values["completions/cut_off"] == 0.4  # no, yes, no, yes, no
    assert values["completions/mean_length"] == 2.0
    assert not recwarn.list
    with pytest.warns(UserWarning, match="67% of the completions were cut off"):
        sampling = GroupSampling(group_size=3)
        completions = Completions([[5]] * 3, ["a"] * 3, [True, True, False], 3)
        sampling._note(completions, prompts(0), 0)


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_sampler_that_is_not_the_policy_is_warned_of(cut, recwarn):
    GroupSampling().on_fit_start(None, None)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="no longer come from the policy"):
        GroupSampling(**cut).on_fit_start(None, None)


def test_the_generation_configs_end_of_sequence_ids_count_beside_the_tokenizers(tmp_path):
    tokenizer = keyword_tokenizer()  # <eos> is 3
    assert eos_ids(str(tmp_path), tokenizer) == (3,), "many models ship no generation config"
    GenerationConfig(eos_token_id=[7, 3]).save_pretrained(tmp_path)
    assert eos_ids(str(tmp_path), tokenizer) == (3, 7)
    GenerationConfig(eos_token_id=8).save_pretrained(tmp_path)
    assert eos_ids(str(tmp_path), tokenizer) == (3, 8)
