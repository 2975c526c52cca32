"""What the command line says: help, whole runs, and one clear error for every user's mistake."""

import copy
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule

import grao_lightning.language_model.loading
from grao_lightning import GRAOModule, __version__
from grao_lightning.__main__ import main
from grao_lightning.command.parse_errors import unknown_setting
from grao_lightning.faults import UserError
from tests.conftest import tiny_model
from tests.runs import fit, stages, trainer

ROW = {"prompt": "say anna", "completion": "anna"}
SMALL = {
    "data.prompts_per_step": 2,
    "data.validation_prompts": 8,
    "sampling.group_size": 2,
    "trainer.max_steps": 2,
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def quickstart(repository) -> dict[str, Any]:
    """Return the settings of configs/quickstart.yaml."""
    return yaml.safe_load((repository / "configs/quickstart.yaml").read_text())


@pytest.fixture
def grao(monkeypatch, capsys):
    """Return a function: arguments -> exit status, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["grao", *map(str, arguments)])
        capsys.readouterr()
        try:
            status = main()
        except SystemExit as stopped:  # argparse ends --help and --print_config so
            status = stopped.code or 0
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Make a failure of any attempt to load a model or tokenizer."""

    def load(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(grao_lightning.language_model.loading, "_load", load)


@pytest.fixture
def complaint(grao, quickstart):
    """Return a function: changed settings, arguments -> the one error a run ends with."""

    def run(changes: dict[str, Any] | None = None, *arguments: str, command: str = "fit") -> str:
        config = changed(quickstart, {**SMALL, **(changes or {})})
        Path("config.yaml").write_text(yaml.safe_dump(config))
        status, _, errors = grao(command, "--config", "config.yaml", *arguments)
        return one_error(status, errors)

    return run


def one_error(status: int, errors: str) -> str:
    """Return the error, checked to be all that went wrong and to be no traceback or usage."""
    assert status == 2, errors
    assert errors.count("grao: ") == 1, errors
    for noise in ("Traceback", "usage:", "Parser key", "<class", "Lightning's"):
        assert noise not in errors
    return errors.partition("grao: ")[2].strip()


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with settings changed, by dotted name."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        *sections, last = name.split(".")
        inner = config
        for section in sections:
            inner = inner[int(section)] if section.isdigit() else inner.setdefault(section, {})
        inner[last] = value
    return config


def write_rows(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


# -- help ------------------------------------------------------------------------------------------


def test_help_and_version_answer_without_importing_torch(grao):
    assert grao("--version") == (0, f"grao-lightning {__version__}\n", "")
    for arguments in ((), ("-h",), ("--help",)):
        status, text, _ = grao(*arguments)
        assert status == 0
        for command in ("init", "fit", "validate", "compare", "judge-check", "export"):
            assert re.search(rf"^  {command}\s", text, re.MULTILINE)
    seconds = []
    for _ in range(3):  # the machine may be busy: the best of three
        started = time.perf_counter()
        text = python("import sys; from grao_lightning.__main__ import main; main()", "--help")
        seconds.append(time.perf_counter() - started)
        assert text.startswith("usage: grao <command>")
    assert min(seconds) < 1.0
    loaded = python("import sys, grao_lightning.__main__; print(*sys.modules)").split()
    assert not {"torch", "lightning", "transformers", "yaml"} & set(loaded)


def python(code: str, *arguments: str) -> str:
    """Return what a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_unknown_command_names_the_ones_there_are(grao):
    status, _, errors = grao("train")
    known = "init, fit, validate, compare, judge-check, memory, export"
    assert one_error(status, errors) == f"no command 'train'; there are {known}"


# -- whole runs ------------------------------------------------------------------------------------


def test_the_printed_config_is_a_file_that_runs(grao, repository):
    status, text, _ = grao("fit", "--config", repository / "configs/sft.yaml", "--print_config")
    assert status == 0
    assert yaml.safe_load(text)["sampling"]["max_new_tokens"] == 12
    Path("printed.yaml").write_text(text)
    arguments = [f"--{name}={value}" for name, value in SMALL.items()]
    status, text, errors = grao("fit", "--config", "printed.yaml", *arguments)
    assert status == 0, errors
    assert "step 2/2" in text and "RAS %" in text
    quiet = "--trainer.enable_progress_bar=false"
    status, text, errors = grao("fit", "--config", "printed.yaml", *arguments, quiet)
    assert status == 0, errors
    assert "step 2/2" not in text and "RAS %" in text


@pytest.mark.parametrize("name", ["quickstart", "sft", "hh_smollm2", "rewards_mix"])
def test_every_setting_of_the_shipped_configs_is_known(grao, repository, name):
    status, text, errors = grao(
        "fit", "--config", repository / f"configs/{name}.yaml", "--print_config"
    )
    assert status == 0, errors
    assert yaml.safe_load(text)["trainer"]["max_steps"] > 0


def test_an_exported_policy_is_the_checkpoints_and_validates_alike(grao, quickstart):
    Path("config.yaml").write_text(yaml.safe_dump(changed(quickstart, SMALL)))
    fitting = ("--model.init_args.learning_rate", "0.05", "--last_checkpoint.dirpath", "saved")
    assert grao("fit", "--config", "config.yaml", *fitting)[0] == 0
    assert grao("export", "--ckpt_path", "saved/last.ckpt", "--output", "out")[:2] == (
        0,
        "written: out\n",
    )

    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = AutoModelForCausalLM.from_pretrained("out").state_dict()
    saved = torch.load("saved/last.ckpt", weights_only=True)["state_dict"]
    assert {f"policy.{name}" for name in exported} == set(saved)
    for name, value in exported.items():
        assert torch.equal(value, saved[f"policy.{name}"]), name
    untrained = GRAOModule(policy="embedded:keywords")
    untrained.configure_model()
    assert not torch.equal(untrained.policy.lm_head.weight, exported["lm_head.weight"]), (
        "two steps must have moved it"
    )
    own = untrained.tokenizer
    question = [{"role": "user", "content": "anna bob"}]
    assert AutoTokenizer.from_pretrained("out").apply_chat_template(
        question
    ) == own.apply_chat_template(question)

    found = []
    for arguments in (
        ("--ckpt_path", "saved/last.ckpt"),
        ("--model.init_args.policy", "./out"),
        (),
    ):
        settings = ("--data.validation_prompts", "256", "--trainer.logger", "false")
        status, _, errors = grao("validate", "--config", "config.yaml", *settings, *arguments)
        assert status == 0, errors
        summary = json.loads(Path("summary.json").read_text())
        found.append({name: summary[name]["value"] for name in ("ras", "reward", "length")})
    assert found[0] == found[1] != found[2]


def test_a_callback_of_the_config_takes_the_place_of_the_standard_one(grao, quickstart):
    panels = {
        "class_path": "grao_lightning.callbacks.panels.TensorBoardPanels",
        "init_args": {"special_tokens": True},
    }
    Path("config.yaml").write_text(
        yaml.safe_dump(changed(quickstart, {**SMALL, "trainer.callbacks": [panels]}))
    )
    status, _, errors = grao("fit", "--config", "config.yaml")
    assert status == 0, errors
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("runs/version_0").Reload()
    (panel,) = events.Tensors("val/completions/text_summary")
    assert b"&lt;bos&gt; " in panel.tensor_proto.string_val[0]
    assert b"Human:" not in panel.tensor_proto.string_val[0]


def test_every_run_that_validated_has_a_best_checkpoint_also_one_with_no_step_left(
    grao, quickstart
):
    Path("config.yaml").write_text(yaml.safe_dump(changed(quickstart, SMALL)))  # interval 50
    arguments = ("fit", "--config", "config.yaml", "--last_checkpoint.dirpath", "saved")
    status, text, errors = grao(*arguments)
    assert status == 0, errors
    assert text.count("RAS %") == 1
    best = Path("runs/version_0/checkpoints/best.ckpt")
    weights = torch.load(best, weights_only=True)["state_dict"]
    status, text, errors = grao(*arguments, "--ckpt_path", "saved/last.ckpt")
    assert status == 0, errors
    assert text.count("RAS %") == 1
    best = Path("runs/version_1/checkpoints/best.ckpt")
    again = torch.load(best, weights_only=True)
    assert again["global_step"] == 2
    assert all(torch.equal(value, weights[name]) for name, value in again["state_dict"].items())


REWARD = {
    "model": {
        "class_path": "grao_lightning.RewardModule",
        "init_args": {"backbone": "embedded:keywords", "learning_rate": 3e-3},
    },
    "data": {"prompts_per_step": 4, "validation_prompts": 9},
    "last_checkpoint": {"dirpath": "saved"},
    "trainer": {"accelerator": "cpu", "max_steps": 4, "val_check_interval": 2},
}


def test_a_reward_model_is_trained_exported_and_serves_as_a_reward(grao, quickstart):
    """One command each; the exported folder gives the checkpoint's scores, also in plain code."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from grao_lightning import PromptDataModule, RewardModel, RewardModule
    from grao_lightning.language_model.scores import row_scores

    Path("reward.yaml").write_text(yaml.safe_dump(REWARD))
    status, text, errors = grao("fit", "--config", "reward.yaml")
    assert status == 0, errors
    assert re.search(r"^step +1/4 +loss .* accuracy ", text, re.M)
    assert re.search(r"^val +4/4 +accuracy ", text, re.M)
    for row in ("accuracy %", "by length alone %", "calibration error %", "confidence %"):
        assert f"\n{row} " in text
    folder = Path("runs/version_0")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == summary["validated_step"] == 4
    assert 0 <= summary["accuracy"]["low"] <= summary["accuracy"]["high"] <= 1
    assert sum(part["number"] for part in summary["reliability"]) == 9
    assert (folder / "checkpoints/best.ckpt").is_file()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(folder)).Reload().Tags()
    expected = {"train/loss", "val/accuracy", "val_bounds/accuracy_low", "val/length_correlation"}
    assert expected <= set(tags["scalars"]) and "val/reliability/text_summary" in tags["tensors"]

    arguments = ("--ckpt_path", "saved/last.ckpt", "--output", "my-reward")
    assert grao("export", *arguments)[:2] == (0, "written: my-reward\n")
    module = RewardModule(backbone="embedded:keywords")
    module.configure_model()
    saved = torch.load("saved/last.ckpt", weights_only=True)["state_dict"]
    module.load_state_dict(saved)
    module.eval()
    data = PromptDataModule(tokenizer="embedded:keywords", validation_prompts=9)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        rows = batch.reference_answer_rows()
        expected = row_scores(module.reward_model, rows)[:, 0].tolist()
        plain = AutoModelForSequenceClassification.from_pretrained("my-reward").eval()
        inputs = {"input_ids": [row.prompt_ids + row.answer_ids for row in rows]}
        tokenizer = AutoTokenizer.from_pretrained("my-reward")
        padded = tokenizer.pad(inputs, return_tensors="pt")
        by_hand = plain(padded["input_ids"], attention_mask=padded["attention_mask"]).logits[:, 0]
    assert torch.tensor(expected).std() > 1e-3
    assert by_hand.tolist() == pytest.approx(expected, abs=1e-5)
    reward = RewardModel("my-reward")
    found = reward(prompts=batch.prompts, completions=batch.reference_answers)
    assert found == pytest.approx(expected, abs=1e-5)

    rewards = [{"function": "grao_lightning.RewardModel", "arguments": {"model": "my-reward"}}]
    aligned = changed(quickstart, {**SMALL, "scoring.rewards": rewards})
    Path("aligned.yaml").write_text(yaml.safe_dump(aligned))
    status, text, errors = grao("fit", "--config", "aligned.yaml")
    assert status == 0, errors
    summary = json.loads(Path("runs/version_1/summary.json").read_text())
    held_out = PromptDataModule(tokenizer="embedded:keywords", validation_prompts=8)
    held_out.setup("validate")
    (batch,) = held_out.val_dataloader()
    scores = reward(prompts=batch.prompts, completions=batch.reference_answers)
    mean = sum(scores) / len(scores)
    assert summary["reference_answer_reward"]["value"] == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("name", ["reward_smollm2", "reward_minilm"])
def test_the_configs_of_reward_models_are_whole(grao, repository, name):
    arguments = ("--config", repository / f"configs/{name}.yaml", "--print_config")
    status, text, _ = grao("fit", *arguments)
    assert status == 0
    settings = yaml.safe_load(text)
    assert settings["model"]["class_path"] == "grao_lightning.RewardModule"
    assert settings["best_checkpoint"]["monitor"] is None  # what the run logs decides


def test_a_decoder_is_exported_with_a_padding_token_that_ends_no_answer(tmp_path):
    from types import SimpleNamespace

    from grao_lightning.callbacks.exporting import give_padding
    from grao_lightning.embedded.base import keyword_tokenizer

    tokenizer = keyword_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    config = SimpleNamespace(vocab_size=len(tokenizer), pad_token_id=tokenizer.eos_token_id)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    give_padding(model, tokenizer)
    assert config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert tokenizer.pad_token_id in tokenizer.all_special_ids


# -- mistakes in the config ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"samplng.group_size": 3}, "samplng.group_size; did you mean sampling.group_size?"),
        ({"seed_everthing": 3}, "seed_everthing; did you mean seed_everything?"),
        ({"sampling.grup_size": 3}, "sampling.grup_size; did you mean sampling.group_size?"),
        ({"data.trian": "x"}, "data.trian; did you mean data.train?"),
        (
            {"model.init_args.imitation_wieght": 1},
            "model.init_args.imitation_wieght; did you mean model.init_args.imitation_weight?",
        ),
        (  # an argument of the base class
            {"model.init_args.learning_rat": 1},
            "model.init_args.learning_rat; did you mean model.init_args.learning_rate?",
        ),
        (
            {"model.init_args.lora.rnk": 1},
            "model.init_args.lora.rnk; did you mean model.init_args.lora.rank?",
        ),
        ({"trainer.max_step": 1}, "trainer.max_step; did you mean trainer.max_steps?"),
        (
            {"scoring.rewards.0.wieght": 1},
            "scoring.rewards.wieght; did you mean scoring.rewards.weight?",
        ),
        (
            {"clipping.zzz": 1},
            "clipping.zzz; there are max_norm, drift_target, outward_mask, eps_low, eps_high, "
            "drift_every in clipping",
        ),
    ],
)
def test_a_typo_in_a_config_names_the_key_and_the_one_meant(complaint, no_model, changes, expected):
    assert complaint(changes) == f"unknown setting {expected}"


