"""Every architecture in training: log-probs and gradients of its rows one by one, or a refusal."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from grao_lightning.batch import TokenRow
from grao_lightning.language_model.logprobs import token_logprobs
from grao_lightning.language_model.sharing import share_prompts, shares_prompts
from tests.language_model.architectures import ARCHITECTURES, END, VOCABULARY, build

#: Architectures whose rows each read their own prompt in training, and why.
REFUSED: dict[str, str] = {}


def groups() -> list[TokenRow]:
    """Return 14 rows of prompts of 1 to 40 tokens, in groups of 1 to 8, out of order.

    Padding and the end of sequence, the same token, stand inside and at the end.
    """
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=generator).tolist()

    rows = []
    for length, size in ((1, 3), (40, 2), (7, 8), (18, 1)):
        prompt = ids(length - 1) + [5]
        if length == 7:
            prompt[3] = END
        rows += [TokenRow(prompt, [*ids(1 + 5 * at % 11), END]) for at in range(size)]
    return rows[::2] + rows[1::2]


ROWS = groups()
COEFFICIENTS = torch.linspace(-1, 1, len(ROWS))


def one_by_one(name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return what an untouched model gives for each row alone: log-probs, and their gradient."""
    logprobs, gradients = [], {}
    fresh = build(name)
    for row, coefficient in zip(ROWS, COEFFICIENTS, strict=True):
        model = deepcopy(fresh)  # some keep frequencies of what they have read
        ids = torch.tensor([row.prompt_ids + row.answer_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]
        found = logits.log_softmax(-1).gather(1, torch.tensor(row.answer_ids)[:, None])[:, 0]
        (-coefficient * found.mean()).backward()
        logprobs.append(found.detach())
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[key] = gradients.get(key, 0) + parameter.grad
    return logprobs, gradients


def weigh(part: slice, logprobs: Tensor) -> Tensor:
    lengths = torch.tensor([len(row.answer_ids) for row in ROWS])
    return (COEFFICIENTS / lengths).repeat_interleave(lengths)[part]


def assert_near(found: Any, expected: dict[str, Tensor]) -> None:
    """Compare gradients, each by its own size unless that is a rounding error of the whole."""
    whole = torch.stack([part.norm() for part in expected.values()]).norm()
    gradients = {key: p.grad for key, p in found.named_parameters() if p.grad is not None}
    assert all(key in gradients for key in expected)
    for key, gradient in gradients.items():
        against = expected.get(key, torch.zeros_like(gradient))
        assert (gradient - against).norm() <= 1e-4 * against.norm().clamp(min=1e-3 * whole), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_and_gradients_are_those_of_single_rows(name, caplog):
    logprobs, gradients = one_by_one(name)
    model = build(name)
    share_prompts(model)
    assert shares_prompts(model) == (name not in REFUSED), caplog.text
    assert REFUSED.get(name, "") in caplog.text
    computed = token_logprobs(model, ROWS, weigh=weigh)
    for found, expected in zip(computed.by_row(), logprobs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    computed.loss.backward()
    assert_near(model, gradients)
    if model.supports_gradient_checkpointing:
        model.zero_grad()
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        token_logprobs(model, ROWS, weigh=weigh).loss.backward()
        assert_near(model, gradients)
