"""DPO and its kin on pairs of a chosen and a rejected answer. Pure: torch only.

Shapes: B pairs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

DPOKind = Literal["sigmoid", "ipo", "hinge"]


@dataclass(frozen=True)
class DPOSettings:
    """Which loss.

    Args:
        kind: "sigmoid" (DPO, arXiv 2305.18290, equation 7), "ipo" (arXiv 2310.12036, equation 17,
            by token) or "hinge" (SLiC, arXiv 2305.10425).
        beta: How dearly the policy pays for leaving the reference model; IPO's tau.
        label_smoothing: Share of pairs thought to be labelled the wrong way round, for "sigmoid"
            (cDPO).
    """

    kind: DPOKind = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0


def dpo_loss(
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    settings: DPOSettings,
) -> Tensor:
    """Return the loss of each pair, [B]; minimise its mean.

    Departure: "ipo" takes mean log-ratios by token, as its authors did in their experiments;
    otherwise its square grows with the length.

    Args:
        chosen_log_ratio: [B] log pi / pi_reference_model of the chosen answers, summed over tokens.
        rejected_log_ratio: [B] of the rejected ones.
        chosen_lengths: [B] tokens.
        rejected_lengths: [B] tokens.
        settings: Which loss.
    """
    beta, smoothing = settings.beta, settings.label_smoothing
    if settings.kind == "ipo":
        by_token = chosen_log_ratio / chosen_lengths - rejected_log_ratio / rejected_lengths
        return (by_token - 1 / (2 * beta)).square()
    margin = beta * (chosen_log_ratio - rejected_log_ratio)
    if settings.kind == "hinge":
        return torch.relu(1 - margin)
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
