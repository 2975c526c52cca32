"""Laws that every shipped reward function keeps; real models where they are to be had."""

import doctest
import importlib
import math
import pickle
from functools import cache
from typing import Any

import pytest
import yaml

from grao_lightning.rewards.protocol import RewardSpec, call_rewards, columns_asked_for
from tests.rewards.texts import ODD, minilm_folder, random_texts

FUNCTIONS: dict[str, dict[str, Any]] = {
    "length.LengthBand": {"low": 2, "high": 5, "falloff": 3, "pieces": "characters"},
    "length.SoftOverlong": {"max_length": 9, "margin": 4},
    "length.TruncationPenalty": {},
    "repetition.RepetitionPenalty": {"ngram_size": 2},
    "format.ExactMatch": {"ignore_case": True, "ignore_punctuation": True},
    "format.RegexMatch": {"pattern": r"\w.*", "whole": False},
    "similarity.EmbeddingSimilarity": {},
    "toxicity.Toxicity": {},
}


@cache
def loaded(name: str) -> Any:
    """Return a function made as a config makes it, or skip the test."""
    arguments = FUNCTIONS[name]
    if name.startswith("similarity"):
        arguments = {"model": minilm_folder()}
    if name.startswith("toxicity"):
        pytest.importorskip("profanity_check")
    return RewardSpec(f"grao_lightning.rewards.{name}", arguments=arguments).load()


@pytest.fixture(params=FUNCTIONS)
def function(request) -> Any:
    return loaded(request.param)


@pytest.fixture
def texts(request) -> list[str]:
    """Return texts of every kind, fewer for the neural model, which is slow."""
    slow = "similarity" in request.node.name
    return [*ODD, *random_texts(4 if slow else 60)]


def columns(texts: list[str]) -> dict[str, list[Any]]:
    """Return texts with a reference answer each: another text, or now and then the same."""
    answers = [text if at % 5 == 0 else texts[at - 3] for at, text in enumerate(texts)]
    return {
        "prompts": ["q"] * len(texts),
        "completions": texts,
        "reference_answers": answers,
        "truncated": [at % 3 == 0 for at in range(len(texts))],
    }


def scores(function: Any, arguments: dict[str, list[Any]]) -> list[float]:
    """Return scores through the protocol, which checks number and range."""
    return call_rewards([function], arguments)[0]


def rows(arguments: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
    return {name: [values[at] for at in numbers] for name, values in arguments.items()}


def test_scores_lie_in_the_stated_range_for_any_text(function, texts):
    low, high = function.range
    assert isinstance(function.unit, str) and low < high
    found = scores(function, columns(texts))
    known = [score for score in found if not math.isnan(score)]
    assert len(known) >= 8
    assert all(low <= score <= high for score in known)


def test_a_score_depends_neither_on_the_batch_nor_on_its_order(function, texts):
    arguments = columns(texts)
    together = scores(function, arguments)
    alone = [scores(function, rows(arguments, [at]))[0] for at in range(len(texts))]
    assert together == pytest.approx(alone, abs=1e-5, nan_ok=True)
    backwards = list(range(len(texts)))[::-1]
    reverse = scores(function, rows(arguments, backwards))
    assert together == pytest.approx(reverse[::-1], abs=1e-5, nan_ok=True)


def test_an_empty_batch_has_no_scores(function):
    assert scores(function, columns([])) == []


def test_no_column_of_the_dataset_is_asked_for(function):
    assert columns_asked_for(function) == (set(), False)


def test_a_pickled_function_scores_the_same(function):
    arguments = columns(["a", "", "You stupid idiot.", "a b, a b"])
    copy = pickle.loads(pickle.dumps(function))
    assert scores(copy, arguments) == pytest.approx(
        scores(function, arguments), abs=1e-5, nan_ok=True
    )


def test_the_shipped_mix_loads_with_its_arguments_and_none_of_it_asks_for_a_column(repository):
    for package in ("sklearn", "sentence_transformers", "profanity_check"):
        pytest.importorskip(package)
    config = yaml.safe_load((repository / "configs/rewards_mix.yaml").read_text())
    specs = [RewardSpec(**entry) for entry in config["scoring"]["rewards"]]
    mix = {spec.label: spec.load() for spec in specs}
    assert len(mix) == len(specs) == 7
    assert all(columns_asked_for(function)[0] == set() for function in mix.values())
    judged = {"completions": ['He said "no."', "He said"], "truncated": [False, True]}
    found = call_rewards([mix["ends_a_sentence"], mix["SoftOverlong"]], judged)
    assert found == [[1, 0], [0, -1]]


@pytest.mark.parametrize("module", ["pieces", "length", "repetition", "format", "toxicity"])
def test_the_examples_of_the_docstrings_hold(module):
    if module == "toxicity":
        pytest.importorskip("profanity_check")
    result = doctest.testmod(importlib.import_module(f"grao_lightning.rewards.{module}"))
    assert result.attempted > 0 and result.failed == 0
