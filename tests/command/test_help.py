"""The help of the commands: our own settings first, told from source as the parser knows them."""

import re
import subprocess
import sys
import time
from pathlib import Path

import jsonargparse
import pytest
import yaml

import grao_lightning
from grao_lightning.__main__ import main
from grao_lightning.command.fit import GRAOCommandLine
from grao_lightning.command.help import gist, help_text
from grao_lightning.command.parse_errors import unknown_module
from grao_lightning.command.signatures import module_names, settings_of

STAGES = ["PromptDataModule", "GroupSampling", "GroupScoring", "ReferenceAwareClipping"]


@pytest.fixture
def grao(monkeypatch, capsys, tmp_path):
    """Return a function: arguments -> exit status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["grao", *arguments])
        capsys.readouterr()
        try:
            status = main()
        except SystemExit as stopped:
            status = stopped.code or 0
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", [*module_names(), *STAGES])
def test_the_settings_told_are_those_the_parser_takes_with_their_defaults(name):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(grao_lightning, name), "part", fail_untyped=False)
    taken = parser.get_defaults().part.as_dict()
    told = {setting.name: setting for setting in settings_of(f"grao_lightning.{name}")}
    assert list(told) == list(taken)
    for setting, default in taken.items():
        shown = told[setting].default
        default = list(default) if isinstance(default, tuple) else default
        assert shown == default or yaml.safe_load(shown) == default, setting
        assert told[setting].meaning, f"{setting} has no line in Args"
        assert told[setting].form, setting


def test_the_choices_of_a_setting_are_told():
    told = {setting.name: setting.form for setting in settings_of("grao_lightning.GRPOModule")}
    assert told["schedule"] == "constant|linear|cosine"
    assert told["ratio"] == "token|sequence"
    assert told["reference_model"] == "str|null"
    scoring = {setting.name: setting.form for setting in settings_of("grao_lightning.GroupScoring")}
    assert scoring["statistics"] == "inside|outside|split|null"
    assert scoring["rewards"] == "list|null", "as a config can hold it"


def test_help_begins_with_our_settings_fits_80_columns_and_leaves_lightnings_to_help_all():
    text = help_text("fit", "GRPOModule")
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("usage: grao fit --config FILE")
    sections = re.findall(r"^(\w+): ", text, re.MULTILINE)
    assert sections == ["usage", "model", "data", "sampling", "scoring", "clipping"]
    names = re.findall(r"^  (\w+)=", text, re.MULTILINE)
    assert {"ratio", "learning_rate", "prompts_per_step", "group_size", "max_norm"} <= set(names)
    assert not {"gate", "max_epochs", "save_top_k"} & set(names)
    assert "tokenizer=" not in text.partition("data: ")[2], "the model's own"
    assert all(name in text for name in module_names())
    lines = text.splitlines()
    assert "  micro_batch_tokens=null       (int|null) Most padded tokens in one pass" in lines
    wrapped = [line for line in lines if line.startswith(" " * 20)]
    assert len(wrapped) < len(names) / 2, "most settings have a line of their own"


def test_help_names_the_settings_of_the_chosen_module(grao):
    Path("my.yaml").write_text("model: {class_path: grao_lightning.PPOModule}\n")
    for arguments, own in (
        ((), "gate=true"),
        (("--model", "GRPOModule"), "ratio=token"),
        (("--model=GRPOModule",), "ratio=token"),
        (("--config", "my.yaml"), "value_weight=0.5"),
        (("--config", "my.yaml", "--model", "DPOModule"), "kind=sigmoid"),
    ):
        for command in ("fit", "validate"):
            status, text, errors = grao(command, *arguments, "--help")
            assert status == 0, errors
            assert f"\n  {own}" in text


OWN = '''
from grao_lightning import GRAOModule

class Careful(GRAOModule):
    """Mine.

    Args:
        patience: Steps to wait.
        settings: The settings of `GRAOModule`.
    """

    def __init__(self, patience: int = 3, **settings) -> None:
        super().__init__(gate=True, **settings)
        self.patience = patience
'''


def test_a_module_of_ones_own_is_known_by_its_dotted_path(grao):
    Path("my_help_modules.py").write_text(OWN)
    status, text, _ = grao("fit", "--help", "--model", "my_help_modules.Careful")
    assert status == 0
    assert "\n  patience=3" in text and "\n  exploration_weight=1.0" in text
    assert "gate=" not in text, "it is given, not to be set"
    arguments = ("--model", "my_help_modules.Careful", "--trainer.max_steps", "1", "--print_config")
    status, text, errors = grao("fit", *arguments)
    assert status == 0, errors
    assert yaml.safe_load(text)["model"]["init_args"]["patience"] == 3


def test_a_module_is_known_by_its_short_name_on_the_command_line_and_in_yaml(grao):
    Path("short.yaml").write_text("model: GRPOModule\n")
    Path("long.yaml").write_text("model: {class_path: DPOModule, init_args: {kind: ipo}}\n")
    for arguments, expected in (
        (("--model", "SFTModule", "--model.aggregation", "answers"), ("SFTModule", "answers")),
        (("--config", "short.yaml"), ("GRPOModule", "completions")),
        (("--config", "long.yaml"), ("DPOModule", "ipo")),
    ):
        status, text, errors = grao("fit", *arguments, "--print_config")
        assert status == 0, errors
        model = yaml.safe_load(text)["model"]
        first = next(iter(model["init_args"].values()))
        assert (model["class_path"].rpartition(".")[2], first) == expected


@pytest.mark.parametrize("name", ["GRPOModul", "grpo", "grao_lightning.GRPOModul", "Nothing"])
def test_an_unknown_module_names_the_likeliest_and_all(grao, name):
    expected = f"grao: {unknown_module(name)}\n"
    assert ("did you mean GRPOModule?" in expected) == (name != "Nothing")
    assert all(known in expected for known in module_names())
    assert grao("fit", "--help", "--model", name) == (2, "", expected)
    assert grao("fit", "--model", name)[::2] == (2, expected)


def test_help_all_tells_lightnings_settings_as_the_parser_has_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grao", "fit", "--help-all", "--model", "GRPOModule"])
    with pytest.raises(SystemExit) as stopped:
        GRAOCommandLine("fit")
    text = capsys.readouterr().out
    assert not stopped.value.code
    assert re.search(r"^  val_check_interval=50  ", text, re.MULTILINE), "our default"
    for section in ("model: Settings of GRPOModule", "trainer: ", "last_checkpoint: "):
        assert f"\n{section}" in text
    assert "\n  filename=best " in text and "it when memory runs out." in text


def test_the_help_of_fit_imports_nothing_heavy_and_answers_at_once():
    code = """
import sys
from grao_lightning.__main__ import main
main()
print(*sys.modules)
"""
    seconds = []
    for _ in range(3):  # the machine may be busy: the best of three
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, "fit", "--help"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        seconds.append(time.perf_counter() - started)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[-1].split()
    assert not {"torch", "lightning", "transformers", "jsonargparse"} & set(loaded)
    assert min(seconds) < 1.0


def test_the_other_commands_help_has_the_same_look(grao):
    for command in ("init", "compare", "judge-check", "export"):
        status, text, _ = grao(command, "--help")
        assert status == 0 and text.startswith(f"usage: grao {command} ")
        assert max(map(len, text.splitlines())) <= 80
        assert re.search(r"^  -h, --help +show this help message and exit$", text, re.MULTILINE)


def test_the_gist_is_the_first_sentence_or_what_of_it_has_room():
    meaning = "Longest one, its end included: for ``data.x`` (Ab, c); see below. Default 3."
    assert gist(meaning, 80) == "Longest one, its end included: for data.x (Ab, c); see below"
    assert gist(meaning, 50) == "Longest one, its end included: for data.x (Ab, c)"
    assert gist(meaning, 45) == "Longest one, its end included: for data.x"
    assert gist(meaning, 9) == "Longest one, its end included"
