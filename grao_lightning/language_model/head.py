"""From last states to token log-probabilities without logits of the whole vocabulary.

Shapes: K tokens, H hidden, V vocabulary. Logits exist for one chunk of tokens at a time.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

CHUNK_TOKENS = 128
#: Rows of the weight's gradient that are summed up together in low precision
_BLOCK_ROWS = 8192

#: (slice of the tokens, their log-probabilities) -> their weights in the loss
Weigh = Callable[[slice, Tensor], Tensor]


@dataclass(frozen=True)
class Head:
    """A model's map from states to logits: ``cap * tanh(scale * W s / cap)``.

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        scale: Of the logits (Granite divides them).
        cap: Soft cap of the logits (Gemma), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits [K, V] of states [K, H], in the states' precision."""
        logits = F.linear(states, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """Return the cap's slope at capped logits, of their shape; None without a cap."""
        return None if self.cap is None else (logits / self.cap).square_().neg_().add_(1)


def head_of(model: Any) -> Head | None:
    """Return the head of a Hugging Face causal language model, None if it cannot be told.

    Checked once a model by comparing with the model's own forward pass, since a family may scale,
    cap or transform its logits in ways this file does not know.
    """
    if not hasattr(model, "_grao_head_is_exact"):
        model._grao_head_is_exact = _head_is_exact(model)
        if not model._grao_head_is_exact:
            log.warning(
                "%s turns states into logits in an unknown way: logits of the whole vocabulary are "
                "kept for every position; lower micro_batch_tokens if memory runs out",
                type(model).__name__,
            )
    return _configured_head(model) if model._grao_head_is_exact else None


def head_loss(
    states: Tensor, head: Head, targets: Tensor, temperature: float, weigh: Weigh | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss ``-sum_t w_t log p(target_t)``, log-probabilities [K] and entropies [K].

    The gradient is formed during the forward pass, chunk by chunk, since a token's weight depends
    on nothing but its own log-probability: every logit is computed once.

    Args:
        states: [K, H]; receives a gradient.
        head: Its weight (and bias) receive gradients, summed up in float32.
        targets: [K] token ids.
        temperature: Divides the logits.
        weigh: Weight of each token, treated as a constant; None: no loss (0) and no gradient.
    """
    result: tuple[Tensor, Tensor, Tensor] = _HeadLoss.apply(
        states, head.weight, head.bias, (head.scale, head.cap), targets, temperature, weigh
    )
    return result


def weigh_by_gradient(loss: Callable[[slice, Tensor], Tensor]) -> Weigh:
    """Return weights under which ``-sum_t w_t log p(t)`` has the gradient of a loss.

    Args:
        loss: (slice of the tokens, their log-probabilities) -> scalar.
    """

    def weigh(part: slice, logprobs: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(part, leaf), leaf)
        return -gradient

    return weigh


class _HeadGradients:
    """Sums up the gradients of states, weight and bias, chunk by chunk.

    Args:
        head: In the precision of the products.
        states: [K, H].
        weight: [V, H] as the model holds it, None where it is frozen.
        bias: [V] as the model holds it, or None.
        exact: Precision of the sums.
    """

    def __init__(
        self, head: Head, states: Tensor, weight: Tensor | None, bias: Tensor | None, exact: Any
    ) -> None:
        self._head, self._weight, self._bias = head, weight, bias
        self._to_states = torch.empty_like(states)
        self._to_weight = None if weight is None else torch.zeros_like(weight, dtype=exact)
        self._to_bias = None if bias is None else torch.zeros_like(bias, dtype=exact)

    def add(self, part: slice, chunk: Tensor, gradient: Tensor) -> None:
        """Take in the gradient of the logits of some tokens.

        Args:
            part: The tokens.
            chunk: Their states, in the precision of the products.
            gradient: [tokens, V], in the precision of the sums.
        """
        lowered = gradient.to(chunk.dtype)
        self._to_states[part] = (lowered @ self._head.weight).to(self._to_states.dtype)
        if self._to_weight is not None and chunk.dtype == gradient.dtype:
            self._to_weight.addmm_(lowered.t(), chunk)
        elif self._to_weight is not None:
            for first in range(0, len(self._to_weight), _BLOCK_ROWS):
                block = slice(first, first + _BLOCK_ROWS)
                self._to_weight[block] += lowered[:, block].t() @ chunk
        if self._to_bias is not None:
            self._to_bias += gradient.sum(dim=0)

    def of_inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of states, weight and bias, each in its own precision."""
        pairs = ((self._to_weight, self._weight), (self._to_bias, self._bias))
        to_weight, to_bias = (
            None if sums is None or own is None else sums.to(own.dtype) for sums, own in pairs
        )
        return self._to_states, to_weight, to_bias


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: tuple[float, float | None],
        targets: Tensor,
        temperature: float,
        weigh: Weigh | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _compute_dtype(states)
        # Cast once here, not once a chunk as autocast would.
        head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), *shape)
        exact = torch.promote_types(dtype, torch.float32)
        logprobs = torch.empty(len(targets), dtype=exact, device=states.device)
        entropies = torch.empty_like(logprobs)
        loss = logprobs.new_zeros(())
        gradients = None
        if weigh is not None:
            # A frozen head under LoRA needs no gradient.
            trained = weight if ctx.needs_input_grad[1] else None
            gradients = _HeadGradients(head, states, trained, bias, exact)
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(targets), CHUNK_TOKENS):
                part = slice(start, min(start + CHUNK_TOKENS, len(targets)))
                chunk = states[part].to(dtype)
                logits = head.logits(chunk).to(exact)
                slope = head.slope(logits)
                everyone = torch.log_softmax(logits.div_(temperature), dim=-1)
                logprobs[part] = everyone.gather(1, targets[part, None])[:, 0]
                probabilities = torch.exp(everyone, out=logits)
                everyone.mul_(probabilities).nan_to_num_(0.0)
                entropies[part] = -everyone.sum(dim=-1)
                if gradients is None or weigh is None:
                    continue
                weights = weigh(part, logprobs[part]).to(exact)[:, None]
                # d(-w log p) / d logits = w (p - onehot) / temperature
                gradient = probabilities.mul_(weights)
                gradient.scatter_add_(1, targets[part, None], -weights)
                gradient.mul_(head.scale / temperature)
                if slope is not None:
                    gradient.mul_(slope)
                gradients.add(part, chunk, gradient)
                loss -= (weights[:, 0] * logprobs[part]).sum()
        ctx.gradients = (None, None, None) if gradients is None else gradients.of_inputs()
        ctx.mark_non_differentiable(logprobs, entropies)
        return loss, logprobs, entropies

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
        to_states, to_weight, to_bias = ctx.gradients
        del ctx.gradients  # they may be as large as the head
        scaled = [
            None if part is None else part.mul_(gradient.to(part.dtype))
            for part in (to_states, to_weight, to_bias)
        ]
        return (*scaled, None, None, None, None)


def _compute_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    dtype = states.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.double:
        dtype = torch.get_autocast_dtype(device)
    # The gradient is formed before a gradient scaler sees the loss: float16 would lose small ones.
    return torch.float32 if dtype == torch.float16 else dtype


def _configured_head(model: Any) -> Head:
    projection, config = model.get_output_embeddings(), model.config.get_text_config()
    return Head(
        weight=projection.weight,
        bias=getattr(projection, "bias", None),
        scale=1.0 / getattr(config, "logits_scaling", 1.0),
        cap=getattr(config, "final_logit_softcapping", None),
    )


@torch.no_grad()
def _head_is_exact(model: Any) -> bool:
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    was_training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        found = _configured_head(model).logits(states)
        return torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    except (AttributeError, TypeError, RuntimeError):
        return False
    finally:
        model.train(was_training)
