"""Whole judge checks: known scorers on known pairs, failures, faults."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from grao_lightning.__main__ import main
from grao_lightning.judge_check.command import HELP
from grao_lightning.judge_check.settings import Settings, make_parser
from grao_lightning.metrics.outcomes import wilson_interval
from tests.rewards.judge.scripted_server import Question, Reply, serving

SCORERS = '''
def scripted(completions, scores):
    """Return what the row says: 11 wins, 3 ties, 4 losses, 2 missing."""
    return [of[0] if text.startswith("C") else of[1] for text, of in zip(completions, scores)]


def length(completions):
    return [len(text) for text in completions]


def similarity(completions, reference_answers):
    return [float(text == answer) for text, answer in zip(completions, reference_answers)]


def failing(prompts, completions):
    if "prompt 8" in prompts:
        raise RuntimeError("out of memory | disk")
    return [0.0 if text.startswith("C") else 1.0 for text in completions]


def interrupting(completions):
    raise KeyboardInterrupt


def infinite(completions):
    return [float("inf")] * len(completions)


def noted(completions):
    open("called", "w")
    return [0.0] * len(completions)


class Pairwise:
    unit = "verdict"
    pairwise = True

    def __call__(self, prompts, completions, reference_answers, verdict, truncated):
        assert all(text.startswith("C") for text in completions)
        assert all(text.startswith("R") for text in reference_answers)
        assert not any(truncated)
        return verdict

    def statistics(self):
        return {"position_bias": (3, 18), "failure_rate": (2, 20), "tokens": (12345, None)}


class Silent:
    pairwise = True

    def __call__(self, verdict):
        return verdict


class OneOrder(Silent):
    def statistics(self):
        return {"position_bias": (0, 0)}


class Learner:
    """Prefers the chosen answer where it has seen pairs enough."""

    def fit(self, prompts, chosen, rejected):
        self.prompts, self.largest, self.seen = set(prompts), 0, 0
        self.right = all(text.startswith("C") for text in chosen) and len(chosen)

    def __call__(self, prompts, completions):
        self.largest = max(self.largest, len(prompts))
        self.seen += sum(prompt in self.prompts for prompt in prompts)
        return [float(text.startswith("C") and self.right == 6) for text in completions]

    def statistics(self):
        return {"largest": (self.largest, None), "seen": (self.seen, None)}
'''
NUM_PAIRS = 20
#: [chosen, rejected] by row
SCORES = [
    *([[1.0, 0.5]] * 11),
    *([[2.0, 2.0]] * 3),
    *([[-1.0, 0.0]] * 4),
    *([[None, 1.0], [1.0, None]]),
]
VERDICTS = [1, -1] * 7 + [0] * 4 + [None] * 2
LONGER_BY = [3] * 12 + [-2] * 6 + [0] * 2


def row(number: int, prefix: str = "prompt") -> dict:
    longer_by = LONGER_BY[number]
    return {
        "question": f"{prefix} {number}",
        "chosen": "C" + "x" * (9 + max(longer_by, 0)),
        "rejected": "R" + "x" * (9 + max(-longer_by, 0)),
        "scores": SCORES[number],
        "verdict": VERDICTS[number],
    }


def scorer(function: str, **more) -> dict:
    return {"function": f"test_scorers.{function}", **more}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with scorers and data."""
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "test_scorers", raising=False)
    return tmp_path


def prepare(folder: Path) -> None:
    (folder / "test_scorers.py").write_text(SCORERS)
    for name, number, prefix in (("train", 6, "train"), ("validation", NUM_PAIRS, "prompt")):
        rows = [json.dumps(row(at, prefix)) for at in range(number)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))


def config(*scorers: dict, **more) -> dict:
    data = {
        "train": "train.jsonl",
        "validation": "validation.jsonl",
        "rename": {"question": "prompt"},
    }
    return {"scorers": list(scorers), "pairs_at_once": 8, "output": "out", "data": data, **more}


@pytest.fixture
def check(folder, monkeypatch, capsys):
    """Return a function: config, arguments -> exit status, output, errors."""

    def run(content: dict, *arguments: str) -> tuple[int, str, str]:
        Path("check.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        monkeypatch.setattr(
            sys, "argv", ["grao", "judge-check", "--config", "check.yaml", *arguments]
        )
        capsys.readouterr()
        return main(), *capsys.readouterr()

    return run


def results(folder: Path) -> dict:
    return json.loads((folder / "out" / "results.json").read_text())


