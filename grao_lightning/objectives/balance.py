"""The loss that balances the experts of a mixture. Pure: torch only.

Source: arXiv 2101.03961, equations 4 to 6, over all layers together as in transformers. Its counts
are those of all tokens of a step over all devices, as arXiv 2501.11873 advises: a micro-batch need
not be balanced in itself, and how a step is split changes nothing. Shapes: T tokens, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """What routers did with tokens, summed over tokens and layers.

    Attributes:
        assigned: [E] weight of the tokens that each expert was chosen for, without gradient.
        probabilities: [E] sum of the routers' probabilities by weight, with a gradient.
        total: Scalar, weight of all tokens, once a layer.
    """

    assigned: Tensor
    probabilities: Tensor
    total: Tensor

    def __add__(self, other: "Routing") -> "Routing":
        """Return the sums over the tokens of both."""
        return Routing(
            self.assigned + other.assigned,
            self.probabilities + other.probabilities,
            self.total + other.total,
        )


def routing_of(logits: Tensor, weights: Tensor, top_k: int) -> Routing:
    """Return what one layer's router did.

    Args:
        logits: [T, E] of the router.
        weights: [T] of the tokens; 0 = does not count.
        top_k: Experts a token.
    """
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    weights = weights.to(probabilities)
    chosen = probabilities.detach().topk(top_k, dim=-1).indices
    assigned = torch.zeros_like(probabilities[0]).index_add(
        0, chosen.flatten(), weights.repeat_interleave(top_k)
    )
    return Routing(assigned.detach(), weights @ probabilities, weights.sum())


def load_balancing_loss(part: Routing, whole: Routing) -> Tensor:
    """Return the share of some tokens in the loss of all tokens; shares add up to the loss.

    1 is even with one expert a token, ``top_k`` with several. With ``part`` the whole it is
    the loss.

    >>> even = Routing(torch.ones(4), torch.ones(4), torch.tensor(4.0))
    >>> load_balancing_loss(even, even).item()
    1.0

    Args:
        part: Of a micro-batch.
        whole: Of all tokens of the step.
    """
    share = whole.assigned / whole.total
    return len(share) * (share * part.probabilities / whole.total).sum()
