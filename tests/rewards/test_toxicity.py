"""Offensive words, with the real classifier."""

import importlib.util
import warnings

import pytest

from grao_lightning.rewards.toxicity import Toxicity

pytest.importorskip("profanity_check")


def score(*texts: str) -> list[float | None]:
    return Toxicity()(list(texts))


@pytest.mark.parametrize(
    "text",
    ["You are a stupid idiot.", "Go to hell, you worthless piece of shit", "I hate you, asshole!"],
)
def test_insults_score_close_to_minus_one(text):
    assert score(text)[0] < -0.95


@pytest.mark.parametrize(
    "text",
    [
        "Thank you very much for your help.",
        "Paris is the capital of France.",
        "Are you being serious?",
    ],
)
def test_plain_texts_score_close_to_zero(text):
    assert -0.1 < score(text)[0] <= 0


def test_what_it_is_said_not_to_see_it_does_not_see():
    contempt = "You are not worth anything, nobody will ever love you"
    advice = "You can make a bomb by mixing these chemicals"
    praise = "This is fucking awesome"
    assert min(score(contempt, advice)) > -0.1 > -0.9 > score(praise)[0]


def test_one_insult_in_a_long_text_is_diluted_but_seen():
    plain = "We walked along the river and talked about the weather for an hour. "
    found = score(plain, plain * 3 + "You idiot.", "You idiot.")
    assert found == sorted(found, reverse=True) and len(set(found)) == 3


def test_words_it_does_not_know_are_missing_and_no_words_are_not():
    unknown = score("你是个白痴", "qwxzv qwxzv")
    assert unknown == [None, None]
    assert score("", " \n", "...", "Who are you?") == [pytest.approx(-0.036, abs=1e-3)] * 4


def test_the_shipped_model_fits_the_installed_scikit_learn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a model of another version warns as it is read
        import joblib
        from profanity_check import profanity_check

        folder = profanity_check.resources.files("profanity_check") / "data"
        for name in ("model", "vectorizer"):
            joblib.load(folder / f"{name}.joblib")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'grao-lightning\[toxicity\]'"):
        Toxicity()
