"""answers.jsonl: every validation prompt with what was said and how it was judged."""

import json
import math

import pytest
import torch

from grao_lightning.callbacks.answers import ValidationAnswers, answer_rows
from tests.runs import fit, stages

VALIDATED = {"limit_val_batches": 1.0, "val_check_interval": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two validations and its folder."""
    folder = tmp_path_factory.mktemp("answers")
    data = {"validation_prompts": 20, "validation_batch_size": 8}
    module = fit(folder, callbacks=[*stages(), ValidationAnswers()], data=data, **VALIDATED)
    return module, [json.loads(line) for line in (folder / "answers.jsonl").open()]


def test_the_rows_are_those_of_the_newest_validation_and_give_its_figures(run):
    module, rows = run
    assert [row["index"] for row in rows] == list(range(20))
    for name, column in (
        ("reward", "reward"),
        ("reference_answer_reward", "reference_answer_reward"),
        ("length", "length"),
        ("base_reward", "base_reward"),
        ("base_length", "base_length"),
        ("nag", "gain_outcome"),
    ):
        mean = sum(row[column] for row in rows) / 20
        assert mean == pytest.approx(module.estimates[name].value), name
    wins = sum(row["outcome"] > 0 for row in rows)
    assert wins / 20 == pytest.approx(module.estimates["ras"].value)
    base_wins = sum(row["base_outcome"] > 0 for row in rows)
    assert base_wins / 20 == pytest.approx(module.estimates["base_ras"].value)


def test_the_texts_are_those_that_were_scored(run):
    from grao_lightning.embedded.keywords import keyword_rows, keyword_score

    _, rows = run
    asked = keyword_rows("validation")
    for row in rows:
        keywords = asked[row["index"]]["keywords"]
        assert keywords in row["prompt"]
        for text, cut, score in (
            (row["completion"], row["truncated"], row["reward"]),
            (row["reference_answer"], False, row["reference_answer_reward"]),
        ):
            assert keyword_score([text], [cut], [keywords]) == pytest.approx([score])


def test_what_the_ids_say_stands_beside_the_texts(run):
    _, rows = run
    for row in rows:
        prompt = row["prompt"].removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")
        assert row["prompt_as_read"] == f"<bos> {prompt} <sep>"
        assert row["reference_answer_as_read"] == f" {row['reference_answer']} <eos>"
        assert row["completion_as_read"].endswith(" <eos>") != row["truncated"]
        assert row["completion"] in row["completion_as_read"]


def test_a_missing_score_is_null(tmp_path):
    kept = []

    class Missing(ValidationAnswers):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *rest) -> None:
            batch.rewards[0, 0] = math.nan
            batch.outcomes = batch.outcomes.clone()
            batch.outcomes[0, 0] = torch.nan
            kept.extend(answer_rows(batch, pl_module.tokenizer))

    data = {"validation_prompts": 4}
    fit(tmp_path, callbacks=[*stages(), Missing()], data=data, **{**VALIDATED, "max_steps": 2})
    assert kept[0]["reward"] is None and kept[0]["outcome"] is None
    assert kept[1]["reward"] is not None