@pytest.mark.parametrize("section", ["model", "trainer.callbacks"])
def test_an_own_class_that_cannot_be_imported_is_named_with_its_line(complaint, section):
    Path("broken_parts.py").write_text("\n\ndef f(:\n")
    Path("needy_parts.py").write_text("import nosuch\n")
    for module, place in (("broken_parts", "line 3: "), ("needy_parts", "line 1: ModuleNotFound")):
        expected = f"{section}.class_path: cannot import '{module}.Mine': "
        value = {"class_path": f"{module}.Mine"}
        of_config = complaint({section: value if section == "model" else [value]})
        assert of_config.startswith(expected) and place in of_config
        of_line = complaint(None, f"--{section}={module}.Mine")
        assert of_line.startswith(expected) and place in of_line


def test_a_typo_on_the_command_line_names_the_key_and_abbreviations_do_not_pass(
    complaint, no_model
):
    assert complaint({}, "--trainer.max_step", "9") == (
        "unknown setting trainer.max_step; did you mean trainer.max_steps?"
    )
    assert complaint({}, "--sampling.grup_size=9") == (
        "unknown setting sampling.grup_size; did you mean sampling.group_size?"
    )
    assert complaint({}, "extra") == (
        "unexpected argument 'extra'; settings are given as --name value"
    )


