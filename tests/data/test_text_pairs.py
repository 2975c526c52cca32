"""Pairs of texts as the tokenizer itself encodes them."""

import pytest

from grao_lightning.data.encoding import PromptEncoder, conversation_of, conversation_text
from grao_lightning.data.text_pairs import TextPairEncoder, encoder_for
from grao_lightning.embedded.base import keyword_tokenizer
from grao_lightning.faults import UserError
from tests.encoders import tiny_encoder_folder

CONVERSATION = [
    {"role": "user", "content": "apple river"},
    {"role": "assistant", "content": "bridge"},
    {"role": "user", "content": "window yarn"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_encoder_folder(tmp_path_factory.mktemp("e") / "m"))


def test_prompt_and_answer_are_the_tokenizers_own_pair(tokenizer):
    encoder = encoder_for(tokenizer, max_prompt_tokens=None)
    for prompt in ("apple river", CONVERSATION):
        own = tokenizer(conversation_text(prompt), "engine desert")
        prompt_ids = encoder.encode_prompt(prompt).ids
        answer_ids = encoder.encode_answer("engine desert", prompt)
        assert prompt_ids + answer_ids == own.input_ids
        assert own.token_type_ids == [0] * len(prompt_ids) + [1] * len(answer_ids)
    assert encoder.encode_answer("") == [tokenizer.sep_token_id]


def test_a_special_token_written_out_stays_text(tokenizer):
    encoder = TextPairEncoder(tokenizer)
    assert encoder.encode_answer("apple [SEP] river").count(tokenizer.sep_token_id) == 1


def test_a_long_prompt_loses_its_oldest_turns_and_keeps_what_stands_around_it(tokenizer):
    whole = TextPairEncoder(tokenizer).encode_prompt(CONVERSATION)
    last = TextPairEncoder(tokenizer).encode_prompt(CONVERSATION[-1:])
    for bounded, limit in (
        (TextPairEncoder(tokenizer, max_prompt_tokens=len(whole.ids) - 1), None),
        (TextPairEncoder(tokenizer), len(whole.ids) - 1),
    ):
        cut = bounded.encode_prompt(CONVERSATION, limit)
        assert cut.ids == last.ids and cut.truncated_turns == 2
    words = TextPairEncoder(tokenizer, max_prompt_tokens=4).encode_prompt("apple river engine")
    assert tokenizer.decode(words.ids) == "[CLS] river engine [SEP]"


def test_no_room_for_text_is_refused(tokenizer):
    with pytest.raises(UserError, match="must be > 2, the tokens a tokenizer puts around"):
        TextPairEncoder(tokenizer, max_prompt_tokens=2)


def test_a_chat_template_makes_conversations_of_an_encoder_too(tokenizer):
    assert type(encoder_for(keyword_tokenizer(), max_prompt_tokens=None)) is PromptEncoder
    assert type(encoder_for(tokenizer, max_prompt_tokens=None)) is TextPairEncoder


@pytest.mark.parametrize(
    "turns", [CONVERSATION, [{"role": "system", "content": "garden"}, *CONVERSATION]]
)
def test_a_conversation_written_as_text_is_read_back(turns):
    assert conversation_of(conversation_text(turns)) == turns


@pytest.mark.parametrize("text", ["apple", "Human: apple", "apple\n\nAssistant:", ""])
def test_a_text_of_another_form_stays_one(text):
    assert conversation_of(text) == text
