"""Scores of rows: by the last token whatever its id, alone or in any batch, packed or padded."""

import logging
from typing import Any

import pytest
import torch
import transformers

from grao_lightning.batch import TokenRow
from grao_lightning.language_model.scores import (
    fitted,
    frozen_scores,
    most_tokens,
    reading_of,
    row_scores,
)
from grao_lightning.language_model.sharing import share_prompts

EOS = 2
ROWS = [
    TokenRow([5, 6, 7], [8, 9, EOS]),
    TokenRow([5, 6, 7], [10, EOS]),
    TokenRow([5, 6, 7], [EOS]),
    TokenRow([11], [12, 13, 14, 15, EOS, EOS]),
    TokenRow([3, 4], [90]),
]


def tiny_classifier(family: str, **options: Any) -> Any:
    """Return a random sequence classification model; decoders pad with the very end token."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "num_labels": 1,
        "pad_token_id": EOS,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    config = getattr(transformers, f"{family}Config")(**{**sizes, **options})
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForSequenceClassification")(config).eval()


def tiny(family: str, **options: Any) -> Any:
    if family in ("Bert", "Roberta", "ModernBert"):
        options = {"pad_token_id": 1, "bos_token_id": 0, **options}
    return tiny_classifier(family, **options)


def scores_alone(model: Any) -> torch.Tensor:
    return torch.cat([row_scores(model, [row]) for row in ROWS]).detach()


@pytest.mark.parametrize(
    ("family", "reading"),
    [
        ("Llama", "last token"),
        ("Qwen2", "last token"),
        ("GPTNeoX", "last token"),
        ("Bert", "masked"),
        ("Roberta", "masked"),
        ("ModernBert", "masked"),
    ],
)
def test_scores_are_those_of_single_rows_in_any_batch_and_order(family, reading):
    model = tiny(family)
    assert reading_of(model) == reading
    expected = scores_alone(model)
    assert expected.std() > 1e-3
    torch.testing.assert_close(row_scores(model, ROWS), expected, atol=1e-5, rtol=0)
    for budget in (1, 12, 1000):
        found = frozen_scores(model, ROWS[::-1], budget).float().flip(0)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pad", [EOS, None, 90])
def test_the_last_token_counts_where_it_is_the_padding_token_and_where_there_is_none(pad):
    """The oracle is the model's own forward pass on one row, without padding token."""
    model = tiny_classifier("Llama", pad_token_id=None)
    with torch.no_grad():
        ids = [row.prompt_ids + row.answer_ids for row in ROWS]
        expected = torch.cat([model(torch.tensor([row])).logits for row in ids])
    model.config.pad_token_id = pad
    torch.testing.assert_close(row_scores(model, ROWS), expected, atol=1e-5, rtol=0)
    if pad == EOS:  # what this file is there for
        with torch.no_grad():
            own = torch.cat([model(torch.tensor([row])).logits for row in ids])
        assert (own - expected).abs().max() > 1e-3


def test_packed_rows_have_the_scores_and_gradients_of_padded_ones():
    scores, gradients = [], []
    for share in (False, True):
        model = tiny("Llama").double()
        if share:
            assert share_prompts(model, gives_tokens=False)
        found = row_scores(model, ROWS)
        found.square().sum().backward()
        scores.append(found.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*scores)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # Norms are computed in float32 whatever the precision.
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "packed"])
def test_scores_beside_longer_rows_are_those_of_the_row_alone_where_length_sets_frequencies(shared):
    """Dynamic NTK: beyond 8 tokens every length has frequencies of its own."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    options = {"max_position_embeddings": 8, "rope_parameters": rope}
    rows = [*ROWS, TokenRow([3, 4, 5], list(range(6, 26))), TokenRow([3, 4, 5], [7, 8, 9, 10, 11])]
    model = tiny("Llama", **options)
    assert not shared or share_prompts(model, gives_tokens=False)
    with torch.no_grad():
        together = row_scores(model, rows)
        alone = [row_scores(tiny("Llama", **options), [row]) for row in rows]
    torch.testing.assert_close(together, torch.cat(alone))


def test_packs_of_any_size_give_the_same_scores():
    model = tiny("Llama")
    expected = scores_alone(model)
    assert share_prompts(model, gives_tokens=False)
    for budget in (1, 9, 1000):
        found = frozen_scores(model, ROWS, budget).float()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_decoder_with_an_unknown_head_is_read_row_by_row():
    class Doubled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            # Its input's shape decides, which the trial on the last state alone cannot know.
            return self.inner(states) * (1 + states.shape[1] if states.dim() == 3 else 1)

    model = tiny("Llama")
    model.score = Doubled(model.score)
    assert reading_of(model) == "one by one"
    with torch.no_grad():
        model.config.pad_token_id = None
        expected = [model(torch.tensor([row.prompt_ids + row.answer_ids])).logits for row in ROWS]
    model.config.pad_token_id = EOS
    torch.testing.assert_close(row_scores(model, ROWS), torch.cat(expected))
    assert model.config.pad_token_id == EOS


def test_sliding_windows_are_read_padded_and_the_log_says_so(caplog):
    model = tiny("Mistral", sliding_window=4)
    with caplog.at_level(logging.WARNING):
        assert not share_prompts(model, gives_tokens=False)
    assert "cannot share prompts" in caplog.text
    torch.testing.assert_close(row_scores(model, ROWS), scores_alone(model), atol=1e-5, rtol=0)


def test_a_row_too_long_loses_the_start_of_its_prompt_and_never_of_its_answer():
    row = TokenRow([1, 2, 3, 4], [5, 6])
    assert fitted(row, None) is row and fitted(row, 6) is row
    assert fitted(row, 4) == TokenRow([3, 4], [5, 6])
    assert fitted(row, 4, keep=1) == TokenRow([1, 4], [5, 6])
    assert fitted(row, 2) is None and fitted(row, 3, keep=1) is None


def test_the_longest_row_a_model_tells_can_be_read_and_one_longer_cannot():
    for family in ("Bert", "Roberta"):
        model = tiny(family)
        most = most_tokens(model)
        assert row_scores(model, [TokenRow([3] * (most - 1), [4])]).isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            row_scores(model, [TokenRow([3] * most, [4])])