def test_the_section_of_a_typo_is_searched_first():
    known = ["first.dirpath", "second.dirpath", "second.mode"]
    assert unknown_setting("second.dirpth", known).endswith("did you mean second.dirpath?")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sampling.temperature": "warm"}, "sampling.temperature must be a number; got warm"),
        ({"sampling.group_size": 4.5}, "sampling.group_size must be a whole number; got 4.5"),
        (
            {"model.init_args.learning_rate": "1e-6x"},
            "model.init_args.learning_rate must be a number; got 1e-6x",
        ),
        (
            {"scoring.comparison": "pairwse"},
            "scoring.comparison must be one of pairwise, raw; got pairwse",
        ),
        ({"scoring.rewards.0.weight": "x"}, "scoring.rewards.weight must be a number; got x"),
        (
            {"scoring.rewards": [3]},
            "scoring.rewards must hold entries such as {function: my_module.my_reward, weight: "
            "1.0}; got 3",
        ),
        ({"scoring.rewards": [{"weight": 1}]}, "scoring.rewards.function must be set; see"),
        (
            {"scoring": {"comparison": "raw"}},
            "1 fault in the configuration:\n  - scoring.rewards must name at least one reward",
        ),
        ({"model": 3}, "model must hold class_path and init_args only; got 3"),
        (
            {"model.class_path": "grao_lightning.GRAOModul"},
            "model: no module 'grao_lightning.GRAOModul'; did you mean GRAOModule? There are",
        ),
        (
            {"model.class_path": "torch.nn.Linear"},
            "model.class_path must be a subclass of StepModule; got torch.nn.Linear",
        ),
        ({"trainer.devices": "foo"}, "trainer: `devices` selected with"),
        ({"trainer.limit_val_batches": 2.5}, "trainer: You have passed invalid value 2.5"),
    ],
)
def test_a_value_of_the_wrong_kind_names_setting_rule_and_value(
    complaint, no_model, changes, expected
):
    assert complaint(changes).startswith(expected)


