"""The loss that balances a mixture's experts, as a part of every step (`router_loss`)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grao_lightning.batch import TokenRow
from grao_lightning.faults import UserError
from grao_lightning.language_model.routing import (
    prompt_shares,
    router_loss_obstacle,
    tell_router_loss,
)
from grao_lightning.objectives.balance import Routing, load_balancing_loss

#: (rows, weights of their prompts) -> what the routers did with them
Count = Callable[[list[TokenRow], list[float]], Routing]


class RouterBalance:
    """The load-balancing loss of all rows of a step over all devices.

    How often an expert is chosen has no gradient but weighs every token's, so it is counted before
    the first micro-batch: with one more forward pass over the rows, without gradient and head.

    Args:
        weight: Of the loss.
        rows: Of the step.
        micro_batches: Numbers of the rows of each pass; equally many on all ranks that share
            weights.
        count: Reads the rows of a pass.
        over_ranks: Sums values up over all ranks.
    """

    def __init__(
        self,
        weight: float,
        rows: Sequence[TokenRow],
        micro_batches: Sequence[Sequence[int]],
        count: Count,
        over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        self._weight, self._shares = weight, prompt_shares(rows)
        with torch.no_grad():
            parts = [count([rows[n] for n in part], self.shares(part)) for part in micro_batches]
        own = sum(parts[1:], start=parts[0])
        sums = torch.cat([own.assigned, own.probabilities, own.total[None]]).double()
        whole = over_ranks(sums).to(own.assigned)
        size = len(own.assigned)
        self._whole = Routing(whole[:size], whole[size : 2 * size], whole[-1])
        #: The loss before this update, not weighed.
        self.value = load_balancing_loss(self._whole, self._whole)

    def shares(self, numbers: Sequence[int]) -> list[float]:
        """Return the weights of the prompts of some rows."""
        return [self._shares[number] for number in numbers]

    def loss(self, part: Routing | None) -> Tensor:
        """Return a micro-batch's share of the loss, weighed."""
        assert part is not None, "the pass was not told the prompts' weights"
        return self._weight * load_balancing_loss(part, self._whole)


def check_router_loss(model: Any, decoder_of: Callable[[Any], Any], weight: float | None) -> None:
    """Say that the loss is left out of a model that is trained, or that it has none to add.

    Args:
        model: A Hugging Face model.
        decoder_of: Returns what gives its states.
        weight: Of the loss; None: it is left out.

    Raises:
        UserError: There is a weight and no loss.
    """
    if weight is None:
        tell_router_loss(model)
        return
    reason = router_loss_obstacle(model, decoder_of)
    if reason:
        raise UserError(
            f"model.router_loss must be null for {type(model).__name__}, since {reason}; got "
            f"{weight}"
        )
