"""The clipped policy ratio of PPO and GRPO. Pure: torch only.

Shapes: K tokens of R rows behind one another; ``row`` [K] tells whose each token is.
"""

from typing import Literal

import torch
from torch import Tensor

RatioLevel = Literal["token", "sequence"]

_LARGEST_LOG_RATIO = 20.0


def policy_ratio(
    logprobs: Tensor, old_logprobs: Tensor, row: Tensor, level: RatioLevel = "token"
) -> Tensor:
    """Return pi / pi_old of each token, or of its whole row.

    Source: "token" arXiv 1707.06347, equation 6; "sequence" arXiv 2507.18071 (GSPO), equation 7:
    the geometric mean over the row's tokens, the same for all of them.

    Args:
        logprobs: [K] nats, under the policy.
        old_logprobs: [K] nats, under the policy that sampled.
        row: [K] long.
        level: "token" or "sequence".

    Returns:
        [K].
    """
    log_ratio = logprobs - old_logprobs
    if level == "sequence":
        log_ratio = mean_by_row(log_ratio, row)
    return bounded(log_ratio).exp()


def clipped_loss(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return PPO's loss of each token, ``-min(r A, clip(r, low, high) A)``.

    Source: arXiv 1707.06347, equation 7; unequal sides as in DAPO, arXiv 2503.14476, equation 10.

    Args:
        ratio: [K] of `policy_ratio`.
        advantages: [K] unitless, no gradient.
        low: Lower bound of the ratio, such as 0.8.
        high: Upper bound of the ratio, such as 1.2.

    Returns:
        [K].
    """
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)


def is_clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return which tokens `clipped_loss` gives no gradient, below and above, [K] bool each."""
    return (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)


def bounded(log_ratio: Tensor) -> Tensor:
    """Return log-ratios within +-20: beyond, a ratio says no more, and its exponent overflows."""
    return log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)


def mean_by_row(values: Tensor, row: Tensor) -> Tensor:
    """Return for every token the mean over its row, [K]; every row up to the last has a token."""
    # There are no more rows than tokens: how many would have to be read from the device.
    room = values.new_zeros(len(row))
    sums = room.index_add(0, row, values)
    counts = room.index_add(0, row, torch.ones_like(values))
    return sums[row] / counts[row]