@pytest.mark.parametrize("name", ["mine.kind", "mine.py:kind"])
@pytest.mark.parametrize("form", [str, lambda name: [name]])
def test_reward_functions_named_as_in_python_are_told_the_form_of_a_config(
    complaint, no_model, name, form
):
    Path("mine.py").write_text("def kind(completions): ...\n")
    text = complaint({"scoring.rewards": form(name)})
    assert text.startswith("scoring.rewards must be a list of entries such as {function: my_module")
    assert text.endswith(f": write [{{function: {name}}}]")


def test_a_section_without_settings_is_named(complaint, no_model):
    text = complaint(
        {"clipping": None, "data": 3, "data.prompts_per_step": 2} and {"clipping": None}
    )
    assert "clipping must hold settings" in text and "got nothing" in text
    assert "remove clipping for its defaults" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "--config: cannot read my.yaml: No such file or directory"),
        ("a: 1\nb: [1\nc: 2\n", "my.yaml, line 3, column 2: broken YAML: "),
        ("data:\n\ttrain: x\n", "my.yaml, line 2, column 1: broken YAML: "),
        ("", "my.yaml must hold settings as `name: value`; got None"),
        ("- 1\n", "my.yaml must hold settings as `name: value`; got [1]"),
    ],
)
@pytest.mark.parametrize(
    "option", [("--config", "my.yaml"), ("-c", "my.yaml"), ("--config=my.yaml",)]
)
def test_a_config_file_that_cannot_be_read_is_named_with_its_line(
    grao, no_model, content, expected, option
):
    if content is not None:
        Path("my.yaml").write_text(content)
    status, _, errors = grao("fit", *option)
    assert one_error(status, errors).startswith(expected)


