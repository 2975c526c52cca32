"""What a run says of its prompts is what their ids say; no prompt form is taken in silence."""

import json
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from grao_lightning import PromptDataModule
from grao_lightning.display.logs import quoted
from grao_lightning.faults import UserError
from tests.data.test_encoding import CHATML, DIALOGUE, assistant, make_tokenizer, user

HH = "\n\nHuman: Hello there\n\nAssistant: I am fine.\n\nHuman: What is the name?\n\nAssistant:"
CHAT = {"prompt": DIALOGUE, "completion": [assistant("Yes, maybe.")]}
STRING = {"prompt": "The sky is", "completion": " blue"}


@pytest.fixture
def data(tmp_path, caplog):
    """Return a function: a row, the tokenizer's template, settings -> a module that was set up."""
    caplog.set_level(logging.INFO, "grao_lightning")

    def made(row: dict, template: str | None = None, **settings) -> PromptDataModule:
        folder = tmp_path / "tokenizer"
        make_tokenizer(template).save_pretrained(folder)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        module = PromptDataModule(
            train=str(path), tokenizer=str(folder), prompts_per_step=1, **settings
        )
        module.setup("fit")
        return module

    return made


def told(caplog) -> str:
    """Return what was said of the reading, its lines joined."""
    found = [m for m in caplog.messages if "prompts are read" in m]
    assert len(found) == 1
    assert all(len(line) <= 80 for line in found[0].splitlines())
    return found[0]


def ids_of(module: PromptDataModule) -> tuple[list[int], list[int]]:
    batch = next(iter(module.val_dataloader()))
    return batch.prompt_ids[0], batch.reference_answer_ids[0]


@pytest.mark.parametrize(
    ("row", "template", "settings", "expected"),
    [
        (CHAT, CHATML, {}, "by the template of the tokenizer."),
        (CHAT, None, {"chat_template": CHATML}, "by data.chat_template."),
        (CHAT, None, {"chat_template": "hh"}, "as Anthropic HH's text."),
        (
            {"prompt": HH, "completion": "Yes"},
            None,
            {},
            "as Anthropic HH's text, since the tokenizer has no template.",
        ),
        (STRING, None, {}, "as plain strings as they are."),
        (STRING, CHATML, {}, "as plain strings as they are, without the chat template"),
        (STRING, CHATML, {"as_chat": True}, "as chats of one user's turn, by the template of"),
    ],
)
def test_a_run_says_in_one_line_how_prompts_become_tokens(
    data, caplog, row, template, settings, expected
):
    data(row, template, **settings)
    said = " ".join(told(caplog).split())
    assert said.startswith(f"data.train: prompts are read {expected}")


def test_the_first_prompt_is_shown_as_its_ids_read(data, caplog):
    module = data(CHAT, CHATML)
    prompt, answer = ids_of(module)
    shown = told(caplog).split("\n")
    assert f"  prompt ({len(prompt)} tokens):" in shown
    assert shown[-1] == f'  reference answer ({len(answer)} tokens): "Yes, maybe.</s>"'
    text = "".join(line.removeprefix("    ") for line in shown if line.startswith("    "))
    assert text.strip('"').replace("\\n", "\n") == module.encoder._tokenizer.decode(prompt)
    module.setup("validate")
    told(caplog)  # said once


def test_what_truncation_left_out_and_bos_are_seen(data, caplog):
    data({"prompt": HH, "completion": "Yes"}, max_prompt_tokens=22)
    text = told(caplog)
    assert "2 oldest turns left out: data.max_prompt_tokens" in text
    assert '"<s>\\n\\nHuman: What is the name?\\n\\nAssistant:"' in text and "fine" not in text
    assert text.endswith('): " Yes</s>"')


