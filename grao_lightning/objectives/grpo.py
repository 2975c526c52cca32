"""GRPO: the loss of each token and what weight it has in the mean. Pure: torch only.

Shapes: K tokens of R rows behind one another.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from grao_lightning.objectives.clipping import token_drift
from grao_lightning.objectives.ratio import RatioLevel, clipped_loss, policy_ratio

Aggregation = Literal["completions", "tokens", "max_tokens"]


@dataclass(frozen=True)
class GRPOSettings:
    """What a token's loss is.

    Args:
        eps_low: The ratio is clipped below ``1 - eps_low``.
        eps_high: The ratio is clipped above ``1 + eps_high``.
        ratio: Of the token, or of the whole completion (GSPO).
        kl_weight: Weight of the k3 estimate of KL(policy || reference model); 0 = none.
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    ratio: RatioLevel = "token"
    kl_weight: float = 0.0


def grpo_token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    row: Tensor,
    settings: GRPOSettings,
    reference_model_logprobs: Tensor | None = None,
) -> Tensor:
    """Return the loss of each token; minimise its weighted sum, see `token_weights`.

    Source: arXiv 2402.03300, equation 3 (per token, without the means), KL of equation 4.

    Args:
        logprobs: [K] nats, under the policy; the only part with a gradient.
        old_logprobs: [K] nats, under the policy that sampled.
        advantages: [K] unitless, the completion's for each of its tokens.
        row: [K] long, the completion of each token.
        settings: Clipping, level of the ratio, KL weight.
        reference_model_logprobs: [K] nats; needed where ``kl_weight`` is not 0.

    Returns:
        [K].
    """
    ratio = policy_ratio(logprobs, old_logprobs, row, settings.ratio)
    loss = clipped_loss(ratio, advantages, 1 - settings.eps_low, 1 + settings.eps_high)
    if settings.kl_weight:
        assert reference_model_logprobs is not None, "kl_weight needs a reference model"
        loss = loss + settings.kl_weight * token_drift(logprobs, reference_model_logprobs)
    return loss


def token_weights(lengths: Tensor, aggregation: Aggregation) -> Tensor:
    """Return the weight that each token of a row has in the loss, [R]; not yet divided.

    The loss is ``sum_r w_r sum_t loss_rt / W``, with W the sum of `weight_total` over all devices.

    - "completions": the mean over tokens, then over completions (GRPO, arXiv 2402.03300).
    - "tokens": the mean over all tokens (DAPO, arXiv 2503.14476, equation 8).
    - "max_tokens": the sum over a fixed number of tokens (Dr. GRPO, arXiv 2503.20783).

    Args:
        lengths: [R] tokens of each row; 0 for a row that is left out.
        aggregation: One of the above.

    Raises:
        ValueError: It is none of the above.
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(
            f"aggregation must be one of {', '.join(get_args(Aggregation))}; got {aggregation!r}"
        )
    present = (lengths > 0).double()
    return present / lengths.clamp(min=1) if aggregation == "completions" else present


def weight_total(lengths: Tensor, aggregation: Aggregation, max_tokens: int) -> float:
    """Return this device's part of the divisor W of `token_weights`.

    Args:
        lengths: [R] tokens of each row; 0 for a row that is left out.
        aggregation: As in `token_weights`.
        max_tokens: Most tokens of a completion.
    """
    if aggregation == "tokens":
        return float(lengths.sum())
    return float(len(lengths)) * (max_tokens if aggregation == "max_tokens" else 1)
