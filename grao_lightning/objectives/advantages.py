"""Rewards of a group -> advantages. Pure: torch only.

Shapes: B prompts, G completions a prompt; the reference answer stands last in a group, at index G.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

GroupStatistics = Literal["inside", "outside", "split"]
GroupScale = Literal["population_std", "sample_std", "none"]


def group_advantages(
    rewards: Tensor,
    *,
    statistics: GroupStatistics = "inside",
    scale: GroupScale = "population_std",
    tolerance: float = 1e-6,
) -> Tensor:
    """Return the advantage of every completion and of the reference answer within its group.

    Source: arXiv 2508.07750, equation 4: ``A = (R - mean) / std``. The paper leaves open
    whose rewards enter mean and std:

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
        scale: What divides: "population_std" (GRAO), "sample_std" (the sample standard deviation
            + 1e-4, as TRL's GRPO) or "none" (Dr. GRPO, arXiv 2503.20783).
        tolerance: In the unit of the rewards. Largest spread (maximum minus minimum) that still
            counts as equal.

    Returns:
        [B, G+1], same dtype; unitless, or with "none" in the unit of the rewards.

    Raises:
        ValueError: ``statistics`` or ``scale`` is none of the above, or rewards are not [B, G+1]
            with G >= 1.

    One completion of three beats the reference answer, the others tie with it:

        >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        tensor([[ 1.7321, -0.5774, -0.5774, -0.5774]])
    """
    _check(rewards, statistics, scale)
    precise = rewards.double()  # fp32 sums would leave a residue in groups of equal rewards
    everyone = torch.ones_like(precise, dtype=torch.bool)
    counted = everyone.clone()
    counted[:, -1] = statistics == "inside"
    advantages = _standardised(precise, counted, scale, tolerance)
    if statistics == "split":
        advantages[:, -1] = _standardised(precise, everyone, scale, tolerance)[:, -1]
    return advantages.to(rewards.dtype)


def standardised(scores: Tensor) -> Tensor:
    """Return scores centred in their group and divided by its population standard deviation.

    Args:
        scores: [F, B, M] of F scorers over the M members of B groups, NaN = missing.

    Returns:
        [F, B, M], unitless, NaN where missing, 0 in groups whose scores are equal.
    """
    return group_advantages(scores.flatten(0, 1)).view_as(scores).where(~scores.isnan(), torch.nan)


def _check(rewards: Tensor, statistics: str, scale: str) -> None:
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be [B, G+1], completions first, got shape {tuple(rewards.shape)}"
        )
    choices = {"statistics": (statistics, GroupStatistics), "scale": (scale, GroupScale)}
    for name, (value, kind) in choices.items():
        if value not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {value!r}")


def _standardised(rewards: Tensor, counted: Tensor, scale: GroupScale, tolerance: float) -> Tensor:
    """Return (R - mean) / scale, the statistics over present members that ``counted`` marks."""
    present = ~rewards.isnan()
    counted = counted & present
    number = counted.sum(dim=1, keepdim=True).clamp(min=1)
    mean = rewards.where(counted, 0.0).sum(dim=1, keepdim=True) / number
    centred = rewards - mean
    squares = centred.square().where(counted, 0.0).sum(dim=1, keepdim=True)
    if scale == "none":
        divisor = torch.ones_like(squares)
    elif scale == "sample_std":
        divisor = (squares / (number - 1).clamp(min=1)).sqrt() + 1e-4
    else:
        divisor = (squares / number).sqrt()
    highest = rewards.where(counted, -torch.inf).amax(dim=1, keepdim=True)
    lowest = rewards.where(counted, torch.inf).amin(dim=1, keepdim=True)
    informative = highest - lowest > tolerance  # -inf when nobody counts
    advantages = centred / divisor.where(informative, 1.0)
    return advantages.where(informative & present, 0.0)