def test_of_long_texts_the_middle_is_left_out_and_counted(data, caplog):
    module = data({"prompt": "sky blue " * 90, "completion": " green" * 90})
    prompt, answer = ids_of(module)
    text = " ".join(told(caplog).split())
    assert f"[... {len(prompt) - 80} tokens left out ...]" in text
    assert f"[... {len(answer) - 40} tokens left out ...]" in text
    assert text.endswith('green</s>"')
    assert len(told(caplog).splitlines()) < 16


@pytest.mark.parametrize(("prompt", "number"), [("Kind words cost nothing", 4), ("apple river", 0)])
def test_prompts_of_unknown_words_are_warned_of(prompt, number):
    rows = [{"prompt": prompt, "completion": "apple"}]
    data = PromptDataModule(train=rows, tokenizer="embedded:keywords", prompts_per_step=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup("fit")
    (told,) = [str(one.message) for one in caught if "unknown" in str(one.message)] or [""]
    assert told.startswith(f"data.train: {number} of the first prompt's" if number else "")
    assert bool(told) == bool(number)


def test_quoted_texts_show_what_cannot_be_seen_and_lose_nothing():
    text = "a\tb\\n \n\x1b[31m" + "word " * 40
    lines = quoted("prompt", text).split("\n")
    assert lines[0] == "  prompt:" and "\x1b" not in "".join(lines)
    shown = "".join(line[4:] for line in lines[1:])
    assert shown[0] == shown[-1] == '"'
    assert shown[1:-1].encode().decode("unicode_escape") == text
    assert max(map(len, lines)) <= 80


def test_other_ranks_say_nothing(data, caplog, monkeypatch):
    module = PromptDataModule(tokenizer="embedded:keywords")
    module.trainer = SimpleNamespace(global_rank=1, lightning_module=None)
    module.setup("validate")
    assert not any(part in caplog.text for part in ("Read ", "prompts are read"))


# -- the form is never chosen in silence -----------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "settings", "holds"),
    [(CHAT, {}, "messages with roles"), (STRING, {"as_chat": True}, "strings made chats by")],
)
def test_chats_without_a_template_ask_for_a_decision(data, row, settings, holds):
    with pytest.raises(UserError, match=r"data\.chat_template must be set") as caught:
        data(row, **settings)
    for part in (holds, "data.train", "Jinja text or a file of it", "hh for Anthropic HH's text"):
        assert part in str(caught.value)


def test_hh_for_messages_gives_the_ids_of_hh_strings(data):
    strings = data({"prompt": HH, "completion": "Yes, maybe."})
    assert ids_of(data(CHAT, chat_template="hh")) == ids_of(strings)
    # Also where the tokenizer has a template of its own.
    assert ids_of(data(CHAT, CHATML, chat_template="hh")) == ids_of(strings)


def test_a_template_in_a_file_is_that_text(data, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML)
    module = data(CHAT, chat_template=str(path))
    assert ids_of(module) == ids_of(data(CHAT, chat_template=CHATML))
    assert module.template_in_use == CHATML


def test_a_template_that_is_neither_text_nor_file_is_a_fault():
    (fault,) = PromptDataModule(chat_template="none.jinja").faults()
    assert fault.startswith("data.chat_template must be Jinja text, a file of it, or hh")
    assert "'none.jinja'" in fault and str(Path.cwd()) in fault
    assert not PromptDataModule(chat_template="hh").faults()


def test_as_chat_makes_of_strings_what_messages_are(data):
    strings = data(
        {"prompt": "The sky is ", "chosen": " blue", "rejected": " green"}, CHATML, as_chat=True
    )
    turns = {"chosen": [assistant("blue")], "rejected": [assistant("green")]}
    messages = data({"prompt": [user("The sky is")], **turns}, CHATML)
    assert strings.examples == messages.examples and ids_of(strings) == ids_of(messages)


def test_settings_without_effect_are_said(data):
    with pytest.warns(UserWarning, match="data.as_chat has no effect"):
        data(CHAT, CHATML, as_chat=True)
    with pytest.warns(UserWarning, match="data.chat_template has no effect on prompts that are"):
        data(STRING, chat_template=CHATML)
