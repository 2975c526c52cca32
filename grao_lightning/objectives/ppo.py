"""PPO by token: rewards with a KL penalty, advantages, the value's loss. Pure: torch only.

Shapes: R rows of at most T tokens, padded on the right, with ``mask`` [R, T], True = a token.
"""

import torch
from torch import Tensor


def token_rewards(scores: Tensor, drift: Tensor, mask: Tensor, kl_weight: float) -> Tensor:
    """Return each token's reward: minus the penalised drift, and the row's score on its last token.

    Source: arXiv 1909.08593, equation 2, spread over tokens as in arXiv 2203.02155.

    Args:
        scores: [R] in the unit of the rewards.
        drift: [R, T] log pi - log pi_reference_model of the sampled tokens, nats.
        mask: [R, T] bool; every row has a token.
        kl_weight: Reward units per nat.

    Returns:
        [R, T], 0 where there is no token.
    """
    rewards = (-kl_weight * drift).where(mask, 0.0)
    last = mask.sum(dim=1) - 1
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float, trace: float
) -> Tensor:
    """Return the generalised advantage estimate of every token; nothing follows a row's last one.

    Source: arXiv 1506.02438, equations 11 and 16: ``sum_k (gamma lambda)^k delta_(t+k)`` with
    ``delta_t = r_t + gamma V_(t+1) - V_t``.

    Args:
        rewards: [R, T].
        values: [R, T] V of the state before each token.
        mask: [R, T] bool.
        discount: gamma.
        trace: lambda.

    Returns:
        [R, T], 0 where there is no token. The returns are these plus the values.
    """
    values = values.where(mask, 0.0)
    advantages = torch.zeros_like(values)
    following_value = following = values.new_zeros(len(values))
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + discount * following_value - values[:, t]
        following = (delta + discount * trace * following).where(mask[:, t], 0.0)
        following_value = values[:, t]
        advantages[:, t] = following
    return advantages


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> Tensor:
    """Return half the squared error of each value, the larger of it and of the clipped value's.

    Source: the value loss of the PPO implementation that goes with arXiv 1707.06347: a value may
    move by ``clip`` from the old one before it stops to earn.

    Args:
        values: [K], with gradient.
        old_values: [K] before the first update.
        returns: [K].
        clip: In the unit of the rewards; None = plain squared error.
    """
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return 0.5 * error


def adapted_kl_weight(
    kl_weight: float, kl: float, target: float, num_completions: int, horizon: int
) -> float:
    """Return the KL weight after a rollout: up where the drift exceeds its target, else down.

    Source: arXiv 1909.08593, section 2.2.

    Args:
        kl_weight: Before.
        kl: Measured, nats per completion.
        target: Wanted, nats per completion.
        num_completions: Of the rollout, over all devices.
        horizon: Completions over which the weight changes by its error.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_weight * (1 + error * num_completions / horizon)
