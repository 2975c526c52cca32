"""The GRAO objective and its closed-form derivatives. Pure: torch only.

Shapes: B prompts, G completions a prompt; the reference answer stands last in a group, at index G.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GRAOWeights:
    """Weights of the three terms and the reading of the reference answer's sign.

    Source: arXiv 2508.07750, equation 3: imitation is its beta, regularizer its lambda.

    Departure: with ``gate`` (default) the reference answer is never pushed down. Equation 3 taken
    literally does so as soon as the policy beats it (its advantage turns negative), and nothing
    bounds that push: log pi(y) falls for ever and its gradient swamps exploration. The paper's text
    says the policy imitates "only when its own results are wrong", which is what the gate does.

    Args:
        exploration: Weight of ``1/G sum_i A_oi l(o_i)``; 1 in the paper.
        imitation: beta, weight of ``A_y l(y)``.
        regularizer: lambda, weight of ``1/G sum_i A_oi (l(o_i) - l(y))``.
        gate: Keep only the upward push on the reference answer, in imitation and regularizer alike.
    """

    exploration: float = 1.0
    imitation: float = 0.5
    regularizer: float = 0.6
    gate: bool = True


@dataclass(frozen=True)
class GRAOTerms:
    """The terms of the objective, each averaged over prompts (scalars, nats per token).

    ``total`` is maximised and is the sum of the other three, each with its weight applied.
    """

    exploration: Tensor
    imitation: Tensor
    regularizer: Tensor

    @property
    def total(self) -> Tensor:
        return self.exploration + self.imitation + self.regularizer

    def sizes(self) -> dict[str, Tensor]:
        """Return the summed magnitudes of each term over prompts; their ratios are its shares."""
        return {
            name: getattr(self, name).detach().abs().sum()
            for name in ("exploration", "imitation", "regularizer")
        }


def grao_terms_per_prompt(
    mean_logprobs: Tensor, advantages: Tensor, weights: GRAOWeights
) -> GRAOTerms:
    """Return the three weighted terms of equation 3 for every prompt, not yet averaged.

    Source: arXiv 2508.07750, equation 3, with the gate of `GRAOWeights`.

    Args:
        mean_logprobs: [B, G+1] l(x), mean token log-probability in nats, reference answer last.
        advantages: [B, G+1] of `group_advantages`; they carry no gradient.
        weights: Weights of the terms.

    Returns:
        Terms of shape [B].
    """
    completions, reference_answer = mean_logprobs[:, :-1], mean_logprobs[:, -1]
    of_completions, of_reference_answer, pull = _gated(advantages.detach(), weights)
    exploration = (of_completions * completions).mean(dim=1)
    return GRAOTerms(
        exploration=weights.exploration * exploration,
        imitation=weights.imitation * of_reference_answer * reference_answer,
        regularizer=weights.regularizer * (exploration + pull * reference_answer),
    )


def grao_objective(mean_logprobs: Tensor, advantages: Tensor, weights: GRAOWeights) -> GRAOTerms:
    """Return the three weighted terms of equation 3 averaged over prompts; maximise ``total``.

    Source: arXiv 2508.07750, equation 3, with the gate of `GRAOWeights`.

    Args:
        mean_logprobs: [B, G+1] l(x), mean token log-probability in nats, reference answer last.
        advantages: [B, G+1] of `group_advantages`; they carry no gradient.
        weights: Weights of the terms.

    Example:
        Two completions lose to the reference answer: the gate is open, y is imitated.

        >>> advantages = torch.tensor([[-0.7071, -0.7071, 1.4142]])
        >>> terms = grao_objective(torch.tensor([[-2.0, -2.0, -1.0]]), advantages, GRAOWeights())
        >>> [round(term.item(), 4) for term in (terms.exploration, terms.imitation, terms.total)]
        [1.4142, -0.7071, 1.1314]
    """
    terms = grao_terms_per_prompt(mean_logprobs, advantages, weights)
    return GRAOTerms(terms.exploration.mean(), terms.imitation.mean(), terms.regularizer.mean())


def grao_coefficients(advantages: Tensor, weights: GRAOWeights) -> Tensor:
    """Return dJ/dl for every member of every group: the objective is linear in l.

    With the reference answer inside the statistics, the group's advantages sum to zero, hence
    ``dJ/dl(o_i) = (1 + lambda) A_oi / G`` and ``dJ/dl(y) = (beta + lambda / G) A_y`` (for weight 1
    on exploration). Known before any forward pass, they let rows be trained in any micro-batches.

    Source: derivative of arXiv 2508.07750, equation 3, with the gate of `GRAOWeights`.

    Args:
        advantages: [B, G+1] of `group_advantages`.
        weights: Weights of the terms.

    Returns:
        [B, G+1] derivative of one prompt's objective; the mean over prompts is left to the caller.
    """
    of_completions, of_reference_answer, pull = _gated(advantages, weights)
    group_size = of_completions.shape[1]
    on_completions = (weights.exploration + weights.regularizer) * of_completions / group_size
    on_reference_answer = weights.imitation * of_reference_answer + weights.regularizer * pull
    return torch.cat([on_completions, on_reference_answer[:, None]], dim=1)


def _gated(advantages: Tensor, weights: GRAOWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Return A_o [B, G], A_y [B] and the regularizer's coefficient on l(y), -mean_i A_oi [B]."""
    of_completions, of_reference_answer = advantages[:, :-1], advantages[:, -1]
    pull = -of_completions.mean(dim=1)
    if weights.gate:
        return of_completions, of_reference_answer.clamp(min=0), pull.clamp(min=0)
    return of_completions, of_reference_answer, pull
