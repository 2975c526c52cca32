"""Closeness in meaning, with the real all-MiniLM-L6-v2."""

import importlib.util

import pytest
import torch

from grao_lightning.faults import UserError
from grao_lightning.rewards.similarity import EmbeddingSimilarity
from tests.rewards.texts import minilm_folder


@pytest.fixture(scope="module")
def similarity() -> EmbeddingSimilarity:
    return EmbeddingSimilarity(minilm_folder(), batch_size=4)


ANSWER = "The cat sleeps on the sofa."


def test_the_closer_in_meaning_the_higher(similarity):
    texts = [ANSWER, "A kitten is napping on the couch.", "Dogs bark at night.", "Tax law is dull."]
    found = similarity(texts, [ANSWER] * 4)
    assert found[0] == 1 and found == sorted(found, reverse=True)
    assert found[1] > 0.5 > 0.3 > found[3]


def test_it_is_the_cosine_of_transformers_own_mean_pooled_states(similarity):
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm_folder()).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    other = "Dogs bark at night."
    with torch.no_grad():
        left, right = (
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            for text in (ANSWER, other)
        )
    expected = torch.cosine_similarity(left, right, dim=0).item()
    assert similarity([other], [ANSWER]) == pytest.approx([expected], abs=1e-5)


def test_a_model_that_does_not_normalise_gives_cosines_all_the_same(similarity):
    from sentence_transformers import SentenceTransformer

    texts, answers = ["Dogs bark at night.", "Tax law is dull."], [ANSWER] * 2
    expected = similarity(texts, answers)
    bare = EmbeddingSimilarity(minilm_folder())
    bare._encoder = SentenceTransformer(modules=list(similarity._encoder)[:2], device="cpu")
    assert abs(bare._encoder.encode(ANSWER)).max() > 1, "not of length 1"
    assert bare(texts, answers) == pytest.approx(expected, abs=1e-5)


def test_no_completion_beats_the_reference_answer_and_an_equal_one_ties(similarity):
    near = [ANSWER, ANSWER + " ", ANSWER.lower(), ANSWER + "\n"]
    found = similarity(near, [ANSWER] * 4)
    assert found[0] == 1.0 and max(found) == 1.0
    topics = [f"I have {number} apples." for number in range(12)]
    assert similarity(topics, topics) == [1.0] * 12, "to the last bit, which rounding misses"


def test_a_word_beside_a_long_text_scores_as_alone(similarity):
    short, long = "sleep", "the river runs past the old house " * 43  # 301 words
    answers = [ANSWER, ANSWER]
    together = similarity([short, long], answers)
    alone = [similarity([text], [ANSWER])[0] for text in (short, long)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert together[0] != pytest.approx(together[1], abs=1e-2)


def test_an_empty_completion_is_as_far_as_another_topic_and_an_empty_answer_is_missing(similarity):
    empty, no_answer, blank_answer = similarity(["", ANSWER, ""], [ANSWER, "", " \n"])
    assert empty < 0.3
    assert no_answer is None and blank_answer is None


def test_the_first_call_loads_the_model_and_leaves_the_random_numbers_alone():
    similarity = EmbeddingSimilarity(minilm_folder())
    assert similarity._encoder is None
    before = torch.random.get_rng_state()
    similarity(["a"], ["b"])
    assert similarity._encoder is not None
    assert torch.equal(before, torch.random.get_rng_state())


# Errors


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'grao-lightning\[similarity\]'"):
        EmbeddingSimilarity()


def test_arguments_are_checked_before_a_model_loads():
    pytest.importorskip("sentence_transformers")
    with pytest.raises(UserError, match=r"no such folder: \./nowhere; give.*>= 1; got 0"):
        EmbeddingSimilarity("./nowhere", batch_size=0)


@pytest.mark.parametrize("model", ["no-such-organisation/no-such-model", "empty folder"])
def test_a_model_that_cannot_be_loaded_is_told_with_what_to_give(model, tmp_path):
    pytest.importorskip("sentence_transformers")
    name = str(tmp_path) if model == "empty folder" else model
    with pytest.raises(UserError, match=r"(?s)cannot load model .*give a hub name"):
        EmbeddingSimilarity(name)(["a"], ["b"])
