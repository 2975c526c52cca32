"""RewardModel: what it reads, what it returns, what it refuses."""

import json
import logging
from pathlib import Path

import pytest
import torch

import grao_lightning.language_model.loading
from grao_lightning.data.encoding import PromptEncoder, conversation_text
from grao_lightning.embedded.base import keyword_tokenizer
from grao_lightning.faults import UserError
from grao_lightning.rewards.model import RewardModel
from grao_lightning.rewards.protocol import RewardSpec, call_rewards
from tests.encoders import tiny_encoder_folder
from tests.language_model.test_scores import tiny_classifier

TURNS = [
    {"role": "user", "content": "apple river"},
    {"role": "assistant", "content": "bridge"},
    {"role": "user", "content": "window yarn"},
]
PROMPTS = [conversation_text(TURNS), conversation_text(TURNS[-1:])] * 3
COMPLETIONS = ["apple", "river", "window yarn engine", "", "well " * 9, "apple"]


def saved(folder: Path, labels: tuple[str, ...] = ("LABEL_0",), **options) -> str:
    """Write a random Llama classifier on the keyword tokenizer, which pads with its end token."""
    tokenizer = keyword_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    ids = {"pad_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings = {"vocab_size": len(tokenizer), "num_labels": len(labels), **ids, **options}
    model = tiny_classifier("Llama", **settings)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: number for number, label in enumerate(labels)}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def encoder(folder: Path) -> str:
    """Write a random BERT classifier of one label."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = tiny_encoder_folder(folder / "backbone")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("decoder") / "model")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory) -> str:
    return encoder(tmp_path_factory.mktemp("encoder"))


@torch.no_grad()
def logits_of(source: str, texts: list[tuple]) -> torch.Tensor:
    """Return the logits of Hugging Face's own forward pass, one text or pair at a time."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.config.pad_token_id = None  # else the end token, padding here, would not count
    found = []
    for text in texts:
        options = {"add_special_tokens": len(text) == 2, "return_tensors": "pt"}
        found.append(model(**tokenizer(*text, **options)).logits)
    return torch.cat(found)


def test_a_decoder_reads_the_conversation_to_its_end_token(decoder_folder):
    tokenizer = keyword_tokenizer()
    texts = []
    for number, completion in enumerate(COMPLETIONS):
        turns = TURNS if number % 2 == 0 else TURNS[-1:]
        answered = [*turns, {"role": "assistant", "content": completion}]
        texts.append((tokenizer.apply_chat_template(answered, tokenize=False),))
    expected = logits_of(decoder_folder, texts)[:, 0].tolist()
    found = RewardModel(decoder_folder)(prompts=PROMPTS, completions=COMPLETIONS)
    assert found == pytest.approx(expected, abs=1e-5)
    assert torch.tensor(found).std() > 1e-3


def test_an_encoder_reads_a_pair_of_texts(encoder_folder):
    # Hugging Face takes an empty second text for none at all.
    pairs = [pair for pair in zip(PROMPTS, COMPLETIONS, strict=True) if pair[1]]
    expected = logits_of(encoder_folder, pairs)[:, 0].tolist()
    prompts, completions = map(list, zip(*pairs, strict=True))
    found = RewardModel(encoder_folder)(prompts=prompts, completions=completions)
    assert found == pytest.approx(expected, abs=1e-5)
    assert torch.tensor(found).std() > 1e-3


