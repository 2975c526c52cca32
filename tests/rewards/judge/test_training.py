"""The judge as reward of whole runs: what it says, what it tells of itself, and its outages."""

import pytest
import yaml
from lightning.pytorch import Callback

from grao_lightning.__main__ import main
from grao_lightning.faults import UserError
from grao_lightning.modules.grao import GRAOModule
from grao_lightning.rewards.judge.prompts import CRITERIA
from grao_lightning.rewards.protocol import RewardSpec
from tests.rewards.judge.scripted_server import Question, Reply, ScriptedServer, serving
from tests.runs import fit, stages

pytest.importorskip("openai")


def later_in_the_alphabet(question: Question) -> Reply:
    first, second = question.texts
    return Reply("1 > 2" if first > second else "1 < 2")


def down(question: Question) -> Reply:
    return Reply("down", status=503, headers={"x-should-retry": "false"})


class Watch(Callback):
    """Makes the server's outages, step by step, and keeps what came of them."""

    def __init__(self, server: ScriptedServer, outages: set[int]) -> None:
        self.server, self.outages = server, outages
        self.rewards, self.expected, self.values = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        is_down = trainer.global_step in self.outages
        self.server.script = down if is_down else later_in_the_alphabet

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        group_size = batch.completions.group_size
        answers = [answer for answer in batch.reference_answers for _ in range(group_size)]
        pairs = [
            (text.strip(), answer.strip())
            for text, answer in zip(batch.completions.texts, answers, strict=True)
        ]
        self.expected.append([float((text > answer) - (text < answer)) for text, answer in pairs])
        self.rewards.append(batch.rewards[:, :-1].flatten().tolist())
        self.values.append(dict(pl_module.step_values))


def watched(tmp_path, outages: set[int], **scoring) -> Watch:
    """Train three steps from a random base, with the server down in some."""
    with serving(later_in_the_alphabet) as server:
        spec = RewardSpec(
            "grao_lightning.rewards.judge.PairwiseJudge",
            arguments={"model": "scripted", "base_url": server.base_url, "cache": None},
        )
        watch = Watch(server, outages)
        try:
            fit(
                tmp_path,
                module=GRAOModule(policy="embedded:keywords-random", learning_rate=1e-3),
                data={"prompts_per_step": 2},
                callbacks=[
                    watch,
                    *stages(
                        scoring={"rewards": [spec], "comparison": "raw", "sees": "plain", **scoring}
                    ),
                ],
            )
        except UserError as error:
            watch.error = str(error)
    return watch


def test_a_step_is_rewarded_by_what_the_server_said_and_an_outage_is_waited_out(tmp_path):
    watch = watched(tmp_path, outages={1})
    assert len(watch.values) == 3
    for step in (0, 2):
        assert watch.rewards[step] == watch.expected[step]
        assert watch.values[step]["judge/failure_rate"] == 0
        assert watch.values[step]["missing_rewards"] == 0
    shown = [None if reward != reward else reward for reward in watch.rewards[1]]
    assert shown.count(None) >= 6  # of 8; texts that are equal need no judge
    assert watch.values[1]["missing_rewards"] == shown.count(None) / 8
    assert watch.values[1]["judge/failure_rate"] == shown.count(None) / 8
    for name in ("tie_rate", "inconsistency", "position_bias", "latency", "prompt_tokens"):
        assert f"judge/{name}" in watch.values[0]


def test_an_outage_without_end_stops_the_run_with_what_to_do(tmp_path):
    watch = watched(tmp_path, outages={1, 2}, max_missing=0.5, missing_window=2)
    assert "scoring.max_missing must not be exceeded" in watch.error


def test_the_shipped_config_names_settings_and_arguments_that_there_are(
    monkeypatch, capsys, repository
):
    path = repository / "configs/judge_hh.yaml"
    monkeypatch.setattr("sys.argv", ["grao", "fit", "--config", str(path), "--print_config"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    (spec,) = yaml.safe_load(capsys.readouterr().out)["scoring"]["rewards"]
    judge = RewardSpec(**spec).load()
    assert judge.criterion == CRITERIA["harmlessness"]
    assert judge.both_orders
