import gzip
import importlib.util
import json
import math
import os
import pickle
import random
import time
from pathlib import Path

import pytest

from grao_lightning.metrics.outcomes import wilson_interval
from grao_lightning.rewards.preference import NGramPreference, length_alone
from grao_lightning.rewards.protocol import call_rewards, columns_asked_for

pytest.importorskip("sklearn")

POLITE = ["sorry", "please", "thanks", "kindly", "gladly"]
RUDE = ["stupid", "shut", "awful", "hate", "idiot"]
NEUTRAL = ["the", "house", "is", "on", "a", "hill", "and", "green", "with", "trees"]


def synthetic_pairs(num_pairs: int, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Return prompts, chosen and rejected answers of equal length; only the tone differs."""
    draw = random.Random(seed)

    def answer(tone: list[str]) -> str:
        words = [*draw.choices(NEUTRAL, k=8), *draw.choices(tone, k=2)]
        draw.shuffle(words)
        return " ".join(words)

    pairs = [(answer(POLITE), answer(RUDE)) for _ in range(num_pairs)]
    return (
        [f"\n\nHuman: question {i}\n\nAssistant:" for i in range(num_pairs)],
        [chosen for chosen, _ in pairs],
        [rejected for _, rejected in pairs],
    )


def fitted(num_pairs: int = 60, seed: int = 0, **settings) -> NGramPreference:
    preference = NGramPreference(**settings)
    preference.fit(*synthetic_pairs(num_pairs, seed))
    return preference


def score(preference: NGramPreference, *completions: str) -> list[float]:
    return preference([""] * len(completions), list(completions))


def test_a_tone_that_decides_every_pair_is_learned():
    assert fitted().accuracy(*synthetic_pairs(50, seed=1)) == wilson_interval(50, 50)


def test_pairs_with_their_sides_swapped_are_all_wrong():
    prompts, chosen, rejected = synthetic_pairs(50, seed=1)
    assert fitted().accuracy(prompts, rejected, chosen) == wilson_interval(0, 50)


def test_equal_answers_count_as_half():
    prompts, chosen, rejected = synthetic_pairs(2, seed=1)
    accuracy = fitted().accuracy(prompts * 2, chosen * 2, [*rejected, *chosen])
    assert accuracy == wilson_interval(3, 4)  # 2 right, 2 ties


def test_score_differences_are_log_odds():
    # Nothing but "a b" against "c d", preferred in 3 of 4 pairs: without much regularisation the
    # model's log-odds are those of the data, log(3 / 1).
    chosen = ["a b", "a b", "a b", "c d"] * 50
    rejected = ["c d", "c d", "c d", "a b"] * 50
    preference = NGramPreference(inverse_regularization=1e6)
    preference.fit([""] * 200, chosen, rejected)
    first, second = score(preference, "a b", "c d")
    assert first - second == pytest.approx(math.log(3), abs=1e-3)  # the solver's tolerance


def test_swapping_chosen_and_rejected_in_training_negates_the_scores():
    prompts, chosen, rejected = synthetic_pairs(61, seed=0)
    forward, backward = NGramPreference(), NGramPreference()
    forward.fit(prompts, chosen, rejected)
    backward.fit(prompts, rejected, chosen)
    negated = [-number for number in score(backward, *chosen)]
    # The solver stops at a gradient of 1e-4.
    assert score(forward, *chosen) == pytest.approx(negated, abs=1e-3)


def test_a_score_does_not_depend_on_the_other_completions_or_their_order():
    preference = fitted()
    _, chosen, rejected = synthetic_pairs(20, seed=2)
    completions = [*chosen, *rejected, ""]
    together = score(preference, *completions)
    assert together == [score(preference, completion)[0] for completion in completions]
    assert together[::-1] == score(preference, *completions[::-1])


def test_the_prompt_leaves_the_score_unchanged():
    preference = fitted()
    assert preference(["I hate you"], ["thanks"]) == preference(["please"], ["thanks"])


def test_the_same_pairs_give_the_same_scores_bit_by_bit():
    completions = synthetic_pairs(20, seed=2)[1]
    assert score(fitted(), *completions) == score(fitted(), *completions)


def test_fitting_again_forgets_the_pairs_before():
    preference = fitted(seed=3)
    preference.fit(*synthetic_pairs(60, seed=0))
    assert score(preference, "thanks hill") == score(fitted(), "thanks hill")


def test_a_pickled_model_scores_the_same():
    preference = fitted()
    copy = pickle.loads(pickle.dumps(preference))
    assert score(copy, "thanks", "idiot") == score(preference, "thanks", "idiot")


def test_repeating_a_phrase_does_not_raise_its_score():
    once, hundred_times = score(fitted(), "thanks ", "thanks " * 100)
    assert hundred_times == pytest.approx(once, rel=1e-12)


def test_an_answer_without_known_ngrams_scores_as_low_as_the_worst_training_answer():
    preference = fitted()
    _, chosen, rejected = synthetic_pairs(60, seed=0)
    worst = min(score(preference, *chosen, *rejected))
    assert score(preference, "", " \n", "你好") == [worst] * 3
    assert worst < 0


def test_no_completions_give_no_scores():
    assert fitted()([], []) == []


def test_no_pairs_give_an_undefined_accuracy():
    assert all(math.isnan(number) for number in fitted().accuracy([], [], []))


def test_the_reward_protocol_can_call_it_without_asking_for_a_column():
    preference = fitted()
    assert columns_asked_for(preference) == (set(), True)
    arguments = {
        "prompts": ["", ""],
        "completions": ["thanks", "idiot"],
        "reference_answers": ["", ""],
        "chosen": ["", ""],
    }
    assert call_rewards([preference], arguments) == [score(preference, "thanks", "idiot")]


def test_stronger_regularization_brings_scores_closer_to_zero():
    weak, strong = (fitted(inverse_regularization=c) for c in (1.0, 0.01))
    assert 0 < score(strong, "thanks")[0] < score(weak, "thanks")[0]


def test_ngrams_have_the_sizes_asked_for_also_as_a_list_from_yaml():
    preference = fitted(ngram_range=[3, 4])
    sizes = {len(ngram) for ngram in preference._vectorizer.get_feature_names_out()}
    assert sizes == {3, 4}


# Errors


def test_scoring_before_fit_names_the_fix():
    for call in (lambda p: p([""], ["x"]), lambda p: p.accuracy([""], ["x"], ["y"])):
        with pytest.raises(RuntimeError, match=r"call fit\(prompts, chosen, rejected\)"):
            call(NGramPreference())


def test_a_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'grao-lightning\[preference\]'"):
        NGramPreference()


@pytest.mark.parametrize("ngram_range", [(0, 2), (3, 2), (2,), (1, 2, 3)])
def test_an_impossible_ngram_range_is_refused(ngram_range):
    with pytest.raises(ValueError, match=r"ngram_range must be .* got"):
        NGramPreference(ngram_range=ngram_range)


@pytest.mark.parametrize("value", [0, -1.0, math.nan])
def test_an_inverse_regularization_not_above_zero_is_refused(value: float):
    with pytest.raises(ValueError, match="inverse_regularization must be > 0; got"):
        NGramPreference(inverse_regularization=value)


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="2 prompts, 3 chosen, 3 rejected"):
        NGramPreference().fit(["", ""], ["a"] * 3, ["b"] * 3)
    with pytest.raises(ValueError, match="1 prompts, 2 completions"):
        fitted()([""], ["a", "b"])
    with pytest.raises(ValueError, match="1 prompts, 1 chosen, 2 rejected"):
        fitted().accuracy([""], ["a"], ["a", "b"])


def test_fewer_than_two_pairs_are_refused():
    with pytest.raises(ValueError, match=r">= 2 pairs.*got 1"):
        NGramPreference().fit([""], ["a"], ["b"])


def test_pairs_that_share_no_ngram_are_refused_and_leave_nothing_half_fitted():
    preference = NGramPreference(ngram_range=(2, 2))
    with pytest.raises(ValueError, match=r"no n-gram of .* occurs in 2 answers of 2 pairs"):
        preference.fit(["", ""], ["a", "b"], ["c", "d"])
    with pytest.raises(RuntimeError, match="call fit"):
        score(preference, "a")


# Anthropic HH


def hh_pairs(name: str) -> tuple[list[str], list[str], list[str]]:
    folder = os.environ.get("GRAO_TEST_HH")
    if not folder:
        pytest.skip("GRAO_TEST_HH is not set: the folder with the HH files *.jsonl.gz")
    with gzip.open(Path(folder) / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    marker = "\n\nAssistant:"
    prompts = [row["chosen"].rpartition(marker)[0] + marker for row in rows]
    return (
        prompts,
        [row["chosen"].rpartition(marker)[2] for row in rows],
        [row["rejected"].rpartition(marker)[2] for row in rows],
    )


@pytest.mark.parametrize("name", ["harmless-base", "helpful-base"])
def test_held_out_hh_pairs_are_told_apart_better_than_by_chance(name: str):
    train, validation = hh_pairs(f"{name}.train"), hh_pairs(f"{name}.validation")
    preference = NGramPreference()
    start = time.perf_counter()
    preference.fit(*train)
    assert time.perf_counter() - start < 30  # measured: 1 to 2 s
    accuracy = preference.accuracy(*validation)
    assert accuracy.value >= 0.60  # measured: 0.64 and 0.66
    assert accuracy.low > 0.5


def test_a_half_learns_from_its_own_pairs_alone():
    chosen, rejected = (
        [f"{word} {n % 3}" for n in range(12)] for word in ("kind words", "rude words")
    )
    prompts = [""] * 12
    changed = [text if n % 2 else "something else" for n, text in enumerate(chosen)]
    for part, same in (("odd", True), ("even", False), ("all", False)):
        scores = []
        for answers in (chosen, changed):
            model = NGramPreference(part=part)
            model.fit(prompts, answers, rejected)
            scores.append(model([""], ["kind or rude words"]))
        assert (scores[0] == scores[1]) == same, part


def test_words_are_features_of_their_own():
    prompts, chosen = [""] * 8, ["thank you very much"] * 8
    rejected = ["you very much no"] * 8
    model = NGramPreference(analyzer="word", ngram_range=(1, 1))
    model.fit(prompts, chosen, rejected)
    high, low, piece, unknown = model([""] * 4, ["thank", "no", "than", "xyz"])
    assert high > low
    assert piece == unknown, "a piece of a word is none"


@pytest.mark.parametrize("setting", [{"part": "third"}, {"analyzer": "sentence"}])
def test_unknown_parts_and_analyzers_are_refused(setting):
    with pytest.raises(ValueError, match="must be one of"):
        NGramPreference(**setting)


def test_length_alone_learns_its_direction_from_the_train_pairs():
    longer, shorter = (["long one"] * 9, ["short"] * 9), (["short"] * 9, ["long one"] * 9)
    held_out = (["aaaa", "aaaa", "a", "aa"], ["b", "bb", "bbbb", "bb"])
    assert length_alone(longer, held_out).value == (2 + 0.5) / 4
    assert length_alone(shorter, held_out).value == (1 + 0.5) / 4