def test_all_config_faults_are_told_together_before_any_model_loads(complaint, no_model):
    text = complaint(
        {
            "model.init_args.policy": "./nofolder",
            "model.init_args.learning_rate": -1,
            "data.train": "none.jsonl",
            "data.prompts_per_step": 0,
            "sampling.group_size": 1,
            "sampling.temperature": -1,
            "scoring.rewards": [{"function": "nope.reward"}],
            "scoring.tie_tolerance": -1,
            "clipping.max_norm": 0,
            "trainer.max_steps": -1,
            "trainer.gradient_clip_val": 1.0,
            "trainer.accumulate_grad_batches": 2,
            "best_checkpoint.monitor": "val/rass",
        },
        "--ckpt_path",
        "none.ckpt",
    )
    headline, *faults = text.split("\n  - ")
    assert headline == "14 faults in the configuration:"
    expected = [
        "model.policy: no such folder: ./nofolder; give a folder that save_pretrained wrote",
        "model.learning_rate must be >= 0; got -1",
        "data.prompts_per_step must be >= 1; got 0",
        "data.train: no such file: none.jsonl",
        "sampling.group_size must be >= 2: advantages compare completions within a group; got 1",
        "sampling.temperature must be >= 0; got -1",
        "scoring.tie_tolerance must be >= 0; got -1",
        "scoring.rewards: cannot import 'nope.reward': no nope.py in ",
        "clipping.max_norm must be > 0; got 0",
        "trainer.max_steps must be set, since the prompts are endless; got -1",
        "trainer.gradient_clip_val must not be set",
        "trainer.accumulate_grad_batches must be 1",
        "checkpoint monitor 'val/rass' is not logged; did you mean val/ras?",
        "ckpt_path: no such file: none.ckpt",
    ]
    for fault, start in zip(faults, expected, strict=True):
        assert fault.startswith(start)
    assert "set clipping.max_norm instead" in text
    assert "lower model.micro_batch_tokens" in text


def test_a_run_without_a_last_checkpoint_is_refused(complaint, no_model):
    text = complaint({"trainer.enable_checkpointing": False})
    assert "trainer.enable_checkpointing must not be false" in text and "remove it" in text


