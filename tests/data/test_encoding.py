"""Laws of turning text into token ids. A real tokenizer is read from GRAO_TEST_SMOLLM2, if set."""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grao_lightning.data.encoding import PromptEncoder, conversation_text

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (  # one BOS in the text, no system role, answers after a space
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "Human: Hello there, how are you? Assistant: I am fine. user assistant system [INST] [/INST]",
    "The sky is blue today and the sea is green. Yes, no, maybe. What is the name of the cat?",
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def make_tokenizer(template=None, *, metaspace=False, eos="</s>", post="<s> $A </s>"):
    """A small BPE tokenizer, byte-level or word-marking, that adds `post` to texts; pad == eos."""
    if metaspace:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted(set("".join(TEXT) + "<|>_/\n"))
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*SPECIAL, *(["<unk>"] if metaspace else [])],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 5, trainer)
    if post:
        backend.post_processor = processors.TemplateProcessing(
            single=post,
            special_tokens=[(token, backend.token_to_id(token)) for token in SPECIAL[:2]],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos
    )
    tokenizer.chat_template = template
    return tokenizer


def encoder(tokenizer, limit=None, **options):
    return PromptEncoder(tokenizer, max_prompt_tokens=limit, **options)


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def natural_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


DIALOGUE = [user("Hello there"), assistant("I am fine."), user("What is the name?")]
SETUPS = {
    "chatml": {"template": CHATML, "eos": "<|im_end|>"},
    "chatml, eos only in the template": {"template": CHATML},
    "llama2": {"template": LLAMA2},
    "llama2, words": {"template": LLAMA2, "metaspace": True},
    "chatml, words": {"template": CHATML, "metaspace": True, "eos": "<|im_end|>"},
    "hh": {},
    "hh, words": {"metaspace": True},
    "hh, no special tokens": {"post": None},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_prompt_and_answer_are_the_natural_tokens_of_the_dialogue(setup):
    tokenizer = make_tokenizer(**SETUPS[setup])
    end = "<|im_end|>" if "chatml" in setup else "</s>"
    ours = encoder(tokenizer, eos_ids=[tokenizer.convert_tokens_to_ids(end)])
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([*DIALOGUE, assistant("Yes, maybe.")], tokenize=False)
        text = text[: text.rindex(end) + len(end)]
    else:
        text = (
            "\n\nHuman: Hello there\n\nAssistant: I am fine.\n\nHuman: What is the name?"
            "\n\nAssistant: Yes, maybe.</s>"
        )
    bos = [tokenizer.bos_token_id] if "hh" in setup and "no special" not in setup else []
    prompt = ours.encode_prompt(DIALOGUE)
    assert prompt.ids + ours.encode_answer("Yes, maybe.") == bos + natural_ids(tokenizer, text)


@pytest.mark.parametrize("template", [None, LLAMA2])
def test_a_conversation_has_exactly_one_bos_and_no_eos_at_its_end(template):
    tokenizer = make_tokenizer(template)
    ids = encoder(tokenizer).encode_prompt([user("Hello")]).ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids


def test_a_template_without_bos_gets_none():
    tokenizer = make_tokenizer(CHATML)
    prompt = encoder(tokenizer).encode_prompt([user("Hello")])
    assert tokens(tokenizer, prompt.ids)[0] == "<|im_start|>"
    assert prompt.text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_a_given_template_replaces_the_tokenizers():
    ours = encoder(make_tokenizer(CHATML), chat_template=LLAMA2)
    assert ours.encode_prompt([user("Hello")]).text == "<s>[INST] Hello [/INST]"


@pytest.mark.parametrize("post", ["<s> $A </s>", "$A </s>", "<s> $A", None])
def test_a_string_keeps_the_tokenizers_bos_and_loses_its_eos(post):
    tokenizer = make_tokenizer(post=post)
    ids = encoder(tokenizer).encode_prompt("The sky is").ids
    bos = ["<s>"] if post and "<s>" in post else []
    assert tokens(tokenizer, ids) == [*bos, *tokenizer.tokenize("The sky is")]


def test_a_string_that_begins_with_bos_gets_no_second_and_keeps_its_special_tokens():
    tokenizer = make_tokenizer()
    ids = encoder(tokenizer).encode_prompt("<s>The sky<|im_end|>").ids
    assert tokens(tokenizer, ids).count("<s>") == 1
    assert tokens(tokenizer, ids)[-1] == "<|im_end|>"


def test_hh_text_of_a_conversation_has_its_markers_and_the_system_message_first():
    text = conversation_text([system("Be kind."), *DIALOGUE])
    assert text == (
        "Be kind.\n\nHuman: Hello there\n\nAssistant: I am fine.\n\nHuman: What is the name?"
        "\n\nAssistant:"
    )
    assert conversation_text("The sky") == "The sky"
    assert (
        encoder(make_tokenizer()).encode_prompt([user("Hi")]).text == "\n\nHuman: Hi\n\nAssistant:"
    )


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("text", ["a</s>b", "<|im_end|>", "a <s>"])
def test_special_tokens_written_out_in_an_answer_stay_text(template, text):
    tokenizer = make_tokenizer(template)
    ids = encoder(tokenizer).encode_answer(text)
    special = set(tokenizer.convert_tokens_to_ids(SPECIAL))
    assert special.isdisjoint(ids[:-1])
    assert tokenizer.decode(ids[:-1]).strip() == text


def test_special_tokens_written_out_in_a_hh_turn_stay_text():
    tokenizer = make_tokenizer()
    ids = encoder(tokenizer).encode_prompt([user("a</s>b")]).ids
    assert tokenizer.eos_token_id not in ids


@pytest.mark.parametrize(
    ("template", "eos_ids", "end"),
    [
        (None, [], "</s>"),
        (None, ["<|im_end|>"], "</s>"),
        (CHATML, ["<|im_end|>"], "<|im_end|>"),
        (CHATML, [], "</s>"),  # not known to end a sequence: the sampler would not stop at it
        (CHATML.replace("<|im_end|>", ""), ["<|im_end|>"], "</s>"),
        (LLAMA2, ["<|im_end|>"], "</s>"),
    ],
)
def test_the_end_of_turn_is_the_templates_first_eos_after_an_answer(template, eos_ids, end):
    tokenizer = make_tokenizer(template)
    ours = encoder(tokenizer, eos_ids=tokenizer.convert_tokens_to_ids(eos_ids))
    assert tokens(tokenizer, [ours.end_of_turn_id]) == [end]
    assert ours.encode_answer("Yes")[-1] == ours.end_of_turn_id


def test_an_empty_answer_is_the_end_of_turn_alone():
    ours = encoder(make_tokenizer())
    assert ours.encode_answer("") == [ours.end_of_turn_id]


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize(
    ("prompt", "answer", "joined"),
    [
        ("\n\nHuman: Hello\n\nAssistant:", "Yes", " Yes"),
        ("\n\nHuman: Hello\n\nAssistant:", " Yes", " Yes"),
        ("The sky is", " blue", " blue"),
        ("user\n", "Yes", "Yes"),
    ],
)
def test_an_answer_to_a_string_is_tokenised_as_its_continuation(metaspace, prompt, answer, joined):
    tokenizer = make_tokenizer(CHATML, metaspace=metaspace)
    ours = encoder(tokenizer)
    ids = ours.encode_prompt(prompt).ids + ours.encode_answer(answer, prompt)[:-1]
    assert ids == [tokenizer.bos_token_id, *natural_ids(tokenizer, prompt + joined)]


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}<sep>"])
def test_no_word_of_an_answer_is_lost_with_one_token_a_word(template):
    words = ["<unk>", "</s>", "<sep>", "sky", "blue", "grao-probe-answer"]
    ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    if template:
        answers = "{% if messages[1] %} {{ messages[1]['content'] }}</s>{% endif %}"
        tokenizer.chat_template = template + answers
    ours = encoder(tokenizer)
    assert tokens(tokenizer, ours.encode_answer("blue sky")) == ["blue", "sky", "</s>"]
    assert tokens(tokenizer, ours.encode_answer("blue sky", "sky")) == ["blue", "sky", "</s>"]