@pytest.mark.parametrize("kind", ["decoder_folder", "encoder_folder"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_do_not_depend_on_batch_order_or_batch_tokens(request, kind, dtype):
    source = request.getfixturevalue(kind)
    model = RewardModel(source, dtype=dtype)
    whole = model(prompts=PROMPTS, completions=COMPLETIONS)
    alone = [
        model(prompts=[prompt], completions=[completion])[0]
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    turned = model(prompts=PROMPTS[::-1], completions=COMPLETIONS[::-1])[::-1]
    small = RewardModel(source, dtype=dtype, batch_tokens=1)
    few = small(prompts=PROMPTS, completions=COMPLETIONS)
    for other in (alone, turned, few):
        assert other == pytest.approx(whole, abs=1e-5)
    assert model(prompts=[], completions=[]) == []


def test_a_plain_prompt_is_the_users_turn_and_plain_text_leaves_the_template_aside(decoder_folder):
    model = RewardModel(decoder_folder)
    as_turn, as_text = (
        model(prompts=[prompt], completions=["apple"]) for prompt in ("window yarn", PROMPTS[1])
    )
    assert as_turn == as_text
    plain = RewardModel(decoder_folder, plain_text=True)
    found = plain(prompts=["window yarn"], completions=["apple"])
    assert found == pytest.approx(
        logits_of(decoder_folder, [("window yarn apple <eos>",)])[0].tolist(), abs=1e-5
    )
    assert found != pytest.approx(as_turn, abs=1e-3)


def test_a_chat_template_of_ones_own_takes_the_place_of_the_tokenizers(decoder_folder):
    template = "{% for m in messages %}{{ m['content'] }} <sep>{% endfor %}"
    own = RewardModel(decoder_folder, chat_template=template)
    usual = RewardModel(decoder_folder)
    asked = {"prompts": PROMPTS, "completions": COMPLETIONS}
    assert own(**asked) != pytest.approx(usual(**asked), abs=1e-3)


def test_a_label_counts_in_log_odds_against_all_others(tmp_path):
    source = saved(tmp_path / "model", ("bad", "fair", "good"))
    asked = {"prompts": PROMPTS, "completions": COMPLETIONS}
    scores = {name: RewardModel(source, label=name)(**asked) for name in ("bad", "fair", "good")}
    assert RewardModel(source, label=2)(**asked) == scores["good"]
    # Log-odds of all labels give probabilities that sum to 1.
    total = torch.stack([torch.tensor(part) for part in scores.values()]).sigmoid().sum(dim=0)
    torch.testing.assert_close(total, torch.ones(len(COMPLETIONS)))
    assert torch.tensor(scores["good"]).std() > 1e-3


def test_a_label_of_a_multi_label_model_counts_by_its_own_logit(tmp_path):
    options = {"problem_type": "multi_label_classification"}
    source = saved(tmp_path / "model", ("toxic", "rude"), **options)
    found = RewardModel(source, label="rude")(prompts=["apple"], completions=["river"])
    turns = [{"role": "user", "content": "apple"}, {"role": "assistant", "content": "river"}]
    text = keyword_tokenizer().apply_chat_template(turns, tokenize=False)
    assert found == pytest.approx([logits_of(source, [(text,)])[0, 1].item()], abs=1e-5)


def test_a_long_prompt_loses_its_start_and_a_completion_nothing(decoder_folder, caplog):
    encoder = PromptEncoder(keyword_tokenizer(), max_prompt_tokens=None)
    completion = "apple river"
    answer = len(encoder.encode_answer(completion))
    short = len(encoder.encode_prompt(TURNS[-1:]).ids)
    bounded = RewardModel(decoder_folder, max_tokens=short + answer)
    whole = RewardModel(decoder_folder)
    long, newest = PROMPTS[:2]
    assert bounded(prompts=[long], completions=[completion]) == pytest.approx(
        whole(prompts=[newest], completions=[completion]), abs=1e-5
    )
    assert whole(prompts=[long], completions=[completion]) != pytest.approx(
        whole(prompts=[newest], completions=[completion]), abs=1e-3
    )
    with caplog.at_level(logging.WARNING):
        found = bounded(prompts=[long] * 2, completions=["apple " * 30, completion])
    assert found[0] is None and found[1] is not None
    assert "leaves no room for its prompt, and has no score" in caplog.text


@pytest.mark.parametrize("kind", ["decoder_folder", "encoder_folder"])
def test_a_bound_on_the_prompt_cuts_as_in_the_run_that_trained_the_model(request, kind):
    """The last turn alone takes what is left of a prompt bounded to its length."""
    folder = request.getfixturevalue(kind)
    whole = RewardModel(folder)
    long, newest = "apple river " * 5 + "window yarn", "window yarn"
    if kind == "decoder_folder":
        long, newest = PROMPTS[:2]
    whole(prompts=[newest], completions=["apple"])
    num_tokens = len(whole._encoder.encode_prompt(whole._as_turns(newest)).ids)
    bounded = RewardModel(folder, max_prompt_tokens=num_tokens)
    found, expected, uncut = (
        scorer(prompts=[prompt], completions=["apple"])
        for scorer, prompt in ((bounded, long), (whole, newest), (whole, long))
    )
    assert found == pytest.approx(expected, abs=1e-5)
    assert found != pytest.approx(uncut, abs=1e-4)


def test_an_encoder_scores_nothing_beyond_its_positions(encoder_folder):
    """64 positions: a long prompt is cut to them, a completion of 70 words has no score."""
    found = RewardModel(encoder_folder)(
        prompts=["apple " * 100, "apple"], completions=["river", "river " * 70]
    )
    assert found[0] is not None and found[1] is None


def test_it_is_loaded_once_at_its_first_call_and_stays_frozen(decoder_folder, monkeypatch):
    loads = []
    original = grao_lightning.language_model.loading._load

    def counted(*arguments, **options):
        loads.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(grao_lightning.language_model.loading, "_load", counted)
    model = RewardModel(decoder_folder)
    assert not loads
    for _ in range(2):
        model(prompts=["apple"], completions=["river"])
    assert len(loads) == 2, "tokenizer and model"
    assert not model._model.training
    assert not any(p.requires_grad for p in model._model.parameters())


def test_the_precision_of_the_policys_step_is_not_its_own(decoder_folder):
    model = RewardModel(decoder_folder)
    asked = {"prompts": PROMPTS, "completions": COMPLETIONS}
    expected = model(**asked)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(**asked) == expected


def test_it_is_called_by_the_protocol_of_rewards(decoder_folder):
    spec = RewardSpec("grao_lightning.RewardModel", arguments={"model": decoder_folder})
    arguments = {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "reference_answers": COMPLETIONS,
        "truncated": [False] * 6,
        "topic": ["fruit"] * 6,
    }
    (found,) = call_rewards([spec.load()], arguments)
    expected = RewardModel(decoder_folder)(prompts=PROMPTS, completions=COMPLETIONS)
    assert found == expected and spec.label == "RewardModel"


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    backbone = tiny_encoder_folder(tmp_path / "backbone")
    with pytest.raises(UserError, match="has no trained score head"):
        RewardModel(backbone)(prompts=["apple"], completions=["river"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "./nowhere"}, "model: no such folder"),
        ({"batch_tokens": 0}, "batch_tokens must be >= 1; got 0"),
        ({"max_tokens": 0}, "max_tokens must be >= 1; got 0"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16; got 'int8'"),
        ({"plain_text": True, "chat_template": "x"}, "chat_template must be null where"),
        ({"label": "good"}, "label must be one of the labels of"),
    ],
)
def test_arguments_that_cannot_work_are_told_before_anything_loads(
    decoder_folder, monkeypatch, arguments, message
):
    monkeypatch.setattr(
        grao_lightning.language_model.loading, "_load", lambda *_, **__: pytest.fail("loaded")
    )
    with pytest.raises(ValueError, match=message):
        RewardModel(**{"model": decoder_folder, **arguments})


def test_several_labels_need_one_to_be_named(tmp_path):
    source = saved(tmp_path / "model", ("bad", "fair", "good"))
    with pytest.raises(UserError, match="got none of 0: bad, 1: fair, 2: good"):
        RewardModel(source)
    config = json.loads((tmp_path / "model/config.json").read_text())
    del config["id2label"], config["label2id"]  # as transformers writes it for two labels
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "num_labels": 3}))
    with pytest.raises(UserError, match="got none of 0: LABEL_0"):
        RewardModel(source)(prompts=["apple"], completions=["river"])