def test_a_run_without_a_logger_leaves_the_config_in_this_folder_alone(grao, quickstart):
    Path("config.yaml").write_text(yaml.safe_dump(changed(quickstart, SMALL)))
    before = Path("config.yaml").read_text()
    assert grao("validate", "--config", "config.yaml", "--trainer.logger", "false")[0] == 0
    assert Path("config.yaml").read_text() == before


def test_no_steps_at_all_are_asked_for_in_validate(complaint, grao, quickstart):
    config = changed(quickstart, {**SMALL, "trainer.max_steps": -1})
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert grao("validate", "--config", "config.yaml")[0] == 0


@pytest.mark.parametrize("source", ["embedded:keyword", "./empty", "none.gguf", "a/b/c", "models/"])
def test_a_missing_model_is_a_fault(complaint, no_model, source):
    Path("empty").mkdir()
    text = complaint({"model.init_args.policy": source})
    assert text.startswith("1 fault in the configuration:\n  - model.policy: ")
    assert source in text


def test_a_damaged_model_folder_is_one_error_with_the_fix(complaint):
    tiny_model("Llama").save_pretrained("damaged")
    grao_lightning.language_model.loading.load_tokenizer("x", "embedded:keywords").save_pretrained(
        "damaged"
    )
    Path("damaged/model.safetensors").write_bytes(b"no weights")
    text = complaint({"model.init_args.policy": "./damaged"})
    assert text.startswith("model.policy: cannot load './damaged': ")
    assert text.endswith("or a .gguf file (pip install 'grao-lightning[gguf]')")


def test_a_hub_name_out_of_reach_is_one_error_with_the_fix(complaint):
    text = complaint({"model.init_args.policy": "nosuch/model"})
    assert text.startswith("model.policy: cannot load 'nosuch/model': ")
    assert "Give a hub name that can be reached" in text


# -- mistakes in the data --------------------------------------------------------------------------


def broken_line() -> str:
    path = write_rows("broken.jsonl", [ROW] * 3)
    with Path(path).open("a") as stream:
        stream.write('{"prompt": "a", \n')
    return path


