"""From last states to token log-probabilities without logits of the whole vocabulary.

Shapes: K tokens, H hidden, V vocabulary. Logits exist for one chunk of tokens at a time.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grao_lightning.language_model.sharded import device_of, is_sharded_part, shards_of
from grao_lightning.language_model.trial import all_agree, at_rest, decoder_of

log = logging.getLogger(__name__)

#: Tokens whose logits exist at the same time on a CPU: the fastest of 64 to 512, and the leanest
#: of those as fast.
CHUNK_TOKENS = 128
#: Logits that exist at the same time elsewhere, and the tokens they may belong to.
_CHUNK_LOGITS = 2**27
_CHUNK_RANGE = (1024, 4096)
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
        return self.shaped(F.linear(states, self.weight, self.bias))

    def shaped(self, logits: Tensor) -> Tensor:
        """Return the logits of the products ``W s + b``, [K, V]."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """Return the cap's slope at capped logits, of their shape; None without a cap."""
        return None if self.cap is None else (logits / self.cap).square_().neg_().add_(1)


def head_of(model: Any) -> Head | None:
    """Return the head of a Hugging Face causal language model, None if it cannot be told.

    It must plainly be a linear map of the model's own: a family may scale, cap or transform its
    logits in ways this file does not know, and an adapter may sit on it. Whether it is one is
    looked at every time; what the model makes of its logits is tried once, and again where its
    class, forward pass, hooks or configured factors are others.
    """
    return None if head_obstacle(model) else Head(*_projection(model), *model._grao_head.shape)


def head_obstacle(model: Any) -> str | None:
    """Return why a model's head cannot be told, None if it can."""
    reason = _not_plain(model)
    forward = getattr(model.forward, "__func__", model.forward)
    hooks = (*model._forward_hooks, *model._forward_pre_hooks)
    kind = (type(model), forward, hooks, reason, _shapes(model.config.get_text_config()))
    tried: _Tried | None = getattr(model, "_grao_head", None)
    if tried is None or tried.kind != kind:
        scale, cap = 1.0, None
        if reason is None:
            reason, (scale, cap) = _try_head(model)
        tried = model._grao_head = _Tried(kind, reason, (scale, cap))
        if reason is not None:
            log.warning(
                "%s turns states into logits in an unknown way (%s): logits of the whole "
                "vocabulary are kept for every position; lower micro_batch_tokens if memory runs "
                "out",
                type(model).__name__,
                reason,
            )
    if tried.reason is None:
        return None
    return f"it turns states into logits in an unknown way ({tried.reason})"


