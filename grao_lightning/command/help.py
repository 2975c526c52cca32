"""``grao fit --help``: our own settings, a line each, without waiting for torch."""

import argparse
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import yaml

from grao_lightning.command.parse_errors import settings_before_parsing, unknown_module
from grao_lightning.command.signatures import Setting, module_names, settings_of
from grao_lightning.faults import UserError

_WIDTH = 80
_INDENT = 2
_SHOWN_BY_DEFAULTS = ("int", "float", "bool", "str", "list")
_SAYS_SOMETHING = 20  # characters
_LEFT = 28  # most columns of a name and its default, before what it means moves to the next line


_SECTIONS = {
    "data": ("Prompts and reference answers", "grao_lightning.PromptDataModule"),
    "sampling": ("Completions, a group for each prompt", "grao_lightning.GroupSampling"),
    "scoring": ("Rewards and advantages", "grao_lightning.GroupScoring"),
    "clipping": ("Of the gradient and of drift", "grao_lightning.ReferenceAwareClipping"),
}
_COMMANDS = {
    "fit": "Train. Ctrl-C stops a run, and --ckpt_path goes on from its last.ckpt.",
    "validate": "Measure the policy, or with --ckpt_path a checkpoint, on held-out prompts.",
}
_GENERAL = (
    Setting("config", "FILE", None, "settings in YAML; grao init writes one"),
    Setting("ckpt_path", "PATH", None, "checkpoint to go on from, or to measure"),
    Setting("seed_everything", "int", "0", "of everything that is random"),
    Setting("print_config", "", None, "show all settings with their values, and stop"),
    Setting("help-all", "", None, "all that there is to say, also of Trainer's settings"),
)
_LIGHTNINGS = {
    "trainer": "Lightning's Trainer",
    "best_checkpoint": "The weights with the best figure, best.ckpt",
    "last_checkpoint": "What a run goes on from, last.ckpt",
}
_FOOT = """\
Trainer's settings and those of checkpoints: --help-all. The most used:
  --trainer.max_steps N             steps of a run; must be set
  --trainer.val_check_interval N    steps between validations
  --trainer.precision bf16-mixed    or 32-true, bf16-true
  --trainer.devices N               and --trainer.strategy ddp; large: fsdp2
  --last_checkpoint.dirpath FOLDER  that stays the same from run to run
"""