def estimate(successes: float, number: int) -> dict:
    return wilson_interval(successes, number)._asdict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """A whole check in a process of its own: its folder, exit status, output and errors."""
    folder = tmp_path_factory.mktemp("check")
    prepare(folder)
    content = config(
        scorer("scripted"),
        scorer("length"),
        scorer("length", name="short", weight=-0.1),
        scorer("similarity"),
        scorer("Pairwise"),
        scorer("failing"),
        scorer("Learner"),
    )
    content["data"]["prompts_per_step"] = 4
    (folder / "check.yaml").write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [sys.executable, "-m", "grao_lightning", "judge-check", "--config", "check.yaml"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(request.config.rootpath)},
    )
    assert done.returncode in (0, 1), done.stderr
    return folder, done.returncode, done.stdout, done.stderr


def test_accuracy_ties_and_missing_are_those_of_the_script(finished):
    one = results(finished[0])["scorers"]["scripted"]
    assert (one["pairs"], one["judged"]) == (20, 18)
    assert one["accuracy"] == estimate(11 + 3 / 2, 18)
    assert one["ties"] == estimate(3, 18)
    assert one["missing"] == estimate(2, 20)
    assert one["accuracy_chosen_longer"] == estimate(11 + 0.5, 12)
    assert one["accuracy_chosen_shorter"] == estimate(1, 6)
    assert one["seconds_per_pair"] > 0 and one["error"] is None and one["fit_seconds"] is None


def test_a_negative_weight_turns_a_scorer_round(finished):
    scorers = results(finished[0])["scorers"]
    assert scorers["length"]["accuracy"] == estimate(12 + 2 / 2, 20)
    assert scorers["short"]["accuracy"] == estimate(6 + 2 / 2, 20)
    assert scorers["length"]["prefers_longer"]["value"] == 1
    assert scorers["short"]["prefers_longer"]["value"] == 0


def test_length_alone_is_guessed_as_the_train_pairs_have_it(finished):
    content = results(finished[0])  # 6 train pairs, the longer answer chosen in all
    assert content["length_alone"] == estimate(12 + 2 / 2, 20)
    assert content["people_prefer_longer"] == estimate(12, 18)


def test_a_pairwise_scorers_verdicts_are_of_the_chosen_against_the_rejected_answer(finished):
    folder, _, printed, _ = finished
    one = results(folder)["scorers"]["Pairwise"]
    assert one["pairwise"] and one["unit"] == "verdict"
    assert (one["judged"], one["accuracy"]) == (18, estimate(7 + 4 / 2, 18))
    assert one["statistics"]["tokens"] == {"sum": 12345, "count": None}
    (line,) = re.findall(r"^\| Pairwise +\| pairwise, verdict .*", printed, re.MULTILINE)
    assert "| 16.7 [5.8, 39.2] % of 18 |" in line, "Wilson's interval of 3 in 18"
    assert re.search(r"\| Pairwise \| failure_rate +\| 10.0 \[2.8, 30.1\] % of 20", printed)
    assert re.search(r"\| Pairwise \| tokens +\| 12,345", printed)
    assert re.search(r"\| scripted +\| pointwise .*\| none, by construction +\|", printed)


def test_agreement_is_over_the_pairs_that_both_decide(finished):
    content = results(finished[0])
    named = {name for part in content["agreement"] for name in part["between"]}
    assert named == content["scorers"].keys() - {"similarity"}, "it sees the chosen answer"
    assert len(content["agreement"]) == 6 * 5 / 2
    (one,) = (part for part in content["agreement"] if part["between"] == ["scripted", "Pairwise"])
    # decided by both: 0..10 and 11..13 tied, 14..17 tied by the other
    assert one["pairs"] == 11
    assert one["share"] == estimate(6, 11)


def test_a_failing_scorer_costs_no_other_and_keeps_what_it_scored_before(finished):
    folder, status, printed, errors = finished
    assert status == 1
    assert "grao: scorer failing failed: RuntimeError: out of memory | disk" in errors
    assert "Traceback" not in errors
    one = results(folder)["scorers"]["failing"]
    assert (one["pairs"], one["judged"]) == (8, 8)
    assert one["accuracy"] == estimate(0, 8)
    assert one["error"] == "RuntimeError: out of memory | disk"
    (last,) = re.findall(r"^\| failing \| after 8 of 20 pairs \| .*", printed, re.MULTILINE)
    assert last.endswith("RuntimeError: out of memory \\| disk |")
    assert results(folder)["scorers"]["Learner"]["judged"] == 20, "it came after"


def test_what_learns_learns_from_the_train_split_and_is_called_with_a_batch(finished):
    one = results(finished[0])["scorers"]["Learner"]
    assert one["accuracy"] == estimate(20, 20)
    assert one["fit_seconds"] > 0
    assert one["statistics"]["seen"]["sum"] == 0
    assert one["statistics"]["largest"]["sum"] == 16  # both answers of 8 pairs


