"""The Bradley-Terry loss of reward models on pairs of answers. Pure: torch only.

Shapes: B pairs. Scores are log-odds: sigmoid(score(a) - score(b)) is the probability that a is
preferred to b.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class BradleyTerrySettings:
    """Which loss.

    Args:
        margin: Log-odds by which a chosen answer must lead before its pair counts as told
            (arXiv 2307.09288, equation 2), for pairs that bring no margin of their own.
        label_smoothing: Share of pairs thought to be labelled the wrong way round, in [0, 0.5).
        centring: Weight of ``(chosen + rejected)^2``, which settles the scores' free constant near
            0 (arXiv 2312.09244, as its published recipe writes it); 0 = none.
    """

    margin: float = 0.0
    label_smoothing: float = 0.0
    centring: float = 0.0


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    settings: BradleyTerrySettings,
    margins: Tensor | None = None,
) -> Tensor:
    """Return the loss of each pair, [B]; minimise its mean.

    Source: arXiv 2203.02155, equation 1, ``-log sigmoid(chosen - rejected - margin)``. Departure:
    under label smoothing the exchanged pair has no margin, since a margin says how sure the label
    is.

    Args:
        chosen: [B] scores of the chosen answers, log-odds.
        rejected: [B] scores of the rejected ones.
        settings: Which loss.
        margins: [B] each pair's own margin in log-odds, instead of ``settings.margin``.

    >>> import torch
    >>> lead = torch.tensor([2.0]), torch.tensor([2.0])
    >>> bradley_terry_loss(*lead, BradleyTerrySettings()).exp()
    tensor([2.])
    """
    smoothing = settings.label_smoothing
    lead = chosen - rejected
    told = lead - (settings.margin if margins is None else margins)
    loss = -(1 - smoothing) * F.logsigmoid(told)
    if smoothing:
        loss = loss - smoothing * F.logsigmoid(-lead)
    if settings.centring:
        loss = loss + settings.centring * (chosen + rejected).square()
    return loss
