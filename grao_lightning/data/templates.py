"""Chat templates: the tokenizer's, one of the user's, or Anthropic HH's text written as one."""

from pathlib import Path
from typing import Any

from grao_lightning.faults import UserError

#: What ``data.chat_template`` is set to for Anthropic HH's text.
HH = "hh"
_BOS = "{{ bos_token }}"
_HH_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}"
    "{% elif messages and messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
)


def hh_template(*, has_bos: bool) -> str:
    """Return Anthropic HH's text as a chat template, for tokenizers that have none.

    `PromptEncoder` knows it again and writes the text itself: in a template, special tokens written
    out in a turn would be real ones.

    Args:
        has_bos: Whether the tokenizer puts its BOS before a text.
    """
    return _BOS + _HH_TEMPLATE if has_bos else _HH_TEMPLATE


def is_hh(template: Any) -> bool:
    """Return whether a template is ``hh`` or what `hh_template` wrote."""
    return isinstance(template, str) and template.removeprefix(_BOS) in (HH, _HH_TEMPLATE)


def template_text(setting: str | None) -> str | None:
    """Return the template that ``data.chat_template`` names: Jinja text as it is, or a file's.

    Raises:
        UserError: It names a file that is not there or cannot be read.
    """
    if setting is None or setting == HH or "{{" in setting or "{%" in setting:
        return setting
    fault = template_fault(setting)
    if fault:
        raise UserError(fault)
    try:
        return Path(setting).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template: {setting} cannot be read: {error}") from None


def template_fault(setting: str | None) -> str | None:
    """Return what is wrong with ``data.chat_template`` as far as can be told without rendering."""
    if setting is None or setting == HH or "{{" in setting or "{%" in setting:
        return None
    if Path(setting).expanduser().is_file():
        return None
    return (
        f"data.chat_template must be Jinja text, a file of it, or {HH} for Anthropic HH's text; "
        f"got {setting!r}, and there is no such file (looked in {Path.cwd()})"
    )


def told(template: str | None) -> str:
    """Return in a few words how prompts are read by a template; None stands for plain strings."""
    if template is None:
        return "as plain strings"
    if is_hh(template):
        return "as Anthropic HH's text"
    start = " ".join(template.split())
    return f"by the template {start if len(start) <= 60 else start[:57] + '...'}"


def template_change(before: str | None, now: str | None) -> str | None:
    """Return that a checkpoint's prompts were read by another template; None = plain strings."""
    if before == now:
        return None
    return (
        f"ckpt_path: the checkpoint learned from prompts read {told(before)}, and this run reads "
        f"them {told(now)}: set data.chat_template and data.as_chat as they were, or write a "
        "folder with grao export and train from that"
    )