@pytest.mark.parametrize(
    ("make", "changes", "expected"),
    [
        (
            broken_line,
            {},
            "data.train: data file broken.jsonl, line 4: broken JSON (",
        ),
        (
            lambda: write_rows("empty.jsonl", []),
            {},
            "data.train: data file empty.jsonl is empty (0 bytes); give one with",
        ),
        (
            lambda: write_rows("r.jsonl", [{"question": "q", "completion": "a"}]),
            {},
            "data.train: the columns must fit one of the accepted formats",
        ),
        (
            lambda: write_rows("r.jsonl", [ROW]),
            {"data.rename": {"question": "prompt"}},
            "data.train: data.rename must name columns of the dataset: question not found; there "
            "are prompt, completion",
        ),
        (
            lambda: write_rows("r.jsonl", [{"prompt": "q"}] * 2),
            {},
            "data.train: r.jsonl has prompts without reference answers, and GRAOModule needs",
        ),
        (
            lambda: write_rows("r.jsonl", [{"prompt": "q", "completion": " "}]),
            {},
            "data.train: no usable row in r.jsonl: Read 1 rows as prompt-completion; kept 0. "
            "Dropped - empty reference answer: 1 (first: row 1: {",
        ),
        (
            lambda: write_rows("r.jsonl", [ROW]),
            {},
            "data.prompts_per_step must be <= 1, the usable rows of data.train, or",
        ),
        (
            lambda: "nosuch/data",
            {},
            "data.train: data source 'nosuch/data' is no local file or folder, and the hub did",
        ),
        (
            lambda: "embedded:nothing",
            {},
            "1 fault in the configuration:\n  - data.train: no embedded data 'embedded:nothing'; "
            "there is embedded:keywords",
        ),
        (
            lambda: write_rows("r.jsonl", [ROW] * 2),
            {"data.max_prompt_tokens": 1, "data.chat_template": "{{ oops"},
            "the chat template refuses a conversation of the roles user: ",
        ),
    ],
)
def test_data_that_cannot_be_used_is_one_error_before_any_policy_loads(
    complaint, monkeypatch, make, changes, expected
):
    def load(setting: str, *_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("grao_lightning.modules.base.load_model", load)
    assert complaint({"data.train": make(), **changes}).startswith(expected)


def test_the_rejected_split_is_named(complaint):
    text = complaint({"data.validation": write_rows("empty.jsonl", [])})
    assert text.startswith("data.validation: data file empty.jsonl is empty")
    text = complaint({"data.validation": "none.jsonl"})
    assert "- data.validation: no such file: none.jsonl" in text and "data.train" not in text


REWARDS = """
def coloured(completions, colour):
    return [0.0] * len(completions)

class Hungry:
    def __call__(self, completions, appetite, thirst):
        return [0.0] * len(completions)

def short(completions):
    return [0.0]
"""


def test_a_reward_that_asks_for_an_unknown_column_is_told_before_models_load(
    complaint, monkeypatch
):
    monkeypatch.setattr("grao_lightning.modules.base.load_model", lambda *_, **__: pytest.fail())
    Path("cli_rewards.py").write_text(REWARDS)
    functions = [{"function": f"cli_rewards.{name}"} for name in ("coloured", "Hungry")]
    headline, first, second = complaint({"scoring.rewards": functions}).split("\n  - ")
    assert headline == "2 faults in scoring.rewards on data.train:"
    assert first.startswith(
        "reward function coloured asks for column colour; the dataset has keywords besides"
    )
    assert "rename one with data.rename or drop the parameter" in first
    assert second.startswith("reward function Hungry asks for column appetite, thirst; ")


def test_a_reward_with_the_wrong_number_of_scores_is_named(complaint):
    Path("cli_rewards.py").write_text(REWARDS)
    text = complaint({"scoring.rewards": [{"function": "cli_rewards.short"}]})
    assert "short must return one score a completion: got 1 for 2 completions" in text


def test_a_reward_that_cannot_learn_names_the_data(complaint):
    reward = {"function": "grao_lightning.rewards.preference.NGramPreference"}
    rows = {"data.train": write_rows("r.jsonl", [ROW] * 2), "scoring.rewards": [reward]}
    text = complaint(rows)
    assert "NGramPreference learns from pairs" in text and "use preference data" in text
    pair = {"prompt": "q", "chosen": "a b", "rejected": "b a"}
    rows["data.train"] = write_rows("p.jsonl", [pair])
    assert "needs >= 2 pairs" in complaint({**rows, "data.prompts_per_step": 1})
    pairs = [{**pair, "chosen": c, "rejected": r} for c, r in (("ab", "cd"), ("ef", "gh"))]
    rows["data.train"] = write_rows("o.jsonl", pairs)
    reward["arguments"] = {"ngram_range": [9, 9]}
    assert "no n-gram of (9, 9) characters" in complaint(rows)
    reward["arguments"] = {"ngram_range": [3, 2]}
    assert "scoring.rewards: arguments of" in complaint(rows)


# -- mistakes with checkpoints ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, one_cache_for_all) -> Path:
    """Return a checkpoint of the embedded task after one step."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    folder = tmp_path_factory.mktemp("checkpoint")
    saver = ModelCheckpoint(folder, every_n_train_steps=1, filename="one")
    fit(folder, callbacks=[*stages(), saver], max_steps=1, enable_checkpointing=True)
    return folder / "one.ckpt"


def spoiled(checkpoint: Path, how: str) -> str:
    """Return a path that is no whole checkpoint."""
    if how == "cut off":
        Path("bad.ckpt").write_bytes(checkpoint.read_bytes()[:-100])
    elif how == "text":
        Path("bad.ckpt").write_text("no weights")
    elif how == "other":
        torch.save({"a": torch.ones(2)}, "bad.ckpt")
    elif how == "folder":
        Path("bad.ckpt").mkdir()
    return "bad.ckpt"


@pytest.mark.parametrize("how", ["missing", "cut off", "text", "other", "folder"])
def test_what_is_no_checkpoint_is_refused_by_every_command(
    complaint, grao, no_model, checkpoint, how
):
    path = spoiled(checkpoint, how)
    rule = "no such file: " if how == "missing" else "bad.ckpt is no checkpoint of grao"
    for command in ("validate", "fit"):
        text = complaint({}, "--ckpt_path", path, command=command)
        assert text.startswith(f"1 fault in the configuration:\n  - ckpt_path: {rule}")
    status, _, errors = grao("export", "--ckpt_path", path, "--output", "out")
    assert one_error(status, errors).startswith(
        f"1 fault in the arguments:\n  - --ckpt_path: {rule}"
    )
    assert not Path("out").exists()


def test_a_checkpoint_of_another_policy_is_refused(complaint, grao, checkpoint):
    tiny_model("Llama").save_pretrained("other")
    grao_lightning.language_model.loading.load_tokenizer("x", "embedded:keywords").save_pretrained(
        "other"
    )
    changes = {"model.init_args.policy": "./other"}
    text = complaint(changes, "--ckpt_path", str(checkpoint), command="validate")
    assert text.startswith("ckpt_path: the checkpoint is not of model.policy=./other; name the")
    assert "size mismatch" in text and "\n" not in text
    arguments = ("--ckpt_path", checkpoint, "--output", "out", "--policy", "./other")
    text = one_error(*grao("export", *arguments)[::2])
    assert text.startswith("--policy: ./other does not fit the checkpoint: size mismatch")
    assert "\n" not in text and not Path("out").exists()


def test_last_needs_a_folder_that_stays(complaint, no_model):
    text = complaint({}, "--ckpt_path", "last")
    assert "ckpt_path=last looks in last_checkpoint.dirpath, which is not set" in text
    assert "no such file: best" in complaint({}, "--ckpt_path", "best")


def test_export_leaves_a_folder_in_use_alone_and_tells_faults_together(grao, checkpoint):
    Path("out").mkdir()
    Path("out/mine").write_text("kept")
    text = one_error(*grao("export", "--ckpt_path", checkpoint, "--output", "out")[::2])
    assert text.endswith("--output: out holds files already; name a new folder")
    arguments = ("--ckpt_path", "none", "--output", "out", "--policy", "./none")
    assert one_error(*grao("export", *arguments)[::2]).startswith("3 faults in the arguments")
    assert [path.name for path in Path("out").iterdir()] == ["mine"]
    text = one_error(*grao("export", "--ckpt_path", checkpoint, "--output", "out/mine/x")[::2])
    assert text.startswith("--output: cannot make the folder out/mine/x: ")


# -- mistakes in Python ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ([1, 2], "must hold one GroupSampling; got 0"),
        ([0, 2], "must hold one GroupScoring; got 0"),
        ([0, 1], "must hold one ReferenceAwareClipping; got 0"),
        ([0, 0, 1, 2], "must hold one GroupSampling; got 2"),
        ([1, 0, 2], "must come in the order GroupSampling, GroupScoring, ReferenceAwareClipping"),
        ([2, 0, 1], "got ReferenceAwareClipping, GroupSampling, GroupScoring"),
    ],
)
def test_callbacks_missing_or_in_the_wrong_order_are_one_error_before_models_load(
    tmp_path, no_model_in_module, chosen, expected
):
    parts = stages()
    with pytest.raises(UserError, match="callbacks") as caught:
        fit(tmp_path, callbacks=[copy.copy(parts[number]) for number in chosen])
    assert expected in str(caught.value)
    assert str(caught.value).startswith("1 fault ")
    assert "GroupSampling, GroupScoring, ReferenceAwareClipping" in str(caught.value)


@pytest.fixture
def no_model_in_module(monkeypatch):
    """Make a failure of any attempt to load the policy; the data may load its tokenizer."""
    monkeypatch.setattr("grao_lightning.modules.base.load_model", lambda *_, **__: pytest.fail())


def test_faults_of_all_parts_are_told_together_in_python(tmp_path, no_model_in_module):
    with pytest.raises(UserError) as caught:
        fit(
            tmp_path,
            module=GRAOModule(policy="./none"),
            callbacks=stages(sampling={"group_size": 1})[:2],
            max_steps=-1,
        )
    text = str(caught.value)
    assert text.startswith("4 faults in the configuration:")
    for part in ("model.policy", "group_size", "got 0", "max_steps"):
        assert part in text


def test_the_checks_need_no_data_module_of_ours(tmp_path, no_model_in_module):
    run = trainer(tmp_path, callbacks=stages()[:2])
    with pytest.raises(UserError, match="one ReferenceAwareClipping"):
        run.fit(GRAOModule(), train_dataloaders=[1])


def test_a_traceback_is_shown_when_asked_for_and_for_faults_of_our_own(complaint, monkeypatch):
    monkeypatch.setenv("GRAO_TRACEBACK", "1")
    with pytest.raises(UserError, match="group_size"):
        complaint({"sampling.group_size": 1})
    monkeypatch.delenv("GRAO_TRACEBACK")
    monkeypatch.setattr(LightningModule, "log_dict", lambda *_, **__: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        complaint()
