"""What travels through one step: each stage fills what the next one reads.

    DataModule            prompts and reference answers
    GroupSampling         completions (and base_completions in validation)
    GroupScoring          rewards, outcomes, advantages
    ReferenceAwareClipping  reference_model_logprobs, outward_limits
    module                reads them all in its training or validation step

Shapes: B prompts, G completions a prompt, N = B * G; rows are prompt-major (all completions of
prompt 0, then of prompt 1, ...).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grao_lightning.metrics.step_statistics import StepStatistics

TokenIds = list[int]


@dataclass
class Completions:
    """Completions of B prompts, G each.

    Attributes:
        ids: N token id lists, the end-of-sequence token included where one was sampled.
        texts: N decoded texts, without special tokens and without the stop string that ended them.
        truncated: N flags: True where the length limit ended the completion, not the policy.
        group_size: G.
        max_tokens: The length limit.
        written: As ``texts``, with all special tokens but the one that ended the completion; by
            default the same.
        prompt_ends: B texts, the last tokens of each prompt with all special ones; where a template
            opens a completion, as with a thought's tag, it is seen here. Empty: not known.
    """

    ids: list[TokenIds]
    texts: list[str]
    truncated: list[bool]
    group_size: int
    max_tokens: int = 0
    written: list[str] = field(default_factory=list)
    prompt_ends: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.written = self.written or self.texts

    @property
    def lengths(self) -> Tensor:
        """Return the number of tokens of each completion, [N] float."""
        return torch.tensor([len(ids) for ids in self.ids], dtype=torch.float)

    @property
    def truncated_mask(self) -> Tensor:
        """Return [N] bool, True where the length limit ended the completion."""
        return torch.tensor(self.truncated, dtype=torch.bool)


@dataclass(frozen=True)
class OutwardLimits:
    """Bounds of the outward mask on the ratio pi / pi_reference_model of a token."""

    low: float
    high: float


@dataclass
class PromptBatch:
    """B prompts with their reference answers, and what the callbacks add to them.

    Attributes:
        indices: [B] row of each prompt in its dataset: the key of all its randomness.
        prompt_ids: B ragged token id lists.
        prompts: B texts, conversations written as "\\n\\nHuman: ...\\n\\nAssistant:".
        reference_answer_ids: B ragged token id lists, end-of-turn token included; empty ones in
            prompt-only data.
        reference_answers: B texts; empty ones in prompt-only data.
        rejected_answer_ids: B ragged token id lists, for methods that train on pairs; else none.
        columns: B dicts of the dataset's other columns, for reward functions.
        completions: By `GroupSampling`.
        base_completions: By `GroupSampling`, in validation: the untrained base on the same prompts.
        rewards: [B, G+1] by `GroupScoring`: weighted sum in the scorers' units, reference answer
            last, NaN = missing.
        rewards_by_name: Each reward function's own [B, G+1].
        outcomes: [B, G] in {-1, 0, 1}: completion against the reference answer; NaN = missing.
        compared: [B, G+1] by `GroupScoring`, what advantages are made of: outcomes and the
            reference answer's own 0, or rewards; NaN = missing.
        base_rewards: [B] rewards of the base's completions, in validation.
        base_outcomes: [B] base completion against the reference answer, in validation.
        gain_outcomes: [B] policy's completion against the base's, in validation.
        advantages: [B, G+1] by `GroupScoring`, unitless, 0 = missing or no signal.
        reference_model_logprobs: One [T] tensor a row that the module trains on, completions first,
            by `ReferenceAwareClipping`: token log-probabilities in nats under the reference model.
        outward_limits: By `ReferenceAwareClipping` where its outward mask is on.
        policy_logprobs: As ``reference_model_logprobs``, under the policy, by the training step.
        statistics: What the stages measured, logged at the end of the step.
        seconds: Wall time by phase, summed up by the stages.
    """

    indices: list[int]
    prompt_ids: list[TokenIds]
    prompts: list[str]
    reference_answer_ids: list[TokenIds]
    reference_answers: list[str]
    columns: list[dict[str, Any]]
    rejected_answer_ids: list[TokenIds] = field(default_factory=list)
    completions: Completions | None = None
    base_completions: Completions | None = None
    rewards: Tensor | None = None
    rewards_by_name: dict[str, Tensor] = field(default_factory=dict)
    outcomes: Tensor | None = None
    compared: Tensor | None = None
    base_rewards: Tensor | None = None
    base_outcomes: Tensor | None = None
    gain_outcomes: Tensor | None = None
    advantages: Tensor | None = None
    reference_model_logprobs: list[Tensor] | None = None
    outward_limits: OutwardLimits | None = None
    policy_logprobs: list[Tensor] | None = None
    statistics: StepStatistics = field(default_factory=StepStatistics)
    seconds: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def to(self, device: torch.device) -> "PromptBatch":
        """Return self: token ids stay lists until they are padded on the model's device."""
        return self

    @property
    def has_reference_answers(self) -> bool:
        """Return whether there are any: an answer has at least its end-of-turn token."""
        return any(self.reference_answer_ids)

    def truncated_mask(self) -> Tensor:
        """Return [B, G] bool, True where the length limit ended the completion."""
        assert self.completions is not None, "GroupSampling has not filled batch.completions"
        return self.completions.truncated_mask.view(len(self), -1)

    def group_rows(self) -> list["TokenRow"]:
        """Return the rows of all groups: N completions, then the B reference answers.

        Raises:
            AssertionError: Nothing was sampled yet.
        """
        return self.completion_rows() + self.reference_answer_rows()

    def completion_rows(self) -> list["TokenRow"]:
        """Return the rows of the N completions.

        Raises:
            AssertionError: Nothing was sampled yet.
        """
        completions = self.completions
        assert completions is not None, "GroupSampling has not filled batch.completions"
        return [
            TokenRow(self.prompt_ids[number // completions.group_size], ids)
            for number, ids in enumerate(completions.ids)
        ]

    def reference_answer_rows(self) -> list["TokenRow"]:
        """Return B rows: each prompt with its reference answer."""
        return self._answer_rows(self.reference_answer_ids)

    def rejected_answer_rows(self) -> list["TokenRow"]:
        """Return B rows: each prompt with its rejected answer."""
        return self._answer_rows(self.rejected_answer_ids)

    def _answer_rows(self, answers: list[TokenIds]) -> list["TokenRow"]:
        pairs = zip(self.prompt_ids, answers, strict=True)
        return [TokenRow(prompt, answer) for prompt, answer in pairs]


@dataclass(frozen=True)
class TokenRow:
    """A prompt and the tokens that follow it, whose log-probabilities are wanted."""

    prompt_ids: TokenIds
    answer_ids: TokenIds

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)
