"""Prompts without reference answers: what GRPO and PPO learn of them, and what is refused."""

import json

import pytest
import yaml

from grao_lightning import DPOModule, GRAOModule, GRPOModule, PPOModule, RewardModule, SFTModule
from grao_lightning.callbacks.answers import ValidationAnswers
from grao_lightning.callbacks.checkpoint import BestCheckpoint
from grao_lightning.callbacks.summary import RunSummary
from grao_lightning.embedded.keywords import keyword_rows
from grao_lightning.faults import UserError
from grao_lightning.rewards.protocol import RewardSpec, call_rewards
from tests.runs import fit, largest_difference, stages, weights

RAW = {"comparison": "raw"}


def rows_of(split: str, number: int, *columns: str) -> list[dict]:
    return [{name: row[name] for name in columns} for row in keyword_rows(split)[:number]]


@pytest.fixture
def data(tmp_path):
    """Return a function: whether rows have answers -> settings of the data, files of 8 rows."""

    def settings(train_answers: bool, validation_answers: bool) -> dict:
        paths = {}
        for split, has in (("train", train_answers), ("validation", validation_answers)):
            answers = ("chosen", "rejected") if has else ()
            path = tmp_path / f"{split}{has}.jsonl"
            rows = rows_of(split, 8, "prompt", "keywords", *answers)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            paths[split] = str(path)
        return {**paths, "prompts_per_step": 4}

    return settings


@pytest.mark.parametrize("method", [GRPOModule, PPOModule])
def test_by_raw_rewards_reference_answers_have_no_part_in_the_step(tmp_path, data, method):
    trained = []
    for steps, has_answers in ((1, True), (2, True), (2, False)):
        module = method(policy="embedded:keywords-weak", learning_rate=1e-3)
        run = {"data": data(has_answers, True), "callbacks": stages(scoring=RAW)}
        trained.append(weights(fit(tmp_path, module=module, max_steps=steps, **run)))
    assert largest_difference(*trained[:2]) > 1e-4
    assert largest_difference(*trained[1:]) == 0


VALIDATED = {
    "limit_val_batches": 1.0,
    "val_check_interval": 2,
    "max_steps": 2,
    "enable_checkpointing": True,
}


@pytest.mark.parametrize(
    ("reference_model", "monitor"), [("policy", "val/nag"), (None, "val/reward")]
)
def test_validation_measures_what_needs_no_reference_answer(
    tmp_path, data, capsys, reference_model, monitor
):
    best = BestCheckpoint(dirpath=tmp_path)
    module = fit(
        tmp_path,
        module=GRPOModule(policy="embedded:keywords-weak", reference_model=reference_model),
        data=data(False, False),
        callbacks=[*stages(scoring=RAW), RunSummary(), ValidationAnswers(), best],
        **VALIDATED,
    )
    names = set(module.estimates)
    assert not {name for name in names if "ras" in name or "reference_answer" in name}
    assert {"reward", "length"} < names and ("nag" in names) == (reference_model is not None)
    for name, value in module.trainer.callback_metrics.items():
        assert not value.isnan() or name.endswith(("low", "high")), name
    assert module.trainer.callback_metrics["val/missing_rewards"] == 0
    assert best.monitor == monitor and (tmp_path / "best.ckpt").is_file()
    assert "No RAS: the data has no reference answers" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").open()]
    assert len(rows) == 8 and all(row["reward"] is not None for row in rows)
    for name in ("outcome", "reference_answer", "reference_answer_length"):
        assert all(row[name] is None for row in rows)


def test_a_best_checkpoint_by_ras_is_refused_where_there_is_none(tmp_path, data):
    best = BestCheckpoint(dirpath=tmp_path, monitor="val/ras")
    with pytest.raises(UserError, match="got val/ras: remove it, and val/nag decides"):
        fit(
            tmp_path,
            module=GRPOModule(),
            data=data(False, False),
            callbacks=[*stages(scoring=RAW), best],
            **VALIDATED,
        )


def test_held_out_answers_give_ras_whatever_is_trained_on(tmp_path, data):
    module = fit(
        tmp_path,
        module=GRPOModule(policy="embedded:keywords-weak"),
        data=data(False, True),
        callbacks=stages(scoring={**RAW, "aggregation": "normalized"}),
        **{**VALIDATED, "enable_checkpointing": False},
    )
    assert 0 <= module.estimates["ras"].value <= 1
    assert "ras" not in module.step_values and module.step_values["missing_rewards"] == 0


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [GRAOModule, SFTModule, DPOModule, RewardModule])
def test_methods_that_need_answers_refuse_prompts_alone_and_name_those_that_do_not(
    tmp_path, data, method
):
    with pytest.raises(UserError, match=rf"data\.train: .* and {method.__name__} needs") as caught:
        fit(tmp_path, module=method(), data=data(False, True), callbacks=stages(scoring=RAW))
    for fix in ("data.rename", "GRPOModule or PPOModule and scoring.comparison=raw"):
        assert fix in str(caught.value)


def comparing(completions, reference_answers):
    return [0.0] * len(completions)


def optional(completions, reference_answers=None, **columns):
    assert reference_answers is None and "reference_answers" not in columns
    return [0.0] * len(completions)


def test_what_compares_with_reference_answers_is_refused_before_training(tmp_path, data):
    judge = RewardSpec(
        "grao_lightning.rewards.judge.PairwiseJudge",
        arguments={"model": "m", "base_url": "http://127.0.0.1:9"},
    )
    rewards = [RewardSpec("tests.modules.test_prompt_only.comparing"), judge]
    with pytest.raises(UserError) as caught:
        fit(
            tmp_path,
            module=GRPOModule(),
            data=data(False, True),
            callbacks=stages(scoring={"rewards": rewards}),
        )
    text = str(caught.value)
    assert "scoring.comparison must be raw where data.train has no reference answers" in text
    assert "reward function comparing asks for reference_answers" in text
    assert "reward function PairwiseJudge compares with reference answers" in text


def test_scorers_are_not_passed_what_there_is_not():
    arguments = {"prompts": ["q"] * 2, "completions": ["a", "b"], "truncated": [False] * 2}
    assert call_rewards([optional], arguments) == [[0.0, 0.0]]
    with pytest.raises(UserError, match="comparing asks for reference_answers"):
        call_rewards([comparing], arguments)


def test_the_command_line_trains_on_prompts_alone(tmp_path, data, repository, monkeypatch):
    """With the shipped config, the two files and raw rewards: nothing else needs to be set."""
    from grao_lightning.command.fit import run

    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((repository / "configs/grpo.yaml").read_text())
    config["data"] = data(False, False)
    config["scoring"]["comparison"] = "raw"
    config["sampling"]["group_size"] = 2
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("sys.argv", ["grao", "fit", "--config", "config.yaml"])
    run("fit")
    folder = tmp_path / "runs/version_0"
    summary = json.loads((folder / "summary.json").read_text())
    assert "ras" not in summary and -1 <= summary["nag"]["value"] <= 1
    assert (folder / "checkpoints/best.ckpt").is_file()
