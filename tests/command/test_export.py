"""Export needs the checkpoint alone, and what it writes reads prompts as the run did."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from grao_lightning import GRAOModule, PromptDataModule, RewardModule, SFTModule
from grao_lightning.callbacks.exporting import rendered_alike
from grao_lightning.command.export import export, export_command
from grao_lightning.data.encoding import PromptEncoder
from grao_lightning.embedded.base import base_folder
from grao_lightning.embedded.keywords import keyword_rows
from grao_lightning.faults import UserError
from grao_lightning.rewards.protocol import RewardSpec
from tests.data.test_encoding import DIALOGUE, assistant, make_tokenizer
from tests.runs import fit, stages, trainer

OWN = "{% for turn in messages %}{{ turn['content'] }} <sep> {{ eos_token }}{% endfor %}"
ROWS = keyword_rows("train")[:8]
STRINGS = [
    {"prompt": row["prompt"][0]["content"], "completion": row["chosen"][0]["content"]}
    for row in ROWS
]
LENGTH = RewardSpec(
    "grao_lightning.rewards.length.LengthBand", arguments={"low": 3, "high": 5, "falloff": 4}
)
SMALL = {"max_steps": 1, "enable_checkpointing": True}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def base(folder: Path, template: str | None) -> str:
    """Write the embedded model with another chat template to a folder."""
    shutil.copytree(base_folder("keywords-random"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def stage_one(tmp_path, template=None, rows=ROWS, module=GRAOModule, **settings) -> dict:
    """Train a step, take the base away, and return the data's settings and first batch."""
    source = base(tmp_path / "base", template)
    rows = write(tmp_path / "rows.jsonl", rows)
    data = {"train": rows, "prompts_per_step": 2, **settings}
    name = "backbone" if module is RewardModule else "policy"
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="one")
    fit(
        tmp_path,
        module=module(**{name: source}),
        data={**data, "tokenizer": source},
        callbacks=[*stages(scoring={"rewards": [LENGTH]}), saver],
        **SMALL,
    )
    found = first_batch(data | {"tokenizer": source})
    shutil.rmtree(tmp_path / "base")
    return found


def first_batch(settings: dict):
    data = PromptDataModule(**settings)
    data.setup("validate")
    return next(iter(data.val_dataloader()))


STAGES = {
    "template of the tokenizer": ({"template": OWN}, None),
    "data.chat_template": ({"template": None, "chat_template": OWN}, "by the template {%"),
    "another than the tokenizer's": (
        {"template": "{{ messages[0]['content'] }}", "chat_template": OWN},
        "by the template {%",
    ),
    "HH text": ({"template": None, "chat_template": "hh"}, "as Anthropic HH's text"),
    "plain strings": ({"template": OWN, "rows": STRINGS}, None),
    "strings as chats": ({"template": OWN, "rows": STRINGS, "as_chat": True}, None),
}


@pytest.mark.parametrize("name", STAGES)
def test_the_next_stage_reads_the_prompts_as_the_one_before(tmp_path, name):
    settings, note = STAGES[name]
    before = stage_one(tmp_path, **settings)
    notes = export(str(tmp_path / "one.ckpt"), str(tmp_path / "out"))
    assert len(notes) == (note is not None) and all(note in text for text in notes)
    kept = {name: value for name, value in settings.items() if name == "as_chat"}
    after = first_batch(
        {"train": str(tmp_path / "rows.jsonl"), "tokenizer": str(tmp_path / "out"), **kept}
    )
    assert after.prompt_ids == before.prompt_ids
    assert after.reference_answer_ids == before.reference_answer_ids


def test_a_folder_made_after_its_base_is_gone_is_the_one_made_before(tmp_path):
    """From the checkpoint alone and from the named source come the same files."""
    source = base(tmp_path / "base", OWN)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="one")
    fit(
        tmp_path, module=SFTModule(policy=source), callbacks=[*stages(), saver], **SMALL,
        data={"tokenizer": source},
    )  # fmt: skip
    assert not export(str(tmp_path / "one.ckpt"), str(tmp_path / "named"), policy=source)
    shutil.rmtree(tmp_path / "base")
    assert not export(str(tmp_path / "one.ckpt"), str(tmp_path / "alone"))
    named, alone = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("named", "alone")
    )
    assert named.keys() == alone.keys() and "generation_config.json" in named
    assert [name for name in named if named[name] != alone[name]] == []