class OneLine(argparse.HelpFormatter):
    """The same look for the commands whose settings are few."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_LEFT, width=_WIDTH)


def show_help(command: str, arguments: Sequence[str]) -> None:
    """Print the help of ``fit`` or ``validate``.

    Args:
        command: Of the two.
        arguments: After it: they may choose a module, by ``--model`` or in a config file.

    Raises:
        UserError: There is no such module.
    """
    print(help_text(command, chosen_module(arguments)), end="")


def chosen_module(arguments: Sequence[str]) -> str:
    """Return the module that arguments choose, by ``--model`` or in a config file.

    Raises:
        UserError: A config file cannot be read.
    """
    found = settings_before_parsing(arguments).get("model")
    if isinstance(found, dict):
        found = found.get("class_path")
    return str(found or module_names()[0])


def module_settings(name: str) -> list[Setting]:
    """Return the settings of a module, by its short name or dotted path.

    Raises:
        UserError: There is no such module.
    """
    try:
        return settings_of(name)
    except UserError:
        raise UserError(unknown_module(name)) from None


def help_text(command: str, module: str, *, whole: bool = False) -> str:
    """Return the help of ``fit`` or ``validate`` with the settings of a module.

    Args:
        command: Of the two.
        module: Its short name or dotted path.
        whole: Whether all is said of each setting.

    Raises:
        UserError: There is no such module.
    """
    lines = [
        f"usage: grao {command} --config FILE [--model MODULE] [--SECTION.NAME VALUE ...]",
        "",
        _COMMANDS[command],
        "A setting stands in the file or, as --SECTION.NAME VALUE, on the command line,",
        "which wins. Below: name=default (type, where the default does not show it).",
        "",
        *setting_lines(_GENERAL, "--"),
        "",
        f"model: Settings of {module.rpartition('.')[2]}",
        *setting_lines(module_settings(module), whole=whole),
        "  --model chooses another one; its settings: --help --model NAME",
        *textwrap.wrap(
            f"{', '.join(module_names())}, or package.module.Class of your own",
            _WIDTH,
            initial_indent="    ",
            subsequent_indent="    ",
        ),
    ]
    for section, (title, owner) in _SECTIONS.items():
        settings = settings_of(owner)
        if section == "data":  # it is the model's
            settings = [setting for setting in settings if setting.name != "tokenizer"]
        lines += ["", f"{section}: {title}", *setting_lines(settings, whole=whole)]
    return "\n".join([*lines, "", "" if whole else _FOOT])


def trainer_text(parser: Any) -> str:
    """Return the settings of Trainer and checkpoints, as the parser of a command knows them."""
    lines = []
    for section, title in _LIGHTNINGS.items():
        settings = [
            Setting(
                action.dest.removeprefix(f"{section}."), "", _shown(action.default), action.help
            )
            for action in parser._actions
            if action.dest.startswith(f"{section}.") and not action.dest.endswith(".help")
        ]
        lines += ["", f"{section}: {title}", *setting_lines(settings, whole=True)]
    return "\n".join([*lines, ""])


def setting_lines(
    settings: Sequence[Setting], prefix: str = "", *, whole: bool = False
) -> list[str]:
    """Return a line for each setting: name and default, type, and what it means in one sentence.

    Args:
        settings: In the order of the lines.
        prefix: Before each name.
        whole: Whether all is said that the docstring says, in as many lines as it takes.
    """
    lefts = [
        prefix + setting.name + ("" if setting.default is None else f"={setting.default}")
        for setting in settings
    ]
    column = _INDENT + min(max(map(len, lefts), default=0), _LEFT) + 2
    lines = []
    for setting, left in zip(settings, lefts, strict=True):
        plain = not whole and setting.default is not None and setting.form in _SHOWN_BY_DEFAULTS
        form = f"({setting.form}) " if setting.form and not plain else ""
        first = (" " * _INDENT + left + "  ").ljust(column)
        room = _WIDTH - len(first) - len(form)
        lines += textwrap.wrap(
            form + (setting.meaning if whole else gist(setting.meaning, room)),
            _WIDTH,
            initial_indent=first,
            subsequent_indent=" " * column,
            break_on_hyphens=False,
            break_long_words=False,
        ) or [first.rstrip()]
    return lines


def gist(meaning: str, room: int) -> str:
    """Return as much of a text's first sentence as has room, without what only explains it.

    >>> gist("Most padded tokens in one pass; lower it when memory runs out. Or not.", 60)
    'Most padded tokens in one pass'
    >>> gist("Most padded tokens in one pass; lower it when memory runs out. Or not.", 80)
    'Most padded tokens in one pass; lower it when memory runs out'
    """
    bare = re.sub(r"``?([^`]*)``?", r"\1", meaning)
    sentence = re.split(r"\.\s+(?=[A-Z1-9\"])", bare, maxsplit=1)[0].rstrip(".")
    marks = re.finditer(
        r"; |: | \((?=[A-Za-z]{2})|, (?=such|that|which|see|its|to|on|from|so)", sentence
    )
    ends = [mark.start() for mark in marks if mark.start() >= _SAYS_SOMETHING]
    parts = [sentence, *(sentence[:end] for end in reversed(ends))]
    return next((part for part in parts if len(part) <= room), parts[-1])


def _shown(value: Any) -> str:
    """Return a default as YAML writes it, short where it is a part of its own."""
    if isinstance(value, list | dict) or hasattr(value, "as_dict"):
        return "..." if value else "[]"
    return value if isinstance(value, str) else yaml.safe_dump(value).removesuffix("\n...\n")