def head_loss(
    states: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float,
    weigh: Weigh | None,
    *,
    into_grad: bool = False,
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
        into_grad: Add the weight's gradient to its ``.grad`` at once, so that no second [V, H]
            lives beside it. Only for a loss that is differentiated as it is, once (another factor
            than 1 in the backward pass is an error), and where nothing waits for the gradient in
            autograd, as DDP and FSDP do. A weight with hooks, or that is no leaf, gets its gradient
            from autograd all the same.
    """
    weight, grown = head.weight, None
    if into_grad and weigh is not None and _takes_gradient(weight):
        # Hidden from autograd, which would wait for a gradient of it.
        weight, grown = weight.detach(), weight
    result: tuple[Tensor, Tensor, Tensor] = _HeadLoss.apply(
        states, weight, head.bias, (head.scale, head.cap), targets, temperature, weigh, grown
    )
    return result


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Return the tokens whose logits exist at the same time, about 14 bytes each.

    A low-precision weight's gradient is read and written once for many chunks. On a CPU small
    chunks stay in its cache; other devices are busy only with many tokens.
    """
    if device.type == "cpu":
        return CHUNK_TOKENS
    low, high = _CHUNK_RANGE
    return min(max(_CHUNK_LOGITS // vocabulary, low), high)


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


def _takes_gradient(weight: Tensor) -> bool:
    """Return whether a gradient may be added to a weight without autograd."""
    hooks = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_leaf and not hooks
    return plain and weight.requires_grad and torch.is_grad_enabled()


class _WeightGradient:
    """Sums up the gradient of the weight, [V, H].

    In full precision each chunk is added as it comes. In low precision a sum over few tokens is
    mostly traffic, so the logits' gradients of up to 2 H tokens, which take the room of a float32
    gradient, wait for one product, whose sums are float32 inside.

    Args:
        weight: [V, H] as the model holds it; its ``.grad`` is added to where ``grown``.
        tokens: K, of all chunks.
        dtype: Of the products.
        exact: Precision of the sums.
        grown: Whether to add to ``.grad``.
    """

    def __init__(
        self, weight: Tensor, tokens: int, dtype: torch.dtype, exact: torch.dtype, grown: bool
    ) -> None:
        self._weight, self._grown = weight, grown
        vocabulary, hidden = weight.shape
        span = min(tokens, 2 * hidden)
        self._waiting = 0
        self._gradients: Tensor | None = None
        self._states: Tensor | None = None
        if dtype != exact:
            self._gradients = weight.new_empty(span, vocabulary, dtype=dtype)
            self._states = weight.new_empty(span, hidden, dtype=dtype)
        once = dtype != exact and span == tokens
        self._own = once or weight.dtype == exact  # its own precision keeps every digit
        if grown and self._own:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            self._sums = weight.grad
        else:
            self._sums = torch.zeros_like(weight, dtype=weight.dtype if self._own else exact)

    def add(self, gradient: Tensor, states: Tensor) -> None:
        """Take in the logits' gradient [tokens, V] and states [tokens, H] of a chunk."""
        if self._gradients is None or self._states is None:
            self._sums.addmm_(gradient.t(), states)
            return
        done = 0
        while done < len(states):
            part = min(len(states) - done, len(self._states) - self._waiting)
            place = slice(self._waiting, self._waiting + part)
            self._gradients[place] = gradient[done : done + part]
            self._states[place] = states[done : done + part]
            self._waiting += part
            done += part
            if self._waiting == len(self._states):
                self._empty()

    def _empty(self) -> None:
        assert self._gradients is not None and self._states is not None
        waiting = slice(self._waiting)
        for first in range(0, len(self._sums), _BLOCK_ROWS):
            block = slice(first, first + _BLOCK_ROWS)
            self._sums[block] += self._gradients[waiting, block].t() @ self._states[waiting]
        self._waiting = 0

    def result(self) -> Tensor | None:
        """Return the gradient in the weight's precision, None where it lies in ``.grad``."""
        if self._waiting:
            self._empty()
        self._gradients = self._states = None
        if not self._grown:
            return self._sums.to(self._weight.dtype)
        if not self._own:
            if self._weight.grad is None:
                self._weight.grad = torch.zeros_like(self._weight)
            for first in range(0, len(self._sums), _BLOCK_ROWS):
                block = slice(first, first + _BLOCK_ROWS)
                self._weight.grad[block] += self._sums[block]
        return None


class _HeadGradients:
    """Sums up the gradients of states, weight and bias, chunk by chunk.

    Args:
        head: In the precision of the products.
        states: [K, H].
        weight: Sums up that of the weight; None where it is frozen.
        bias: [V] as the model holds it, or None.
        exact: Precision of the sums.
    """

    def __init__(
        self,
        head: Head,
        states: Tensor,
        weight: _WeightGradient | None,
        bias: Tensor | None,
        exact: torch.dtype,
    ) -> None:
        self._head, self._weight, self._bias = head, weight, bias
        self._to_states = torch.empty_like(states)
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
        if self._weight is not None:
            self._weight.add(lowered, chunk)
        if self._to_bias is not None:
            self._to_bias += gradient.sum(dim=0)

    def of_inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of states, weight and bias, each in its own precision."""
        to_bias = self._to_bias
        if to_bias is not None and self._bias is not None:
            to_bias = to_bias.to(self._bias.dtype)
        return self._to_states, None if self._weight is None else self._weight.result(), to_bias


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
        grown: Tensor | None,
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
            summed = None  # a frozen head under LoRA needs no gradient
            if grown is not None or ctx.needs_input_grad[1]:
                owner = weight if grown is None else grown
                summed = _WeightGradient(owner, len(targets), dtype, exact, grown is not None)
            gradients = _HeadGradients(head, states, summed, bias, exact)
        size = chunk_tokens(len(weight), states.device)
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(targets), size):
                part = slice(start, min(start + size, len(targets)))
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
                del everyone
                weights = weigh(part, logprobs[part]).to(exact)[:, None]
                factor = head.scale / temperature
                gradient = _logits_gradient(probabilities, targets[part], weights, factor, slope)
                gradients.add(part, chunk, gradient)
                loss -= (weights[:, 0] * logprobs[part]).sum()
        ctx.gradients = (None, None, None) if gradients is None else gradients.of_inputs()
        ctx.grown = grown is not None
        ctx.mark_non_differentiable(logprobs, entropies)
        return loss, logprobs, entropies

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
        to_states, to_weight, to_bias = ctx.gradients
        del ctx.gradients  # they may be as large as the head
        if ctx.grown:  # no wait for the device
            torch._assert_async(gradient == 1, "into_grad: the loss must not be scaled")
        scaled = [
            None if part is None else part.mul_(gradient.to(part.dtype))
            for part in (to_states, to_weight, to_bias)
        ]
        return (*scaled, None, None, None, None, None)


def _logits_gradient(
    probabilities: Tensor, targets: Tensor, weights: Tensor, factor: float, slope: Tensor | None
) -> Tensor:
    """Return d(-w log p) / d logits = w (p - onehot) factor slope [k, V] in place of p."""
    gradient = probabilities.mul_(weights)
    gradient.scatter_add_(1, targets[:, None], -weights)
    gradient.mul_(factor)
    return gradient if slope is None else gradient.mul_(slope)


def _compute_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    dtype = states.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.double:
        dtype = torch.get_autocast_dtype(device)
    # The gradient is formed before a gradient scaler sees the loss: float16 would lose small ones.
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass(frozen=True)
class _Tried:
    """What a trial of a head found.

    Attributes:
        kind: What the result holds for.
        reason: Why the head cannot be told.
        shape: Scale and cap of its logits.
    """

    kind: tuple[Any, ...]
    reason: str | None
    shape: tuple[float, float | None]


def _projection(model: Any) -> tuple[Tensor, Tensor | None]:
    projection = model.get_output_embeddings()
    return projection.weight, projection.bias


def _not_plain(model: Any) -> str | None:
    """Return why the last module is no linear map of a weight and a bias, None if it is."""
    try:
        projection = model.get_output_embeddings()
    except Exception as error:
        return type(error).__name__
    if projection is None:
        return "it has no output embeddings"
    ours = isinstance(projection, nn.Linear) and type(projection).forward is nn.Linear.forward
    # A sharded part has one of each, which gathers it.
    own = 1 if is_sharded_part(projection) else 0
    hooked = max(len(projection._forward_hooks), len(projection._forward_pre_hooks)) > own
    if not ours or hooked or "forward" in vars(projection):
        kind = f"{type(projection).__module__}.{type(projection).__qualname__}"
        return f"its last module is a {kind}" + (" with hooks" if ours else ", no plain Linear")
    return None


def _shapes(config: Any) -> list[tuple[float, float | None]]:
    """Return what the logits' scale and cap may be by the names that families give them."""
    scales = {1.0: None}
    for name in ("logit_scale", "lm_head_multiplier", "logits_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            scales[value] = scales[1 / value] = None
    if getattr(config, "dim_model_base", None):  # MiniCPM
        scales[config.dim_model_base / config.hidden_size] = None
    caps: dict[float | None, None] = {None: None}
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            caps[value] = None
    return [(scale, cap) for scale in scales for cap in caps]


def _try_head(model: Any) -> tuple[str | None, tuple[float, float | None]]:
    """Return why a model's logits cannot be told, and else their scale and cap.

    The decoder's states are replaced by random ones, small and large, which show a scale and a cap
    that a model's own states may not yet reach.
    """
    try:
        with at_rest(model):
            ids = torch.arange(4, device=device_of(model))[None]
            ids = ids % model.get_input_embeddings().weight.shape[0]
            decoder = decoder_of(model)
            own = decoder(input_ids=ids, use_cache=False).last_hidden_state
            sizes = torch.tensor([0.01, 1.0, 10.0, 100.0], device=own.device)[:, None]
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(own.shape, generator=generator).to(own.device) * sizes
            with _replaced(decoder, drawn.to(own.dtype)) as states:
                replaced = model(input_ids=ids, use_cache=False).logits[0]
                calls = len(states)
                learned = _learned_outside(model, decoder, ids)
            expected = model(input_ids=ids, use_cache=False).logits[0]
            if calls != 1:
                return "it does not call its decoder once", (1.0, None)
            if learned:
                return f"{learned} takes part", (1.0, None)
            for shape in _shapes(model.config.get_text_config()):
                head = Head(*_projection(model), *shape)
                pairs = [(drawn[0].to(own.dtype), replaced), (own[0], expected)]
                if all(all_agree(head.logits(at), logits, own.dtype) for at, logits in pairs):
                    return None, shape
    except Exception as error:  # models fail in many ways
        return f"{type(error).__name__}: {str(error)[:100]}", (1.0, None)
    return "they are no product of states and weight", (1.0, None)


@contextmanager
def _replaced(decoder: Any, states: Tensor) -> Iterator[list[Any]]:
    """Make a decoder give these states, and count how often it does."""
    given: list[Any] = []

    def replace(module: Any, inputs: Any, output: Any) -> Any:
        given.append(states)
        if isinstance(output, tuple):
            return (states, *output[1:])
        output.last_hidden_state = states
        return output

    hook = decoder.register_forward_hook(replace)
    try:
        yield given
    finally:
        hook.remove()


def _learned_outside(model: Any, decoder: Any, ids: Tensor) -> str | None:
    """Return a parameter between the decoder's states and the logits, besides weight and bias.

    It may be without effect now, and have one once it is trained or loaded.
    """
    inside = {id(part) for part in [*decoder.parameters(), *_projection(model)]}
    outside = {name: p for name, p in model.named_parameters() if id(p) not in inside}
    if not outside:
        return None
    if shards_of(model) is not None:  # a trial needs a gradient, which all ranks would exchange
        return next(iter(outside))
    frozen = [part for part in outside.values() if not part.requires_grad]
    for part in frozen:
        part.requires_grad_(True)
    try:
        with torch.enable_grad():
            total = model(input_ids=ids, use_cache=False).logits.sum()
        if not total.requires_grad:
            return None
        gradients = torch.autograd.grad(total, list(outside.values()), allow_unused=True)
        return next((n for n, g in zip(outside, gradients, strict=True) if g is not None), None)
    finally:
        for part in frozen:
            part.requires_grad_(False)