def test_a_checkpoint_of_before_is_exported_from_its_source(tmp_path, capsys):
    source = base(tmp_path / "base", OWN)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="one")
    fit(
        tmp_path, module=SFTModule(policy=source), callbacks=[*stages(), saver], **SMALL,
        data={"tokenizer": source},
    )  # fmt: skip
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert content.pop("source_files").dtype == torch.uint8 and content.pop("chat_template") == OWN
    torch.save(content, tmp_path / "old.ckpt")
    arguments = ["--ckpt_path", str(tmp_path / "old.ckpt"), "--output", str(tmp_path / "out")]
    export_command(arguments)
    assert "does not tell how its prompts were read" in " ".join(capsys.readouterr().out.split())
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(
        torch.equal(value, content["state_dict"][f"policy.{name}"])
        for name, value in weights.items()
    )
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match="--policy"):
        export(str(tmp_path / "old.ckpt"), str(tmp_path / "out2"))


def test_a_reward_model_is_exported_alike(tmp_path):
    before = stage_one(tmp_path, None, module=RewardModule, chat_template=OWN)
    (note,) = export(str(tmp_path / "one.ckpt"), str(tmp_path / "out"))
    assert "by the template" in note
    after = first_batch({"train": str(tmp_path / "rows.jsonl"), "tokenizer": str(tmp_path / "out")})
    assert after.prompt_ids == before.prompt_ids
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("post", ["<s> $A </s>", None])
def test_hh_text_as_a_template_gives_plain_hugging_face_code_the_same_ids(tmp_path, post):
    tokenizer = make_tokenizer(post=post)
    ours = PromptEncoder(tokenizer, max_prompt_tokens=None)
    expected = ours.encode_prompt(DIALOGUE).ids
    tokenizer.chat_template = ours.template
    assert rendered_alike(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    ids = plain.apply_chat_template(DIALOGUE, add_generation_prompt=True, return_dict=False)
    assert ids == expected
    answered = [*DIALOGUE, assistant("Yes")]
    ids = plain.apply_chat_template(answered, return_dict=False)
    assert ids == expected + ours.encode_answer("Yes")
    # And our own encoder knows it again: what looks like a special token in a turn stays text.
    odd = [{"role": "user", "content": "a</s>b"}]
    again = PromptEncoder(plain, max_prompt_tokens=None)
    assert again.encode_prompt(odd).ids == ours.encode_prompt(odd).ids


def test_a_tokenizer_that_renders_hh_text_otherwise_is_told_apart():
    tokenizer = make_tokenizer(post="<s> $A </s>", metaspace=True)  # marks the start of a text
    encoder = PromptEncoder(tokenizer, max_prompt_tokens=None)
    tokenizer.chat_template = encoder.template
    text = tokenizer.apply_chat_template(DIALOGUE, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids != encoder.encode_prompt(DIALOGUE).ids
    assert not rendered_alike(tokenizer)


# -- going on with another template ----------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """Return a checkpoint of the embedded task after one step."""
    folder = tmp_path_factory.mktemp("checkpoint")
    saver = ModelCheckpoint(folder, every_n_train_steps=1, filename="one")
    fit(folder, module=SFTModule(), callbacks=[*stages(), saver], **SMALL)
    return str(folder / "one.ckpt")


def test_a_run_does_not_go_on_with_another_template(tmp_path, checkpoint):
    for changes in ({"chat_template": OWN}, {"chat_template": "hh"}):
        with pytest.raises(UserError, match=r"set data\.chat_template and data\.as_chat as they"):
            fit(tmp_path, module=SFTModule(), data=changes, ckpt_path=checkpoint, max_steps=2)
    fit(tmp_path, module=SFTModule(), ckpt_path=checkpoint, max_steps=2)


def test_validation_by_another_template_says_so(tmp_path, checkpoint):
    run = trainer(tmp_path, callbacks=stages(), limit_val_batches=1)
    data = PromptDataModule(chat_template=OWN, validation_prompts=2)
    with pytest.warns(UserWarning, match="the checkpoint learned from prompts read by the templ"):
        run.validate(SFTModule(), datamodule=data, ckpt_path=checkpoint, verbose=False)


def test_a_checkpoint_is_written_though_its_tokenizer_cannot_be_kept(tmp_path, monkeypatch):
    def fail(*_) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("grao_lightning.modules.step.packed_source", fail)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="one")
    with pytest.warns(UserWarning, match="keeps no configuration and tokenizer .No space left"):
        fit(tmp_path, module=SFTModule(), callbacks=[*stages(), saver], **SMALL)
    assert "state_dict" in torch.load(tmp_path / "one.ckpt", weights_only=True)
