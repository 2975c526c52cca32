"""What a run is measured by: outcomes and their intervals, pairs, and the sums of one step.

May never import Lightning, transformers or any other part of this package: numbers come in.
"""

from grao_lightning.metrics.outcomes import (
    Estimate,
    GainKind,
    MeanWithInterval,
    NormalizedAlignmentGain,
    RelativeAdversarialScore,
    ShareWithInterval,
    TiesAs,
    compare,
    mean_interval,
    normalized_alignment_gain,
    relative_adversarial_score,
    wilson_interval,
)

__all__ = [
    "Estimate",
    "GainKind",
    "MeanWithInterval",
    "NormalizedAlignmentGain",
    "RelativeAdversarialScore",
    "ShareWithInterval",
    "TiesAs",
    "compare",
    "mean_interval",
    "normalized_alignment_gain",
    "relative_adversarial_score",
    "wilson_interval",
]