def test_accuracy_that_means_nothing_is_told_to(finished):
    folder, _, printed, _ = finished
    scorers = results(folder)["scorers"]
    assert [name for name, one in scorers.items() if one["sees_chosen"]] == ["similarity"]
    assert "Of no meaning is the accuracy of similarity:" in printed
    assert "100.0 [83.9, 100.0] (sees the chosen)" in printed


def test_the_csv_has_a_row_a_pair_with_every_score(finished):
    with (finished[0] / "out" / "pairs.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == NUM_PAIRS
    for number, found in enumerate(rows):
        expected = row(number)
        cells = ["" if score is None else str(score) for score in expected["scores"]]
        assert [found["scripted chosen"], found["scripted rejected"]] == cells
        verdict = expected["verdict"]
        assert found["Pairwise verdict"] == ("" if verdict is None else f"{verdict:.1f}")
        assert (found["failing chosen"] == "") == (number >= 8)
        texts = ("prompt", "chosen", "rejected")
        assert [found[name] for name in texts] == [
            expected["question"],
            expected["chosen"],
            expected["rejected"],
        ]
        assert (
            int(found["chosen_characters"]) - int(found["rejected_characters"])
            == (LONGER_BY[number])
        )


def test_the_report_is_what_was_printed_with_a_picture_beside_it(finished):
    folder, _, printed, errors = finished
    assert (folder / "out" / "report.md").read_text() in printed
    assert (folder / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "grao: without effect here: data.prompts_per_step" in errors
    assert "8/20" not in errors, "a progress line is for terminals"
    assert not list((folder / "out").glob("*.tmp"))


def test_the_size_of_a_batch_changes_no_figure_and_pairs_are_the_first(check, folder):
    found = []
    for size in ("3", "100"):
        status, _, errors = check(
            config(scorer("scripted"), scorer("Pairwise")),
            *("--pairs_at_once", size, "--pairs", "13", "--data.train_split=any"),
        )
        assert status == 0, errors
        content = results(folder)
        for one in content["scorers"].values():
            del one["seconds_per_pair"]
        found.append((content["scorers"], content["agreement"]))
    assert found[0] == found[1]
    assert found[0][0]["scripted"]["accuracy"] == estimate(11 + 2 / 2, 13)


def test_one_scorer_alone_is_reported_too(check, folder):
    status, printed, _ = check(config(scorer("scripted")))
    assert status == 0
    assert "Agreement" not in printed and (folder / "out" / "report.png").exists()


def test_a_terminal_shows_how_far_each_scorer_is(check, folder, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True, raising=False)
    _, _, errors = check(config(scorer("scripted"), scorer("failing"), scorer("length")))
    for name, expected in (("scripted", [0, 8, 16, 20]), ("failing", [0, 8])):
        shown = re.findall(rf"{name}: pairs (\d+)/20", errors)
        assert list(map(int, shown)) == expected
    assert errors.count("\nlength: pairs") + errors.count("\n\r\033[Klength: pairs") == 1


def test_what_are_no_scores_fails_the_scorer(check, folder):
    status, printed, errors = check(config(scorer("infinite")))
    assert status == 1 and "must return finite scores" in errors
    assert "judged" not in results(folder)["scorers"]["infinite"]
    assert "Accuracy" not in printed
    assert not (folder / "out" / "report.png").exists()


def test_a_judge_that_measured_no_position_bias_is_told_as_one(check, folder):
    status, printed, _ = check(config(scorer("OneOrder"), scorer("Silent")))
    assert status == 0
    for name in ("OneOrder", "Silent"):
        assert re.search(rf"\| {name} +\| pairwise.* \| not told +\|", printed)
    assert "| OneOrder | position_bias |  |" in printed


def test_an_interruption_keeps_what_was_scored(check, folder):
    status, printed, _ = check(config(scorer("scripted"), scorer("interrupting"), scorer("length")))
    assert status == 130
    assert list(results(folder)["scorers"]) == ["scripted", "interrupting"]
    assert results(folder)["scorers"]["scripted"]["judged"] == 18
    assert re.search(r"\| interrupting \| after 0 of 20 pairs \| interrupted", printed)
    assert re.search(r"\| length +\| not begun", printed)


def test_the_language_model_judge_is_measured_through_a_server(check, folder):
    """One that prefers the longer text, but text 1 in rows 0 to 4 and babbles in row 12."""

    def script(question: Question) -> Reply:
        row = int(re.search(r"prompt (\d+)", question.text)[1])
        first, second = map(len, question.texts)
        if row == 12:
            return Reply("I would rather not say.")
        return Reply(
            "1 > 2" if row < 5 or first > second else "1 < 2" if first < second else "1 = 2"
        )

    with serving(script) as server:
        judge = {
            "function": "grao_lightning.rewards.judge.PairwiseJudge",
            "arguments": {
                "model": "m",
                "base_url": server.base_url,
                "api_key_variable": None,
                "cache": None,
                "max_rereads": 0,
            },
        }
        status, printed, errors = check(config(judge, scorer("length")))
        assert len(server.questions) == 2 * NUM_PAIRS
    assert status == 0, errors
    content = results(folder)
    one = content["scorers"]["PairwiseJudge"]
    assert (one["judged"], one["missing"]) == (19, estimate(1, 20))
    # 5 ties by position, rows 5 to 11 won, 13 to 17 lost, 18 and 19 of equal length
    assert one["accuracy"] == estimate(7 + (5 + 2) / 2, 19)
    assert one["ties"] == estimate(7, 19)
    assert one["statistics"]["position_bias"] == {"sum": 5, "count": 19}
    assert re.search(
        r"\| PairwiseJudge \| pairwise, verdict .* \| 26.3 \[.*\] % of 19 +\|", printed
    )
    (agreement,) = content["agreement"]
    assert (agreement["pairs"], agreement["share"]["value"]) == (12, 1.0)


# -- faults ----------------------------------------------------------------------------------------


def fault(outcome: tuple[int, str, str]) -> str:
    """Return the error, checked to be all there is."""
    status, printed, errors = outcome
    assert (status, printed) == (2, ""), errors
    assert errors.count("grao: ") == 1
    for noise in ("Traceback", "usage:", "Parser key", "<class"):
        assert noise not in errors
    return errors.partition("grao: ")[2].strip()


def test_faults_are_told_together_before_anything_is_scored(check, folder, monkeypatch):
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name == "matplotlib" else find_spec(name, *more),
    )
    (folder / "file").write_text("")
    for at in ("train", "validation"):
        rows = [json.loads(line) for line in (folder / f"{at}.jsonl").read_text().splitlines()]
        for one in rows:
            del one["verdict"]
        (folder / f"{at}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = config(
        scorer("noted"),
        scorer("noted"),
        scorer("length", weight=0.0),
        scorer("nothing"),
        scorer("Pairwise", arguments={"key": 1}),
        scorer("SCORE_OF_ALL", name="constant"),
        scorer("Pairwise", name="verdicts"),
        pairs=0,
        pairs_at_once=-1,
        output="file/out",
    )
    with (folder / "test_scorers.py").open("a") as file:
        file.write("\nSCORE_OF_ALL = 5\n")
    headline, *faults = fault(check(content)).split("\n  - ")
    assert headline == "10 faults in the configuration:"
    expected = [
        "grao judge-check needs matplotlib: pip install 'grao-lightning[compare]'",
        "pairs must be >= 1; got 0",
        "pairs_at_once must be >= 1; got -1",
        "output must be a folder; got file/out, and file is a file",
        "scorers: 'noted' names two scorers; give each a name",
        "scorers: the weight of length must be > 0 (higher is better) or < 0",
        "scorers: cannot import 'test_scorers.nothing'",
        "scorers: arguments of Pairwise: ",
        "scorers: cannot import 'test_scorers.SCORE_OF_ALL': SCORE_OF_ALL must be a function or ",
        "reward function Pairwise asks for column verdict; the dataset has scores besides",
    ]
    for found, start in zip(faults, expected, strict=True):
        assert found.startswith(start)
    assert not (folder / "called").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorers": []}, "scorers must name at least one scorer"),
        ({"scorer": []}, "unknown setting scorer; did you mean scorers?"),
        ({"scorers": None}, "scorers must be set; see configs/judge_check.yaml for an example"),
        ({"scorers": 3}, "scorers must be a list; got 3"),
        ({"pairs": "many"}, "pairs must be a whole number or null; got many"),
        ({"data": None}, "data must hold settings, each on a line of its own below it; got None"),
        ({"data": {"trian": "a.jsonl"}}, "unknown setting data.trian; did you mean data.train?"),
        (
            {"data": {"train": "a.jsonl", "validation": "b.jsonl"}},
            "2 faults in the configuration:\n  - data.train: no such file: a.jsonl",
        ),
        (
            {"data": {"validation": "validation.jsonl"}},
            "1 fault in the configuration:\n  - data.train must be set beside data.validation",
        ),
        (
            {"data": {"train": "train.jsonl", "rename": {"question": "prompt"}}},
            "1 fault in the configuration:\n  - data.validation must be held out from data.train",
        ),
        (
            {"data": {"train": "no_pairs.jsonl", "validation": "validation.jsonl"}},
            "1 fault in the configuration:\n  - data.train must have rows with a chosen and",
        ),
        (
            {"data": {"train": "train.jsonl", "validation": "no_pairs.jsonl"}},
            "1 fault in the configuration:\n  - data.validation must have rows with a chosen and",
        ),
        (
            {"data": {"train": "train.jsonl", "validation": "broken.jsonl"}},
            "1 fault in the configuration:\n  - data.validation: ",
        ),
    ],
)
def test_a_fault_names_setting_rule_and_value(check, folder, changes, message):
    Path("no_pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("broken.jsonl").write_text('{"prompt": "a", "compl')
    for name in ("train", "validation"):  # without a need to rename
        text = Path(f"{name}.jsonl").read_text()
        if "rename" not in (changes.get("data") or {}):
            Path(f"{name}.jsonl").write_text(text.replace('"question"', '"prompt"'))
    text = fault(check({**config(scorer("Learner")), **changes}))
    assert message in text


def test_without_a_config_what_must_be_set_is_told(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grao", "judge-check"])
    outcome = (main(), *capsys.readouterr())
    assert fault(outcome) == "scorers must be set; see configs/judge_check.yaml for an example"


def test_files_that_are_also_the_train_split_do_where_nothing_learns(check, folder):
    content = config(scorer("scripted"))
    del content["data"]["validation"]
    status, printed, _ = check(content)
    assert status == 0
    assert re.search(
        r"\| length alone \| of 6 train pairs, the same ones +\| 6 .* none, by construction",
        printed,
    )


# -- help and config -------------------------------------------------------------------------------


def test_help_answers_without_importing_torch_and_names_every_setting():
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys; from grao_lightning.__main__ import main; main(); print(*sys.modules)",
            *("judge-check", "--help"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    text, _, loaded = done.stdout.rstrip("\n").rpartition("\n")
    assert text + "\n" == HELP
    assert not {"torch", "lightning", "jsonargparse", "numpy"} & set(loaded.split())
    for name in Settings.__dataclass_fields__:
        assert f"  --{name} " in HELP
    defaults = make_parser().get_defaults()
    assert f"(default: {defaults.pairs_at_once})" in HELP
    assert f"(default: {defaults.output})" in " ".join(HELP.split())


def test_every_setting_of_the_shipped_config_is_known_and_its_printed_form_runs(
    check, folder, repository, monkeypatch, capsys
):
    arguments = ["grao", "judge-check", "--config", str(repository / "configs/judge_check.yaml")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--print_config"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    content = yaml.safe_load(capsys.readouterr().out)
    assert len(content["scorers"]) >= 2
    content |= {"output": "out", "scorers": config(scorer("scripted"))["scorers"]}
    content["data"] |= {**config()["data"], "data_dir": None}
    assert check(content)[0] == 0


# -- real pairs ------------------------------------------------------------------------------------


def test_on_real_pairs_two_learned_scorers_beat_chance(check, folder):
    source = os.environ.get("GRAO_TEST_HH")
    if not source:
        pytest.skip("set GRAO_TEST_HH to a folder with harmless-base.{train,validation}.jsonl.gz")
    data = {name: f"{source}/harmless-base.{name}.jsonl.gz" for name in ("train", "validation")}
    ngrams = "grao_lightning.rewards.preference.NGramPreference"
    status, _, errors = check(
        config(
            {"function": ngrams, "name": "characters", "arguments": {"part": "even"}},
            {"function": ngrams, "name": "words", "arguments": {"part": "odd", "analyzer": "word"}},
            data=data,
        )
    )
    assert status == 0, errors
    content = results(folder)
    for one in content["scorers"].values():
        assert one["accuracy"]["low"] > 0.5 and one["judged"] == content["pairs"] > 200
        assert not math.isnan(one["length_correlation"])
    (agreement,) = content["agreement"]
    assert 0 < agreement["kappa"] < 0.6
    # scores are kept as they are: recomputed from the file, the accuracy is the same
    with (folder / "out" / "pairs.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    scores = np.array([[r["words chosen"], r["words rejected"]] for r in rows], dtype=float)
    wins = (scores[:, 0] > scores[:, 1]).mean() + (scores[:, 0] == scores[:, 1]).mean() / 2
    assert content["scorers"]["words"]["accuracy"]["value"] == pytest.approx(wins)