def test_an_unknown_first_character_is_not_lost_in_an_unknown_line_break():
    backend = Tokenizer(
        models.BPE(
            vocab={"<unk>": 0, "a": 1, "</s>": 2}, merges=[], unk_token="<unk>", fuse_unk=True
        )
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHATML
    assert tokens(tokenizer, encoder(tokenizer).encode_answer("éa")) == ["<unk>", "a", "</s>"]


LONG = [
    system("Yes."),
    user("Hello there " * 9),
    assistant("I am fine."),
    user("What is the name?"),
    assistant("no"),
    user("The cat"),
]


@pytest.mark.parametrize("template", [None, CHATML])
def test_truncation_keeps_the_system_message_and_the_most_whole_turns_that_fit(template):
    tokenizer = make_tokenizer(template)
    free = encoder(tokenizer)
    for kept in (3, 1):
        whole = free.encode_prompt([LONG[0], *LONG[-kept:]])
        full = encoder(tokenizer, len(whole.ids)).encode_prompt(LONG)
        assert (full.ids, full.text) == (whole.ids, whole.text)
        assert (full.truncated_turns, full.truncated_text) == (5 - kept, False)
    # One token less than the three last turns need: the user's turn leaves with its answer.
    three = free.encode_prompt([LONG[0], *LONG[-3:]])
    less = encoder(tokenizer, len(three.ids) - 1).encode_prompt(LONG)
    assert less.ids == free.encode_prompt([LONG[0], LONG[-1]]).ids


def test_a_prompt_that_just_fits_is_left_alone():
    tokenizer = make_tokenizer(CHATML)
    whole = encoder(tokenizer).encode_prompt(LONG)
    assert encoder(tokenizer, len(whole.ids)).encode_prompt(LONG) == whole
    assert (whole.truncated_turns, whole.truncated_text) == (0, False)


@pytest.mark.parametrize("template", [None, CHATML])
def test_only_a_last_turn_too_long_alone_is_cut_from_the_left(template):
    tokenizer = make_tokenizer(template)
    last = "The sky is blue today and the sea is green. " * 9 + "Yes, maybe."
    overhead = len(encoder(tokenizer).encode_prompt([system("no"), user("x")]).ids)
    limit = overhead + 20
    cut = encoder(tokenizer, limit).encode_prompt(
        [system("no"), user("Hello"), assistant("I"), user(last)]
    )
    assert (cut.truncated_turns, cut.truncated_text) == (2, True)
    assert limit - 3 <= len(cut.ids) <= limit
    # What is left is a rendered conversation whose last turn is an end of the text.
    ends = [last[start:] for start in range(len(last))]
    free = encoder(tokenizer)
    assert any(free.encode_prompt([system("no"), user(end)]).ids == cut.ids for end in ends)


def test_a_limit_without_room_for_a_question_names_the_least_that_works():
    tokenizer = make_tokenizer(CHATML)
    conversation = [system("Yes, no, maybe."), user("Hello")]
    needed = len(encoder(tokenizer).encode_prompt([conversation[0], user("o")]).ids)
    with pytest.raises(ValueError, match=f"max_prompt_tokens must be >= {needed}, .* got 5"):
        encoder(tokenizer, 5).encode_prompt(conversation)
    assert len(encoder(tokenizer, needed).encode_prompt(conversation).ids) == needed


def test_a_string_is_cut_from_the_left_at_tokens_and_keeps_bos():
    tokenizer = make_tokenizer()
    text = "The sky is blue today and the sea is green."
    whole = encoder(tokenizer).encode_prompt(text)
    cut = encoder(tokenizer, 6).encode_prompt(text)
    assert cut.ids == [tokenizer.bos_token_id, *whole.ids[-5:]]
    assert (cut.truncated_turns, cut.truncated_text) == (0, True)
    assert cut.text == tokenizer.decode(whole.ids[-5:])
    assert text.endswith(cut.text)
    assert encoder(tokenizer, len(whole.ids)).encode_prompt(text) == whole


def test_a_limit_that_leaves_bos_alone_is_refused():
    with pytest.raises(ValueError, match="max_prompt_tokens must be > 1"):
        encoder(make_tokenizer(), 1)


def test_answers_are_never_cut():
    tokenizer = make_tokenizer(CHATML)
    text = "The sky is blue. " * 50 + "Yes."
    assert tokenizer.decode(encoder(tokenizer, 20).encode_answer(text)[:-1]) == text


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have an eos_token"):
        encoder(tokenizer)
    assert encoder(tokenizer, eos_ids=[3]).end_of_turn_id == 3


def test_a_conversation_the_template_refuses_names_its_roles():
    with pytest.raises(
        ValueError, match=r"roles system, user: no system role; .* data\.chat_template"
    ):
        encoder(make_tokenizer(LLAMA2)).encode_prompt([system("no"), user("Hello")])


def test_a_template_that_changes_answers_is_refused():
    with pytest.raises(ValueError, match="must render an assistant's turn as it is written"):
        encoder(make_tokenizer(CHATML.replace("m['content']", "m['content'] | upper")))


def test_a_real_tokenizer_obeys_the_same_laws():
    path = os.environ.get("GRAO_TEST_SMOLLM2")
    if not path:
        pytest.skip("GRAO_TEST_SMOLLM2 (path of a GGUF file) is not set")
    tokenizer = AutoTokenizer.from_pretrained(Path(path).parent, gguf_file=Path(path).name)
    ours = encoder(tokenizer, 60)
    prompt = ours.encode_prompt(DIALOGUE)
    answer = "Sure. It's “naïve” 😀\n\n1. <|im_start|>"
    plain = answer.removesuffix("<|im_start|>")
    assert prompt.ids + ours.encode_answer(plain) == natural_ids(
        tokenizer, f"{prompt.text}{plain}<|im_end|>"
    )
    ids = ours.encode_answer(answer)
    assert ids[-1] == tokenizer.eos_token_id and set(ids[:-1]).isdisjoint({0, 1, 2})
    assert tokenizer.decode(ids[:-1]) == answer
    cut = ours.encode_prompt([*DIALOGUE[:2], user("The sky is blue today. " * 40)])
    assert 57 <= len(cut.ids) <= 60 and cut.truncated_text and cut.truncated_turns == 2
    assert tokenizer.decode(cut.ids) == cut.text
