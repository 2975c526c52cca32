"""Prompts and reference answers -> token ids, with one Hugging Face tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from grao_lightning.batch import Completions, PromptBatch
from grao_lightning.data.templates import hh_template, is_hh
from grao_lightning.data.turns import Message
from grao_lightning.faults import UserError

_HH_MARKERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
_HH_CUE = "\n\nAssistant:"
_HH_MARKER = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the policy sees it.

    Attributes:
        ids: Token ids, special tokens included.
        text: What the ids say, without special tokens the tokenizer adds by itself.
        truncated_turns: Oldest turns dropped to fit `max_prompt_tokens`.
        truncated_text: Whether text was cut too, since the last turn alone (or a plain string) did
            not fit.
    """

    ids: list[int]
    text: str
    truncated_turns: int = 0
    truncated_text: bool = False


class PromptEncoder:
    """Encodes prompts and answers so that prompt ids + answer ids are the text's natural tokens.

    Conversations go through the chat template, whose text alone decides the special tokens: BOS is
    there once or, where the template has none, not at all. Without a template they take Anthropic
    HH's form ("\\n\\nHuman: ...\\n\\nAssistant:") after the tokenizer's own BOS. Plain strings get
    the tokenizer's BOS, unless they begin with it, and never its EOS.

    Args:
        tokenizer: A Hugging Face tokenizer with an EOS token.
        max_prompt_tokens: Longer prompts are cut from the left; None keeps all.
        chat_template: Jinja text instead of the tokenizer's own template, or "hh" for
            Anthropic HH's form.
        eos_ids: Further ids that end a turn, such as the generation config's.

    Attributes:
        end_of_turn_id: Ends every answer: the first EOS the template puts after an answer, or the
            tokenizer's.
        form: How conversations become text, in words.
        is_undecided: Whether conversations take HH's form for want of a template alone.

    Raises:
        UserError: No EOS id at all, `max_prompt_tokens` leaves no room for text, or a template
            that cannot render one question and its answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_prompt_tokens: int | None,
        chat_template: str | None = None,
        eos_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        own = tokenizer.chat_template
        self._chat_template = chat_template
        self._has_template = bool(chat_template or own) and not is_hh(chat_template or own)
        self.is_undecided = not (chat_template or own)
        self.form = _form(chat_template, own)
        self._bos_ids = self._ids_before_text()
        if max_prompt_tokens is not None and max_prompt_tokens <= len(self._bos_ids):
            raise UserError(
                f"data.max_prompt_tokens must be > {len(self._bos_ids)}, the tokens a tokenizer "
                f"puts before any text; got {max_prompt_tokens}"
            )
        known_eos = [
            *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]),
            *eos_ids,
        ]
        if not known_eos:
            raise UserError(
                "the tokenizer must have an eos_token, which ends every answer; got None: set "
                "tokenizer.eos_token"
            )
        self.end_of_turn_id: int = known_eos[0]
        self._answer_lead = " "  # white space between a conversation's prompt and the answer
        if self._has_template:
            self._probe_template(known_eos)

    @property
    def unknown_id(self) -> int | None:
        """Return the id of words that the tokenizer does not know, None where it spells them."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        word = self._tokenizer.unk_token or getattr(
            getattr(backend, "model", None), "unk_token", None
        )
        found: int | None = None if word is None else self._tokenizer.convert_tokens_to_ids(word)
        return found

    @property
    def template(self) -> str | None:
        """Return the template that makes any conversation the text that this encoder reads."""
        if self._has_template:
            return str(self._chat_template or self._tokenizer.get_chat_template())
        return hh_template(has_bos=bool(self._bos_ids))

    def as_read(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Return what ids say, special tokens included.

        Args:
            ids: Of a prompt or an answer.
            after: What they follow: some tokenizers leave out a space at the start of a text.
        """
        return text_of(self._tokenizer, ids, after)

    def encode_prompt(
        self, prompt: str | Sequence[Message], max_tokens: int | None = None
    ) -> EncodedPrompt:
        """Returns a prompt's ids, at most `max_prompt_tokens` of them.

        Conversations lose whole turns, the oldest first, until a user's turn comes first and the
        rest fits; system messages stay. Only if the last turn alone does not fit, its text is cut
        from the left. Strings are cut from the left at tokens, keeping BOS.

        Args:
            prompt: A string, or messages that end with the user's turn.
            max_tokens: A lower bound for this prompt alone.

        Raises:
            UserError: The template refuses the conversation, or system messages and template
                leave no room for a question.
        """
        if max_tokens is not None:
            bounds = [max_tokens, *filter(None, [self._max_prompt_tokens])]
            bounded = copy(self)
            bounded._max_prompt_tokens = min(bounds)
            return bounded.encode_prompt(prompt)
        if isinstance(prompt, str):
            return self._encode_string(prompt)
        encoded = self._encode_conversation(prompt)
        if self._fits(encoded):
            return encoded
        dropped, kept = 0, list(prompt)
        later = [i for i, turn in enumerate(prompt) if turn["role"] != "system"][1:]
        for start in [i for i in later if prompt[i]["role"] == "user"]:
            kept = [turn for i, turn in enumerate(prompt) if i >= start or turn["role"] == "system"]
            dropped = len(prompt) - len(kept)
            encoded = self._encode_conversation(kept, truncated_turns=dropped)
            if self._fits(encoded):
                return encoded
        return self._cut_last_turn(kept, dropped)

    def encode_answer(self, text: str, prompt: str | Sequence[Message] = ()) -> list[int]:
        """Returns an answer's ids, never cut, and the end-of-turn id.

        Special tokens written out in the text stay text.

        Args:
            text: The answer.
            prompt: What it answers. Only strings matter: text after a string is joined to it as it
                is, save for the usual space after "Assistant:"; every conversation ends alike.
        """
        if not text:
            return [self.end_of_turn_id]
        lead = self._answer_lead
        if isinstance(prompt, str):
            lead = " " if prompt.endswith("Assistant:") and not text[0].isspace() else ""
        # Tokenised after a line break, which is taken off again: alone, the answer would be the
        # start of a text, and many tokenizers put a space before that.
        before_ids, ids = self._plain_ids("\n"), self._plain_ids("\n" + lead + text)
        one_token_spans_both = ids[: len(before_ids)] != before_ids
        # An unknown line break may be fused with an unknown first word.
        if one_token_spans_both or self._tokenizer.unk_token_id in before_ids:
            ids = self._plain_ids(lead + text)
        else:
            ids = ids[len(before_ids) :]
        return [*ids, self.end_of_turn_id]

    def _encode_string(self, text: str) -> EncodedPrompt:
        # A string may hold a conversation rendered elsewhere, so its special tokens are real.
        ids = self._ids(text)
        num_bos = len(self._bos_ids)
        if ids[:num_bos] == self._bos_ids:
            ids = ids[num_bos:]
        encoded = EncodedPrompt([*self._bos_ids, *ids], text)
        if self._max_prompt_tokens is None or self._fits(encoded):
            return encoded
        ids = ids[len(ids) - (self._max_prompt_tokens - num_bos) :]
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return EncodedPrompt([*self._bos_ids, *ids], text, truncated_text=True)

    def _encode_conversation(self, turns: Sequence[Message], **counts: Any) -> EncodedPrompt:
        if self._has_template:
            text = self._render(turns, add_generation_prompt=True)
            return EncodedPrompt(self._ids(text), text, **counts)
        text = conversation_text(turns)
        return EncodedPrompt([*self._bos_ids, *self._plain_ids(text)], text, **counts)

    def _cut_last_turn(self, turns: list[Message], dropped: int) -> EncodedPrompt:
        """Returns the longest end of the last turn's text that fits, with the system messages."""
        *before, last = turns

        def encode(start: int) -> EncodedPrompt:
            end_of_text = {**last, "content": last["content"][start:]}
            return self._encode_conversation(
                [*before, end_of_text], truncated_turns=dropped, truncated_text=True
            )

        too_long, fitting = 0, len(last["content"]) - 1
        encoded = encode(fitting)
        if not self._fits(encoded):
            raise UserError(
                f"data.max_prompt_tokens must be >= {len(encoded.ids)}, which system messages, "
                f"template and one character take; got {self._max_prompt_tokens}: raise it"
            )
        while fitting - too_long > 1:
            middle = (too_long + fitting) // 2
            candidate = encode(middle)
            if self._fits(candidate):
                fitting, encoded = middle, candidate
            else:
                too_long = middle
        return encoded

    def _fits(self, encoded: EncodedPrompt) -> bool:
        return self._max_prompt_tokens is None or len(encoded.ids) <= self._max_prompt_tokens

    def _render(self, turns: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(turns),
                    chat_template=self._chat_template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(
                f"the chat template refuses a conversation of the roles {roles}: {error}; change "
                "the data or set data.chat_template"
            ) from None

    def _probe_template(self, known_eos: Sequence[int]) -> None:
        """Reads off one rendered answer what comes before and after any answer's text."""
        question, answer = {"role": "user", "content": "Hi"}, "grao-probe-answer"
        prompt = self._render([question], add_generation_prompt=True)
        dialogue = self._render(
            [question, {"role": "assistant", "content": answer}], add_generation_prompt=False
        )
        before, found, after = dialogue.rpartition(answer)
        if not found:
            raise UserError(
                "the chat template must render an assistant's turn as it is written; got "
                f"{dialogue!r}: set data.chat_template"
            )
        self.end_of_turn_id = next(
            (number for number in self._ids(after) if number in known_eos), known_eos[0]
        )
        # Only white space: more (an empty thought, say) is for the policy to write or not.
        lead = before.removeprefix(prompt)
        self._answer_lead = lead if before.startswith(prompt) and lead.isspace() else ""

    def _ids_before_text(self) -> list[int]:
        """Returns what the tokenizer puts before a text by itself: BOS, if anything."""
        text = self._plain_ids("a")
        whole = self._tokenizer("a", verbose=False).input_ids
        start = next(i for i in range(len(whole) + 1) if whole[i : i + len(text)] == text)
        return list(whole[:start])

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _plain_ids(self, text: str) -> list[int]:
        """Returns ids of a text in which special tokens written out are just characters."""
        return list(
            self._tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, verbose=False
            ).input_ids
        )


def text_of(tokenizer: Any, ids: Sequence[int], after: Sequence[int] = ()) -> str:
    """Return what ids say, special tokens included; see `PromptEncoder.as_read`."""

    def decoded(numbers: list[int]) -> str:
        return str(
            tokenizer.decode(numbers, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    before, whole = decoded(list(after)), decoded([*after, *ids])
    # A character may lie across the two.
    return whole[len(before) :] if whole.startswith(before) else decoded(list(ids))


def batch_as_read(batch: PromptBatch, tokenizer: Any) -> PromptBatch:
    """Return a batch whose texts are what the ids say, special tokens included.

    Args:
        batch: Sampled.
        tokenizer: Of the policy.
    """

    def texts_of(completions: Completions) -> list[str]:
        owners = [number // completions.group_size for number in range(len(completions.ids))]
        return [
            text_of(tokenizer, ids, batch.prompt_ids[owner])
            for ids, owner in zip(completions.ids, owners, strict=True)
        ]

    answers = zip(batch.reference_answer_ids, batch.prompt_ids, strict=True)
    sampled = {
        name: replace(completions, texts=texts_of(completions))
        for name in ("completions", "base_completions")
        if (completions := getattr(batch, name)) is not None
    }
    return replace(
        batch,
        prompts=[text_of(tokenizer, ids) for ids in batch.prompt_ids],
        reference_answers=[text_of(tokenizer, ids, prompt) for ids, prompt in answers],
        **sampled,
    )


def _form(chat_template: str | None, own: Any) -> str:
    if chat_template:
        return "as Anthropic HH's text" if is_hh(chat_template) else "by data.chat_template"
    if not own:
        return "as Anthropic HH's text, since the tokenizer has no template"
    if is_hh(own):
        return "as Anthropic HH's text, as the tokenizer's template has it"
    return "by the template of the tokenizer"


def conversation_text(prompt: str | Sequence[Message]) -> str:
    """Returns a prompt as text, conversations in Anthropic HH's form, ending in "Assistant:".

    System messages stand before it as they are.

    >>> conversation_text([{"role": "user", "content": "Hello"}])
    '\\n\\nHuman: Hello\\n\\nAssistant:'
    """
    if isinstance(prompt, str):
        return prompt
    return "".join(_HH_MARKERS[turn["role"]] + turn["content"] for turn in prompt) + _HH_CUE


def conversation_of(text: str) -> str | list[Message]:
    """Returns the messages that `conversation_text` wrote, or a string of another form as it is.

    >>> conversation_of("\n\nHuman: Hello\n\nAssistant:")
    [{'role': 'user', 'content': 'Hello'}]
    """
    system, *parts = _HH_MARKER.split(text)
    if "Human" not in parts or not text.endswith(_HH_CUE):
        return text
    turns = [{"role": "system", "content": system}] if system else []
    turns += [
        {"role": _HH_ROLES[marker], "content": content.removeprefix(" ")}
        for marker, content in zip(parts[:-2:2], parts[1:-2:2], strict=True)
    ]
    return turns
