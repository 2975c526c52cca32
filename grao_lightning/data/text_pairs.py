"""Prompts and answers -> token ids as encoders such as BERT read them: a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grao_lightning.data.encoding import EncodedPrompt, PromptEncoder, conversation_text
from grao_lightning.data.templates import is_hh
from grao_lightning.data.turns import Message
from grao_lightning.faults import UserError


class TextPairEncoder(PromptEncoder):
    """Encodes so that prompt ids + answer ids are what the tokenizer makes of a pair of texts.

    For BERT that is ``[CLS] prompt [SEP]`` + ``answer [SEP]``. Conversations are written in
    Anthropic HH's form, since encoders have no chat template. Too long prompts lose their oldest
    turns, then the start of the last one.

    Args:
        tokenizer: A Hugging Face tokenizer whose texts start with a token of their own.
        max_prompt_tokens: Longer prompts are cut from the left; None keeps all.
        chat_template: "hh" where HH's form was chosen, and not only taken for want of a template.

    Raises:
        UserError: `max_prompt_tokens` leaves no room for text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_prompt_tokens: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.is_undecided = not (chat_template or tokenizer.chat_template)
        self.form = "as pairs of texts, conversations as Anthropic HH's text"
        self._max_prompt_tokens = max_prompt_tokens
        whole = list(tokenizer("a", "a", verbose=False).input_ids)
        text = self._plain_ids("a")
        first, last = _places(whole, text)
        self._bos_ids = whole[:first]
        self._between = whole[first + len(text) : last]
        self._end = whole[last + len(text) :]
        special = len(self._bos_ids) + len(self._between)
        if max_prompt_tokens is not None and max_prompt_tokens <= special:
            raise UserError(
                f"data.max_prompt_tokens must be > {special}, the tokens a tokenizer puts around a "
                f"first text; got {max_prompt_tokens}"
            )

    @property
    def template(self) -> str | None:
        """Return None: a template cannot write pairs of texts."""
        return None

    def encode_answer(self, text: str, prompt: str | Sequence[Message] = ()) -> list[int]:
        """Returns an answer's ids, never cut, and what ends a pair."""
        return [*self._plain_ids(text), *self._end]

    def _encode_string(self, text: str) -> EncodedPrompt:
        ids = self._plain_ids(text)
        whole = [*self._bos_ids, *ids, *self._between]
        if self._max_prompt_tokens is None or len(whole) <= self._max_prompt_tokens:
            return EncodedPrompt(whole, text)
        ids = ids[len(whole) - self._max_prompt_tokens :]
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return EncodedPrompt([*self._bos_ids, *ids, *self._between], text, truncated_text=True)

    def _encode_conversation(self, turns: Sequence[Message], **counts: Any) -> EncodedPrompt:
        text = conversation_text(turns)
        return EncodedPrompt(
            [*self._bos_ids, *self._plain_ids(text), *self._between], text, **counts
        )


def encoder_for(
    tokenizer: Any,
    *,
    max_prompt_tokens: int | None,
    chat_template: str | None = None,
    eos_ids: Sequence[int] = (),
) -> PromptEncoder:
    """Returns the encoder for a tokenizer: pairs of texts where each starts with a token like CLS.

    Args:
        tokenizer: A Hugging Face tokenizer.
        max_prompt_tokens: Longer prompts are cut from the left; None keeps all.
        chat_template: Jinja text instead of the tokenizer's own template, or "hh" for
            Anthropic HH's form.
        eos_ids: Further ids that end a turn.

    Raises:
        UserError: As the encoders say.
    """
    template = chat_template or tokenizer.chat_template
    if tokenizer.cls_token_id is not None and (not template or is_hh(template)):
        return TextPairEncoder(
            tokenizer, max_prompt_tokens=max_prompt_tokens, chat_template=chat_template
        )
    return PromptEncoder(
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        chat_template=chat_template,
        eos_ids=eos_ids,
    )


def _places(whole: list[int], text: list[int]) -> tuple[int, int]:
    """Returns where a text stands first and last in a list of ids."""
    starts = range(len(whole) - len(text) + 1)
    found = [start for start in starts if whole[start : start + len(text)] == text]
    return found[0], found[-1]
