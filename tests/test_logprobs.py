"""Log-probabilities against a naive computation, one row at a time and with full logits."""

import pytest
import torch

from grao_lightning.batch import TokenRow
from grao_lightning.logprobs import _head_of, split_by_tokens, token_logprobs
from tests.conftest import VOCABULARY, tiny_model

FAMILIES = ["Llama", "Qwen2", "Mixtral"]


def ragged_rows(num_rows: int = 7) -> list[TokenRow]:
    """Rows of all lengths; token 0, which pads, and token 2, an end of sequence, occur inside."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=generator).tolist()

    rows = [TokenRow(ids(3 + 5 * n % 11), [0, *ids(1 + 4 * n % 9), 2, 2]) for n in range(num_rows)]
    return [TokenRow([1], [2]), *rows]


@torch.no_grad()
def naive_logprobs(model, row: TokenRow, temperature: float = 1.0) -> torch.Tensor:
    ids = torch.tensor([row.prompt_ids + row.answer_ids])
    logits = model(ids).logits[0].double() / temperature
    values = [
        logits[position - 1].log_softmax(-1)[ids[0, position]]
        for position in range(len(row.prompt_ids), len(row))
    ]
    return torch.stack(values)


@pytest.mark.parametrize("family", [*FAMILIES, "Gemma2", "Granite"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_naive_computation_without_padding(family, temperature):
    model, rows = tiny_model(family), ragged_rows()
    computed = token_logprobs(model, rows, temperature=temperature).by_row()
    for row, logprobs in zip(rows, computed, strict=True):
        expected = naive_logprobs(model, row, temperature).float()
        torch.testing.assert_close(logprobs.detach(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_full_logits_without_padding(family):
    model, rows = tiny_model(family), ragged_rows()
    coefficients = torch.linspace(-1, 1, len(rows))
    (coefficients * token_logprobs(model, rows).mean_by_row()).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for coefficient, row in zip(coefficients, rows, strict=True):
        ids = torch.tensor([row.prompt_ids + row.answer_ids])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        (coefficient * logprobs[len(row.prompt_ids) - 1 :].mean()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_padding_and_the_order_of_rows_leave_every_row_unchanged():
    model, rows = tiny_model("Llama"), ragged_rows()
    together = token_logprobs(model, rows).by_row()
    for number, row in enumerate(rows):
        alone = token_logprobs(model, [row]).by_row()[0]
        torch.testing.assert_close(together[number], alone, atol=1e-6, rtol=0)
    backwards = token_logprobs(model, rows[::-1]).by_row()[::-1]
    for left, right in zip(together, backwards, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)


def test_gradient_checkpointing_leaves_gradients_unchanged():
    rows = ragged_rows()

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        model = tiny_model("Llama").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        token_logprobs(model, rows).mean_by_row().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    for left, right in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)


def test_entropy_is_that_of_the_whole_next_token_distribution():
    model, row = tiny_model("Llama"), TokenRow([5, 6, 7], [8, 9])
    entropy = token_logprobs(model, [row]).entropy
    logits = model(torch.tensor([row.prompt_ids + row.answer_ids])).logits[0, 2:4]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy, expected, atol=1e-5, rtol=0)


def test_mean_by_row_divides_by_the_number_of_tokens_also_where_some_are_left_out():
    model, rows = tiny_model("Llama"), [TokenRow([5], [6, 7, 8, 9]), TokenRow([5], [6])]
    computed = token_logprobs(model, rows)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    expected = torch.stack([(computed.flat[0] + computed.flat[2]) / 4, computed.flat[4]])
    torch.testing.assert_close(computed.mean_by_row(weights), expected)


def test_logits_of_the_vocabulary_exist_for_one_chunk_only(monkeypatch):
    """The largest tensor that any operation makes must not be [tokens, V]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from grao_lightning import logprobs

    class LargestTensor(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
            return result

    monkeypatch.setattr(logprobs, "CHUNK_TOKENS", 16)
    model = tiny_model("Llama", vocab_size=5000)
    rows = [TokenRow([1, 2], list(range(60))) for _ in range(8)]  # 480 answer tokens
    _head_of(model)
    with LargestTensor() as seen:
        token_logprobs(model, rows).mean_by_row().sum().backward()
    assert 16 * 5000 <= seen.largest < 2 * 5000 * 32, seen.largest  # 32 = H: the head's gradient


def test_a_head_that_is_not_understood_falls_back_to_the_models_own_logits(caplog):
    model = tiny_model("Llama")
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits.pow(3) * 0.1  # no setting of the configuration tells of it
        return output

    model.forward = forward
    row = TokenRow([5, 6, 7], [8, 9])
    computed = token_logprobs(model, [row]).flat.detach()
    torch.testing.assert_close(computed, naive_logprobs(model, row).float(), atol=1e-5, rtol=0)
    assert "unknown way" in caplog.text


def test_micro_batches_hold_every_row_once_and_keep_to_their_budget():
    rows = ragged_rows(30)
    wanted = [number for number in range(len(rows)) if number % 3]
    budget = 40
    micro_batches = split_by_tokens(rows, wanted, budget)
    assert sorted(number for part in micro_batches for number in part) == wanted
    for part in micro_batches:
        size = max(len(rows[number]) for number in part) * len(part)
        assert size <= budget or len(part) == 1
    assert len(micro_batches) < len(wanted)
