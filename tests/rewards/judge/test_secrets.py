"""The key goes into requests and nowhere else."""

import logging
import pickle
import traceback

import pytest
import yaml

from grao_lightning.__main__ import main
from grao_lightning.rewards.judge import PairwiseJudge
from tests.rewards.judge.quality import honest, judge_of, judged, pairs
from tests.rewards.judge.scripted_server import Question, Reply, ScriptedServer, serving

pytest.importorskip("openai")

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def authorizations(server: ScriptedServer) -> set[str]:
    return {question.headers["authorization"] for question in server.questions}


def talkative(question: Question) -> Reply:
    """Fail in every way, and repeat the key in bodies and headers."""
    key = question.headers["authorization"]
    kind = int(question.texts[0].split()[1]) % 6
    return [
        honest(question),
        Reply(f"Incorrect API key provided: {key}", status=401 + 2 * (question.attempt % 2)),
        Reply(f"bad request with {key}", status=400),
        Reply(cut="amid", text=key),
        Reply(f"I got {key}"),
        Reply(body=f"garbage {key}".encode()),
    ][kind]


def test_the_key_is_sent_and_shows_in_no_log_attribute_or_copy(caplog, capfd, tmp_path):
    caplog.set_level(logging.DEBUG)  # of every library
    with serving(talkative) as server:
        judge = judge_of(
            server, api_key_variable="JUDGE_KEY", max_retries=0, cache=str(tmp_path / "c.sqlite")
        )
        for _ in range(2):
            judged(judge, pairs(12))
            for pair in pairs(12):  # one by one, since a 401 ends a batch
                judged(judge, [pair])
        assert authorizations(server) == {f"Bearer {KEY}"}
    assert len(caplog.records) > 100, "the libraries' debug logs are looked at"
    assert "<key>" in caplog.text, "the server did repeat it"
    shown = [
        *(str(vars(record)) + record.getMessage() for record in caplog.records),
        repr(judge),
        str(vars(judge)),
        str(vars(judge.endpoint)),
        pickle.dumps(judge).decode("latin-1"),
        str(judge.statistics()),
        *capfd.readouterr(),
        *(path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()),
    ]
    for text in shown:
        assert KEY not in text


def test_no_exception_shows_the_key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\nmore")  # no header can carry it
    with pytest.raises(ValueError, match="what the environment variable JUDGE_KEY holds") as error:
        judge_of(ScriptedServer(honest), api_key_variable="JUDGE_KEY")
    assert KEY not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("mistaken", [KEY, "abcdef0123456789", "Bearer X"])
def test_a_key_in_place_of_its_variable_is_refused_unseen(mistaken):
    with pytest.raises(ValueError, match="the name of an environment variable") as error:
        judge_of(ScriptedServer(honest), api_key_variable=mistaken)
    assert mistaken not in str(error.value)


@pytest.mark.parametrize(
    "url", [f"http://user:{KEY}@localhost/v1", f"http://localhost/v1?api-key={KEY}"]
)
def test_an_address_with_a_secret_is_refused_unseen(url):
    with pytest.raises(ValueError, match="must hold no user, password or parameter") as error:
        PairwiseJudge("m", base_url=url)
    assert KEY not in str(error.value)


def test_a_changed_key_is_used_from_the_next_batch_on(monkeypatch):
    with serving(honest) as server:
        judge = judge_of(server, api_key_variable="JUDGE_KEY")
        judged(judge, pairs(1))
        monkeypatch.setenv("JUDGE_KEY", " renewed\n")
        judged(judge, pairs(1))
        assert authorizations(server) == {f"Bearer {KEY}", "Bearer renewed"}


def test_without_its_own_key_another_variables_key_is_not_sent(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    with serving(honest) as server:
        for variable in ("JUDGE_KEY", None):
            judged(judge_of(server, api_key_variable=variable), pairs(1))
        assert not any("sk-of-openai" in str(q.headers) for q in server.questions)


def test_a_run_leaves_no_key_in_its_folder_or_on_the_terminal(
    tmp_path, monkeypatch, capfd, repository
):
    monkeypatch.chdir(tmp_path)
    with serving(lambda question: Reply("1 > 2")) as server:
        config = yaml.safe_load((repository / "configs/quickstart.yaml").read_text())
        config["model"]["init_args"]["policy"] = "embedded:keywords-random"
        config["data"] |= {"prompts_per_step": 2, "validation_prompts": 4}
        config["sampling"] |= {"group_size": 2}
        config["trainer"] |= {"max_steps": 2}
        config["scoring"] = {
            "rewards": [
                {
                    "function": "grao_lightning.rewards.judge.PairwiseJudge",
                    "arguments": {
                        "model": "scripted",
                        "base_url": server.base_url,
                        "api_key_variable": "JUDGE_KEY",
                        "cache": str(tmp_path / "cache" / "judge.sqlite"),
                    },
                }
            ],
            "comparison": "raw",
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setattr("sys.argv", ["grao", "fit", "--config", "config.yaml"])
        assert main() == 0
        assert authorizations(server) == {f"Bearer {KEY}"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "last.ckpt", "summary.json", "judge.sqlite"} <= names
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in "".join(capfd.readouterr())
