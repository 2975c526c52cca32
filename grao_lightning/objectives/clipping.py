"""Clipping by the reference model: drift and the outward mask. Pure: torch only."""

from torch import Tensor

from grao_lightning.objectives.ratio import bounded


def token_drift(logprobs: Tensor, reference_model_logprobs: Tensor) -> Tensor:
    """Return the k3 estimate of KL(policy || reference model) at each sampled token, in nats.

    ``exp(d) - d - 1`` with ``d = log pi_reference_model - log pi``: unbiased under the policy's own
    samples and never negative. TRL logs its mean as ``kl``.

    Source: J. Schulman, "Approximating KL divergence" (2020); arXiv 2402.03300, equation 4.

    Args:
        logprobs: [K] of tokens that the policy sampled, nats.
        reference_model_logprobs: [K], nats.
    """
    log_ratio = bounded(reference_model_logprobs - logprobs)
    return log_ratio.exp() - log_ratio - 1


def outward_mask(
    logprobs: Tensor,
    reference_model_logprobs: Tensor,
    coefficients: Tensor,
    *,
    low: float,
    high: float,
) -> Tensor:
    """Return which tokens still count: not those pushed further out of the trusted ratio.

    A token with net coefficient c is dropped when ``c < 0`` and its ratio pi / pi_reference_model
    is already below ``low``, or ``c > 0`` and the ratio is above ``high``. A push back inside
    always counts.

    Args:
        logprobs: [K] nats, under the policy.
        reference_model_logprobs: [K] nats.
        coefficients: [K] derivative of the objective by the row's l(x).
        low: Lower bound of the ratio, below 1.
        high: Upper bound of the ratio, above 1.

    Returns:
        [K] bool, True = counts.
    """
    ratio = bounded(logprobs.detach() - reference_model_logprobs).exp()
    falls_further = (coefficients < 0) & (ratio < low)
    rises_further = (coefficients > 0) & (ratio > high)
    return ~(falls_further | rises_further)


def capped_norm(max_norm: float, drift: float, drift_target: float | None) -> float:
    """Return the gradient-norm cap, lowered in proportion once the drift exceeds its target."""
    if drift_target is None or not drift > drift_target:
        return max_norm
    return max_norm * drift_target / drift
