"""Where the head's gradient goes, and how many logits exist at once."""

import pytest
import torch

from grao_lightning.language_model.head import Head, chunk_tokens, head_loss
from tests.memory import peak_memory


def head_inputs(dtype: torch.dtype, tokens: int) -> tuple[torch.Tensor, Head, torch.Tensor]:
    torch.manual_seed(0)
    states = torch.randn(tokens, 4).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(7, 4).to(dtype))
    return states, Head(weight), torch.arange(tokens) % 7


def gradients_of_passes(dtype: torch.dtype, tokens: int, *, into_grad: bool) -> list[torch.Tensor]:
    """Return the gradients of weight and states after two passes over a weight that is tied."""
    states, head, targets = head_inputs(dtype, tokens)
    for factor in (1.0, -2.0):
        read = torch.nn.functional.embedding(targets, head.weight)  # as a tied embedding is
        weigh = lambda part, logprobs: factor * logprobs.to(dtype)  # noqa: E731, B023
        loss, *_ = head_loss(states + read, head, targets, 0.7, weigh, into_grad=into_grad)
        loss.backward()
    return [head.weight.grad, states.grad]


@pytest.mark.parametrize("tokens", [5, 50])  # up to 2 H = 8 tokens are summed up in one product
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.double, 1e-12), (torch.float, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_a_gradient_that_goes_straight_into_grad_is_the_one_autograd_adds_up(
    dtype, tolerance, tokens, monkeypatch
):
    monkeypatch.setattr("grao_lightning.language_model.head.CHUNK_TOKENS", 3)
    found = gradients_of_passes(dtype, tokens, into_grad=True)
    for own, expected in zip(
        found, gradients_of_passes(dtype, tokens, into_grad=False), strict=True
    ):
        assert own.dtype == dtype
        assert (own - expected).norm() <= tolerance * expected.norm()
    exact = gradients_of_passes(torch.double, tokens, into_grad=False)
    assert (found[0].double() - exact[0]).norm() <= 2 * tolerance * exact[0].norm()


def test_beside_grad_no_second_gradient_of_the_heads_size_exists():
    vocabulary, hidden = 4096, 256
    weight = torch.nn.Parameter(torch.zeros(vocabulary, hidden))
    weight.grad = torch.zeros_like(weight)
    targets = torch.zeros(256, dtype=torch.long)

    def extra_bytes(into_grad: bool) -> int:
        states = torch.zeros(256, hidden, requires_grad=True)
        with peak_memory() as peak:
            head_loss(
                states, Head(weight), targets, 1.0, lambda _, flat: flat, into_grad=into_grad
            )[0].backward()
        return peak.extra_bytes

    assert extra_bytes(False) - extra_bytes(True) > 0.9 * vocabulary * hidden * 4


def test_a_loss_whose_gradient_is_already_in_grad_may_not_be_scaled():
    states, head, targets = head_inputs(torch.float, 5)
    loss, *_ = head_loss(states, head, targets, 1.0, lambda _, flat: flat, into_grad=True)
    with pytest.raises(RuntimeError, match="the loss must not be scaled"):
        (2 * loss).backward()


def test_a_weight_with_hooks_gets_its_gradient_from_autograd():
    states, head, targets = head_inputs(torch.float, 5)
    seen = []
    head.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    loss, *_ = head_loss(states, head, targets, 1.0, lambda _, flat: flat, into_grad=True)
    assert head.weight.grad is None
    (3 * loss).backward()
    assert len(seen) == 1 and seen[0].norm() > 0


def test_heads_are_read_in_chunks_by_memory_on_accelerators_and_in_small_ones_on_a_cpu():
    cuda = torch.device("cuda")
    assert chunk_tokens(152_064, torch.device("cpu")) == 128
    found = [chunk_tokens(size, cuda) for size in (32_000, 49_152, 152_064)]
    assert found == [4096, 2**27 // 49_152, 1024]
