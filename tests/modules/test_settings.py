"""Every setting is seen: by inspect and help, by an editor, by a type checker, and by its typos."""

import inspect
import subprocess
import sys
from typing import get_type_hints

import jedi
import pytest

import grao_lightning
from grao_lightning import (
    DPOModule,
    GRAOModule,
    GroupSampling,
    GroupScoring,
    GRPOModule,
    PPOModule,
    PromptDataModule,
    ReferenceAwareClipping,
    RewardModule,
    RewardSpec,
    SFTModule,
    make_trainer,
)
from grao_lightning.modules.base import AlignmentModule, AlignmentSettings
from grao_lightning.modules.rollout import RolloutModule, RolloutSettings
from grao_lightning.modules.step import StepModule, StepSettings

MODULES = (GRAOModule, GRPOModule, PPOModule, DPOModule, SFTModule, RewardModule)
OF_ALL = {"learning_rate", "schedule", "micro_batch_tokens", "share_prompts"}


@pytest.mark.parametrize("module", MODULES)
def test_signature_and_docstring_tell_every_setting_once(module):
    parameters = inspect.signature(module).parameters
    own = "backbone" if module is RewardModule else "policy"
    assert {*OF_ALL, own} <= set(parameters)
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert parameters["learning_rate"].default == 1e-6
    for name in parameters:
        assert module.__doc__.count(f"\n        {name}: ") == 1, name


def test_a_subclass_of_ones_own_shows_its_own_settings_and_may_pass_on_any():
    class Inherits(GRAOModule):
        pass

    class Passes(GRAOModule):
        def __init__(self, extra: int = 1, **others):
            super().__init__(**others)

    assert inspect.signature(Inherits) == inspect.signature(GRAOModule)
    assert list(inspect.signature(Passes).parameters) == ["extra", "others"]
    module = Passes(extra=2, learning_rate=0.5)
    assert (module.learning_rate, module.hparams.extra) == (0.5, 2)
    with pytest.raises(TypeError, match="learnin_rate"):
        Passes(learnin_rate=1)


@pytest.mark.parametrize(
    ("module", "settings", "before"),
    [
        (StepModule, StepSettings, set()),
        (AlignmentModule, AlignmentSettings, set(get_type_hints(StepSettings))),
        (RolloutModule, RolloutSettings, set(get_type_hints(AlignmentSettings))),
    ],
)
def test_what_editors_are_told_are_the_settings_and_their_types(module, settings, before):
    own = {
        name: parameter.annotation
        for name, parameter in inspect.signature(module.__init__).parameters.items()
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
    }
    told = {name: kind for name, kind in get_type_hints(settings).items() if name not in before}
    assert told == own


@pytest.mark.parametrize(
    ("called", "wrong", "meant"),
    [
        (GRAOModule, "learnin_rate", "learning_rate"),
        (RewardModule, "back_bone", "backbone"),
        (GroupSampling, "grup_size", "group_size"),
        (GroupScoring, "reward", "rewards"),
        (ReferenceAwareClipping, "maxnorm", "max_norm"),
        (PromptDataModule, "trian", "train"),
        (RewardSpec, "functon", "function"),
        (make_trainer, "max_step", "max_steps"),
    ],
)
def test_a_misspelt_keyword_names_the_one_meant(called, wrong, meant):
    name = called.__name__
    with pytest.raises(TypeError, match=rf"^{name}\(\) .*'{wrong}'; did you mean {meant}\?$"):
        called(**{wrong: 1, **({"max_steps": 1} if called is make_trainer else {})})


def test_an_unlike_keyword_lists_those_there_are():
    with pytest.raises(TypeError, match="no keyword 'colour'; there are max_norm, drift_target"):
        ReferenceAwareClipping(colour=1)


def test_an_editor_completes_the_settings_of_the_base():
    script = jedi.Script("import grao_lightning\ngrao_lightning.GRAOModule(learn")
    assert [found.name for found in script.complete()] == ["learning_rate="]


def test_a_type_checker_catches_a_misspelt_and_a_mistyped_keyword(tmp_path, repository):
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n"
        "[mypy-torch.*,lightning.*,transformers.*,datasets.*,torchmetrics.*,numpy.*]\n"
        "follow_imports = skip\n"  # they would take half a minute
    )
    (tmp_path / "script.py").write_text(
        "from grao_lightning import GRAOModule, GroupSampling\n"
        "GRAOModule(learnin_rate=1.0)\n"
        'GRAOModule(learning_rate="fast")\n'
        "GroupSampling(grup_size=4)\n"
        'GRAOModule(learning_rate=1e-3, gate=False, policy="base")\n'
    )
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "script.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(repository), "PATH": ""},
        capture_output=True,
        text=True,
    )
    found = [line for line in result.stdout.splitlines() if "error:" in line]
    assert len(found) == 3, result.stdout + result.stderr
    for line, part in zip(found, ("learning_rate", "expected", "group_size"), strict=True):
        assert part in line


def test_dir_lists_the_public_names_and_each_can_be_had():
    assert set(grao_lightning.__all__) <= set(dir(grao_lightning))
    for name in grao_lightning.__all__:
        assert getattr(grao_lightning, name) is not None


def test_static_tools_are_told_of_every_public_name():
    script = jedi.Script("from grao_lightning import ")
    told = {found.name for found in script.complete()}
    assert set(grao_lightning.__all__) <= told
