"""What a run says at its start: how prompts become token ids, and the first one as ids read."""

from collections import Counter
from collections.abc import Sequence

from grao_lightning.data.encoding import EncodedPrompt, PromptEncoder
from grao_lightning.data.example import Example
from grao_lightning.data.formats import HH_TEXT, MESSAGES, PLAIN
from grao_lightning.display.logs import quoted, wrapped
from grao_lightning.faults import Faults

_MOST_PROMPT_TOKENS = 80
_MOST_ANSWER_TOKENS = 40


def undecided_template(
    split: str, written: Counter[str], encoder: PromptEncoder, *, as_chat: bool
) -> str | None:
    """Return that chats would take Anthropic HH's form though nobody asked for it.

    Args:
        split: "train" or "validation".
        written: Rows by how their prompts are written, see `FormatReport`.
        encoder: Of the prompts.
        as_chat: Whether plain strings are made chats.
    """
    if not encoder.is_undecided or not (written[MESSAGES] or (as_chat and written[PLAIN])):
        return None
    holds = MESSAGES if written[MESSAGES] else "strings made chats by data.as_chat"
    return (
        f"data.chat_template must be set where the tokenizer has no chat template and data.{split} "
        f"holds {holds}; got null: give Jinja text or a file of it, or hh for Anthropic HH's text "
        "(\\n\\nHuman: ... \\n\\nAssistant: ...)"
    )


def effect_faults(written: Counter[str], *, as_chat: bool, chat_template: str | None) -> Faults:
    """Return which of the two settings have no effect on rows that are written so."""
    faults = Faults()
    if as_chat and not written[PLAIN]:
        faults.add("data.as_chat has no effect: no prompt is a plain string; remove it")
    if chat_template is not None and not as_chat and not written[MESSAGES] + written[HH_TEXT]:
        faults.add(
            "data.chat_template has no effect on prompts that are plain strings; set "
            "data.as_chat=true to make each a user's turn, or remove data.chat_template"
        )
    return faults


def unknown_words_fault(split: str, encoder: PromptEncoder, example: Example) -> str | None:
    """Return that the first prompt is mostly words that the tokenizer does not know.

    As where a small vocabulary, such as that of embedded:keywords, meets other data: all its
    prompts look alike to the model.
    """
    ids = encoder.encode_prompt(example.prompt).ids
    unknown = ids.count(encoder.unknown_id) if encoder.unknown_id is not None else 0
    if 2 * unknown <= len(ids):
        return None
    return (
        f"data.{split}: {unknown} of the first prompt's {len(ids)} tokens are unknown to the "
        "tokenizer, so the model cannot tell such prompts apart; set model.policy (or "
        "model.backbone) to a model that knows the words"
    )


def told_reading(
    split: str, written: Counter[str], encoder: PromptEncoder, example: Example, *, as_chat: bool
) -> str:
    """Return how prompts become token ids, and what the ids of the first prompt and answer say.

    Args:
        split: "train" or "validation".
        written: Rows by how their prompts are written, see `FormatReport`.
        encoder: Of the prompts.
        example: The first one.
        as_chat: Whether plain strings are made conversations.
    """
    prompt = encoder.encode_prompt(example.prompt)
    form = _form(written, encoder, as_chat=as_chat)
    lines = [
        wrapped(f"data.{split}: prompts are read {form}. The first one:"),
        quoted(_prompt_label(prompt), _excerpt(encoder, prompt.ids, (), _MOST_PROMPT_TOKENS)),
    ]
    if example.reference_answer is not None:
        ids = encoder.encode_answer(example.reference_answer, example.prompt)
        told = _excerpt(encoder, ids, prompt.ids, _MOST_ANSWER_TOKENS)
        lines.append(quoted(f"reference answer ({len(ids)} tokens)", told))
    return "\n".join(lines)


def _form(written: Counter[str], encoder: PromptEncoder, *, as_chat: bool) -> str:
    if as_chat and written[PLAIN]:
        return f"as chats of one user's turn, {encoder.form}"
    if not written[PLAIN]:
        return encoder.form
    plain = "as plain strings as they are"
    if written[MESSAGES] + written[HH_TEXT]:
        return f"{plain}, conversations {encoder.form}"
    if encoder.is_undecided:
        return plain
    return f"{plain}, without the chat template (data.as_chat=true would apply it)"


def _prompt_label(prompt: EncodedPrompt) -> str:
    cuts = []
    if prompt.truncated_turns:
        cuts.append(f"{prompt.truncated_turns} oldest turns left out")
    if prompt.truncated_text:
        cuts.append("its start cut off")
    cut = f", {' and '.join(cuts)}: data.max_prompt_tokens" if cuts else ""
    return f"prompt ({len(prompt.ids)} tokens{cut})"


def _excerpt(encoder: PromptEncoder, ids: Sequence[int], after: Sequence[int], most: int) -> str:
    """Return what ids say, the middle of many left out."""
    if len(ids) <= most:
        return encoder.as_read(ids, after)
    half = most // 2
    start, end = encoder.as_read(ids[:half], after), encoder.as_read(ids[-half:], ids[:-half])
    return f"{start} [... {len(ids) - 2 * half} tokens left out ...] {end}"
