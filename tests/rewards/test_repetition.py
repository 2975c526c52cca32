"""The penalty for n-grams that come again."""

import random

import pytest

from grao_lightning.faults import UserError
from grao_lightning.rewards.repetition import RepetitionPenalty


def slow_penalty(text: str, size: int) -> float:
    """Count the n-grams that stand anywhere earlier, pair by pair."""
    words = text.lower().split()
    ngrams = [words[at : at + size] for at in range(len(words) - size + 1)]
    repeated = sum(ngram in ngrams[:at] for at, ngram in enumerate(ngrams))
    return -repeated / len(ngrams) if ngrams else 0.0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_it_is_the_share_of_ngrams_that_stand_earlier_too(size):
    draw = random.Random(size)
    texts = [" ".join(draw.choices("abcD", k=draw.randrange(20))) for _ in range(50)]
    expected = [slow_penalty(text, size) for text in texts]
    assert any(expected) and not all(expected)
    assert RepetitionPenalty(size)(texts) == pytest.approx(expected)


def test_a_word_said_k_times_is_nearly_all_repeated():
    # k - 2 equal 3-grams, all but the first a repetition.
    assert RepetitionPenalty(3)(["no " * 12]) == [-9 / 10]


def test_saying_it_again_costs_more_each_time():
    found = RepetitionPenalty(2)(["this is what I said. " * times for times in range(1, 6)])
    assert found[0] == 0 and found == sorted(found, reverse=True) and len(set(found)) == 5


def test_a_text_shorter_than_an_ngram_repeats_nothing():
    assert RepetitionPenalty(3)(["", "no", "no no", "no no no"]) == [0, 0, 0, 0]


def test_case_does_not_hide_a_repetition():
    assert RepetitionPenalty(1)(["No NO no nO"]) == [-3 / 4]


def test_characters_find_repetition_in_a_script_without_spaces():
    text = "你好你好"  # 2-grams 你好, 好你, 你好
    assert RepetitionPenalty(2, pieces="characters")([text]) == [-1 / 3]
    assert RepetitionPenalty(2)([text]) == [0]


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(UserError, match=f"ngram_size must be a whole number >= 1; got {size}"):
        RepetitionPenalty(size)


def test_unknown_pieces_are_refused():
    with pytest.raises(UserError, match="pieces must be one of words, characters; got 'tokens'"):
        RepetitionPenalty(pieces="tokens")
