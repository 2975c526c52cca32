"""What the routers of a mixture of experts do with the tokens of rows.

Every prompt of a step counts once, however many answers follow it and in how many passes it is
read; so does every token of an answer but the last one, which a pack does not read. Padding does
not count. On rows of different prompts that is the loss of transformers. Shapes: R rows, E experts.
"""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grao_lightning.batch import TokenRow
from grao_lightning.language_model.frozen import inside
from grao_lightning.language_model.trial import at_rest, trial_rows
from grao_lightning.objectives.balance import Routing, load_balancing_loss, routing_of

log = logging.getLogger(__name__)

#: Of families that balance their experts without a loss.
_BIAS = "e_score_correction_bias"


class Router:
    """Reads ids as a decoder does and keeps what its routers did.

    Args:
        decoder: Gives states, and ``router_logits`` where they are asked for.
        top_k: Experts a token.

    Attributes:
        routing: Of all that was read so far.
    """

    def __init__(self, decoder: Any, top_k: int) -> None:
        self._decoder, self._top_k = decoder, top_k
        self.routing: Routing | None = None

    def __call__(
        self, ids: Tensor, *, token_weights: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Return the states [N, T, H] of ids; without ``token_weights`` [N, T] none counts."""
        output = self._decoder(input_ids=ids, use_cache=False, output_router_logits=True, **options)
        for logits in output.router_logits if token_weights is not None else ():
            found = routing_of(logits.flatten(0, -2), token_weights.flatten(), self._top_k)  # type: ignore[union-attr]
            self.routing = found if self.routing is None else self.routing + found
        states: Tensor = output.last_hidden_state
        return states


def router_of(model: Any, decoder: Any) -> Router:
    """Return how a mixture of experts reads ids where its routers are watched."""
    return Router(decoder, model.config.get_text_config().num_experts_per_tok)


def prompt_shares(rows: Sequence[TokenRow]) -> list[float]:
    """Return the weight of each row's prompt, [R]: 1 over the rows with the same prompt."""
    counts = Counter(tuple(row.prompt_ids) for row in rows)
    return [1.0 / counts[tuple(row.prompt_ids)] for row in rows]


def leave_out_router_logits(model: Any) -> None:
    """Let a model give no router logits unless asked: its own loss never enters."""
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False


def tell_router_loss(model: Any) -> None:
    """Say that a loss of the routers, for which the configuration has a weight, is left out."""
    weight = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    if weight and _own_loss(model) is not None:
        log.warning(
            "%s: the loss that balances its experts is left out (its configuration weighs it by "
            "router_aux_loss_coef=%s): model.router_loss=%s adds it",
            type(model).__name__,
            weight,
            weight,
        )


def router_loss_obstacle(model: Any, decoder_of: Callable[[Any], Any]) -> str | None:
    """Return why a model has no loss of its routers that can be added, found by trial.

    Args:
        model: A Hugging Face model.
        decoder_of: Returns what gives its states.
    """
    own = _own_loss(model)
    if any(name.endswith(_BIAS) for name, _ in model.named_buffers()):
        return f"its experts are balanced by a bias ({_BIAS}), which is not trained"
    if own is None:
        return "transformers has no such loss for it"
    row = trial_rows(model)[1]
    with at_rest(model):
        try:
            logits = inside(model, lambda model: _logits(decoder_of(model), row, model))
        except TypeError:
            logits = ()
        if not logits:
            return "its decoder gives no router logits"
        top_k = model.config.get_text_config().num_experts_per_tok
        parts = [routing_of(of_layer, torch.ones(len(of_layer)), top_k) for of_layer in logits]
        whole = sum(parts[1:], start=parts[0])
        expected = own(logits, logits[0].shape[-1], top_k)
    if not torch.allclose(load_balancing_loss(whole, whole), expected, rtol=1e-4):
        return "its loss is another one than that of arXiv 2101.03961"
    return None


def _logits(decoder: Any, row: TokenRow, model: Any) -> tuple[Tensor, ...]:
    device = next(model.parameters()).device
    ids = torch.tensor([row.prompt_ids + row.answer_ids], device=device)
    output = decoder(input_ids=ids, use_cache=False, output_router_logits=True)
    found = getattr(output, "router_logits", None) or ()
    return tuple(logits.flatten(0, -2).cpu() for logits in found)


def _own_loss(model: Any) -> Callable[..., Any] | None:
    """Return the function of the family's file in transformers."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Its class may be wrapped, as by FSDP2.
    files = [sys.modules[kind.__module__] for kind in type(inner).__mro__]
    return next(
        (file.load_balancing_loss_func for file in files
         if hasattr(file, "load_balancing_loss_func")),
        None,
    )  # fmt: skip
