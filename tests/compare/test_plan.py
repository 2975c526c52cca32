"""A plan becomes runs, and every fault in it is told at once."""

import pytest
import yaml

from grao_lightning.compare.plan import read_plan
from grao_lightning.faults import UserError

RATE = "model.init_args.learning_rate"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function: changes -> path of a plan with two methods and one case."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("seed_everything: 0\n")

    def written(**changes) -> str:
        content = {
            "output": "out",
            "seeds": [0, 1],
            "against": "A",
            "cases": {"one": {"trainer.max_steps": 5, RATE: 0.1}, "two": {}},
            "methods": {
                "A": {"config": "a.yaml"},
                "B": {"config": "a.yaml", "settings": {RATE: 2}},
            },
            **changes,
        }
        kept = {name: value for name, value in content.items() if value is not None}
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump(kept, sort_keys=False))
        return str(path)

    return written


SWEEP = {"seeds": [9], "trials": {"A": [{RATE: 3}, {RATE: 4}], "B": [{RATE: 5}, {RATE: 6}]}}
STUDY = {
    "case": "one",
    "entries": {"x": {"method": "A", "settings": {"k": 1}}, "same": {"method": "A"}},
}


def test_methods_override_cases_the_sweep_both_and_studies_all(write):
    plan = read_plan(write(sweep=SWEEP, studies={"s": STUDY}))
    chosen = {("A", "one"): {RATE: 4}}
    table = plan.table(chosen)
    assert [run.settings for run in table["A", "one"]] == [{"trainer.max_steps": 5, RATE: 4}] * 2
    assert table["B", "one"][0].settings == {"trainer.max_steps": 5, RATE: 2}
    assert table["A", "two"][0].settings == {}
    assert [run.seed for run in table["A", "one"]] == [0, 1]
    study = plan.study("s", chosen)
    assert study["x"][1].settings == {"trainer.max_steps": 5, RATE: 4, "k": 1}
    trials = plan.trials()
    assert set(trials) == {(method, case) for method in "AB" for case in ("one", "two")}
    assert [runs[0].settings[RATE] for runs in trials["B", "two"]] == [5, 6]
    assert trials["B", "two"][0][0].seed == 9


def test_one_case_may_decide_for_all(write):
    plan = read_plan(write(sweep={**SWEEP, "case": "one"}))
    assert set(plan.trials()) == {("A", "one"), ("B", "one")}
    assert plan.table({("A", "one"): {RATE: 4}})["A", "two"][0].settings == {RATE: 4}


def test_equal_runs_share_a_folder_and_whatever_decides_the_result_makes_another(write, tmp_path):
    plan = read_plan(write(studies={"s": STUDY}))
    names = {run.name for run in plan.table({})["A", "one"]}
    assert {run.name for run in plan.study("s", {})["same"]} == names
    assert not {run.name for run in plan.study("s", {})["x"]} & names
    assert len(names) == 2, "a folder a seed"
    (tmp_path / "a.yaml").write_text("seed_everything: 1\n")
    assert not {run.name for run in plan.table({})["A", "one"]} & names, "the config has changed"


def test_settings_go_to_the_command_line_as_they_are_read_there(write):
    settings = {"a.text": "x:y", "a.flag": False, "a.none": None, "a.list": [1, "b"], "a": "K"}
    plan = read_plan(write(cases={"one": settings}))
    arguments = plan.table({})["A", "one"][1].arguments
    assert arguments == [
        *("--config", "a.yaml", "--seed_everything=1", "--a=K", "--a.text=x:y"),
        *("--a.flag=false", "--a.none=null", '--a.list=[1, "b"]'),
    ]


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"seed": [1]}, ["seed must be one of", "did you mean seeds?"]),
        ({"seeds": None, "cases": None}, ["2 faults", "seeds must be set", "cases must be set"]),
        ({"against": "C"}, ["against must be one of A, B; got 'C'"]),
        ({"methods": {"A": {"config": "b.yaml"}}}, ["methods.A.config: no such file: b.yaml"]),
        ({"methods": {"A": {"konfig": "a.yaml"}}}, ["did you mean config?"]),
        ({"jobs": 0}, ["jobs must be >= 1"]),
        ({"methods": {"A": None}}, ["methods.A must hold settings; got None"]),
        ({"cases": {"one": 5}}, ["cases.one must hold settings; got 5"]),
        ({"seeds": 3}, ["seeds must be a list of whole numbers, such as [0, 1, 2]; got 3"]),
        ({"sweep": {**SWEEP, "metric": "rsa"}}, ["sweep.metric must be one of ras, nag, reward"]),
        ({"sweep": {**SWEEP, "seeds": [1, 9]}}, ["sweep.seeds must be others than the table's"]),
        ({"sweep": {**SWEEP, "case": "on"}}, ["sweep.case must be", "did you mean one?"]),
        (
            {"sweep": {"seeds": [9], "trials": {"A": [{}], "B": [{}, {}]}}},
            ["as many trials for every method", "got A 1, B 2"],
        ),
        (
            {"studies": {"s": {"case": "x", "entries": {"e": {"method": "D"}}}}},
            ["2 faults", "studies.s.case must be", "studies.s.e.method must be"],
        ),
    ],
)
def test_faults_are_told_together(write, changes, messages):
    with pytest.raises(UserError) as caught:
        read_plan(write(**changes))
    for message in messages:
        assert message in str(caught.value)


def test_the_command_line_may_choose_folder_and_jobs(write):
    plan = read_plan(write(), output="elsewhere", jobs=7)
    assert (str(plan.output), plan.jobs) == ("elsewhere", 7)


def test_the_shipped_plan_is_sound(repository, monkeypatch):
    monkeypatch.chdir(repository)
    plan = read_plan("configs/compare_keywords.yaml")
    assert set(plan.methods) == {"GRAO", "GRPO", "PPO", "DPO", "SFT"}
    assert len(plan.seeds) >= 3 and len(plan.cases) == 3
