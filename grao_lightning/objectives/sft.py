"""Supervised fine-tuning on reference answers. Pure: torch only."""

from typing import Literal, get_args

from torch import Tensor

Aggregation = Literal["tokens", "answers"]


def sft_coefficients(num_tokens: Tensor, aggregation: Aggregation = "tokens") -> Tensor:
    """Return the weight of each answer's mean log-probability in the objective; not yet divided.

    The objective is ``sum_r c_r l(y_r) / sum_r c_r``. With "tokens" every token counts the same
    (the usual cross-entropy), with "answers" every answer does, as l(y) in GRAO.

    Args:
        num_tokens: [B] tokens of each answer.
        aggregation: "tokens" or "answers".

    Raises:
        ValueError: ``aggregation`` is neither.
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(
            f"aggregation must be one of {', '.join(get_args(Aggregation))}; got {aggregation!r}"
        )
    weights = num_tokens.float()
    return weights if aggregation == "tokens" else weights.clamp(max=1.0)
