"""Rewards of a group -> advantages. Pure: torch only.

Shapes: B prompts, G completions a prompt; the reference answer stands last in a group, at index G.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

GroupStatistics = Literal["inside", "outside", "split"]


def group_advantages(
    rewards: Tensor,
    *,
    statistics: GroupStatistics = "inside",
    tolerance: float = 1e-6,
) -> Tensor:
    """Return the advantage of every completion and of the reference answer within its group.

    ``A = (R - mean) / std`` with the population standard deviation, per group.

    Source: arXiv 2508.07750, equation 4. The paper leaves open whose rewards enter mean and std:

    - ``"inside"``: the G completions and the reference answer. Then the advantages of a group sum
      to 0 and their squares to the number of members.
    - ``"outside"``: the G completions only; the reference answer is measured on their scale.
    - ``"split"``: completions as in "outside", the reference answer as in "inside".

    Departure: a group whose rewards are equal within ``tolerance`` carries no signal and gets
    zeros; dividing by ``std + eps`` instead would amplify rounding noise.

    Args:
        rewards: [B, G+1] floating, any unit, reference answer last. NaN means missing: such a
            member is left out of the statistics and gets advantage 0.
        statistics: Whose rewards make mean and standard deviation.
        tolerance: In the unit of the rewards. Largest spread (maximum minus minimum) that still
            counts as equal.

    Returns:
        [B, G+1], same dtype, unitless.

    Raises:
        ValueError: ``statistics`` is none of the above, or rewards are not [B, G+1] with G >= 1.

    Example:
        One completion of three beats the reference answer, the others tie with it:

        >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        tensor([[ 1.7321, -0.5774, -0.5774, -0.5774]])
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be [B, G+1], completions first, got shape {tuple(rewards.shape)}"
        )
    if statistics not in get_args(GroupStatistics):
        raise ValueError(
            f"statistics must be one of {', '.join(get_args(GroupStatistics))}; got {statistics!r}"
        )
    precise = rewards.double()  # fp32 sums would leave a residue in groups of equal rewards
    everyone = torch.ones_like(precise, dtype=torch.bool)
    completions = everyone.clone()
    completions[:, -1] = False
    if statistics == "inside":
        advantages = _standardised(precise, everyone, tolerance)
    else:
        advantages = _standardised(precise, completions, tolerance)
        if statistics == "split":
            advantages[:, -1] = _standardised(precise, everyone, tolerance)[:, -1]
    return advantages.to(rewards.dtype)


def _standardised(rewards: Tensor, counted: Tensor, tolerance: float) -> Tensor:
    """Return (R - mean) / std, the statistics over present members that ``counted`` marks."""
    present = ~rewards.isnan()
    counted = counted & present
    number = counted.sum(dim=1, keepdim=True).clamp(min=1)
    mean = rewards.where(counted, 0.0).sum(dim=1, keepdim=True) / number
    centred = rewards - mean
    variance = centred.square().where(counted, 0.0).sum(dim=1, keepdim=True) / number
    highest = rewards.where(counted, -torch.inf).amax(dim=1, keepdim=True)
    lowest = rewards.where(counted, torch.inf).amin(dim=1, keepdim=True)
    informative = highest - lowest > tolerance  # -inf when nobody counts
    advantages = centred / variance.sqrt().where(informative, 1.0)
    return advantages.where(informative & present, 0.0)
