"""Scores every group against its reference answer and turns rewards into advantages."""

from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from grao_lightning.batch import Completions, PromptBatch
from grao_lightning.callbacks.phase import RareWarning, phase
from grao_lightning.data.encoding import conversation_text
from grao_lightning.faults import Faults, NamedSettings, UserError
from grao_lightning.metrics.outcomes import Estimate, compare
from grao_lightning.metrics.step_statistics import StepStatistics
from grao_lightning.objectives.advantages import (
    GroupScale,
    GroupStatistics,
    group_advantages,
    standardised,
)
from grao_lightning.rewards.missing import MissingWindow
from grao_lightning.rewards.protocol import Rewards, RewardSpec, reward_specs, weighted_sum
from grao_lightning.rewards.scorers import Scorers, scorer_arguments
from grao_lightning.rewards.seen import Seen, opening, text_seen

Comparison = Literal["pairwise", "raw"]
Aggregation = Literal["raw", "normalized"]

_PROBED = 2  # rows on which reward functions are tried


class GroupScoring(NamedSettings, Callback):
    """Fills ``batch.rewards``, ``outcomes`` and ``advantages``.

    Completions and reference answers are scored by the same weighted reward functions; a pairwise
    one compares the two, see `grao_lightning.rewards.protocol`. A missing score (None or NaN) is
    left out of the group's statistics, never counted as 0. In prompt-only data the reference answer
    is missing from every group: nothing is won or lost, and ``comparison`` must be "raw".

    Args:
        rewards: The reward functions and their weights. Every module that trains on groups needs
            them; with others (SFT, DPO) they score validation, which without them and ``judges``
            neither samples nor scores. In Python each may be a function, an instance of a scorer, a
            `RewardSpec`, an import path or a mapping of a spec's fields.
        judges: Reward functions that score in validation instead of ``rewards``, so that a policy
            is not measured by what it was trained to please; null = the rewards judge too.
        comparison: What advantages are made of. "pairwise": +1, 0 or -1 for a completion better
            than, equal to or worse than the reference answer, whose own is 0, as the paper's judge
            gives them; "raw": the rewards themselves.
        tie_tolerance: In the rewards' unit: differences up to this are a tie.
        statistics: Whose rewards make a group's mean and standard deviation, see
            `group_advantages`; null = the method's own choice (GRAO: inside, GRPO: outside).
        scale: What divides a group's centred rewards, see `group_advantages`; null = the method's
            own choice (GRAO: population_std, GRPO: sample_std).
        aggregation: What is summed up in training. "raw": the scores as they are; "normalized":
            each function's scores divided by their standard deviation in the group, after their
            mean is taken off, so that no function outweighs another by its unit. Validation and
            ``train/reward`` always sum raw scores.
        max_missing: Training stops with an error and a checkpoint when more than this share of the
            completions, over the last ``missing_window`` steps, got no reward.
        missing_window: Steps; a shorter outage of a judge is waited out.
        sees: What scorers see of a completion, see `text_seen`. "written": with the special tokens
            that the policy wrote and a thought's tag that the template opened; "plain": without
            special tokens; "answer": what stands behind the thought, of reference answers too.
        thought_tags: The tags that open and close a thought.
    """

    def __init__(
        self,
        rewards: Rewards | None = None,
        comparison: Comparison = "pairwise",
        tie_tolerance: float = 0.0,
        statistics: GroupStatistics | None = None,
        scale: GroupScale | None = None,
        judges: Rewards | None = None,
        aggregation: Aggregation = "raw",
        max_missing: float = 0.5,
        missing_window: int = 10,
        sees: Seen = "written",
        thought_tags: list[str] | None = None,
    ) -> None:
        self.rewards = reward_specs("scoring.rewards", rewards or [])
        self.judges = None if judges is None else reward_specs("scoring.judges", judges)
        self.comparison = comparison
        self.tie_tolerance = tie_tolerance
        self.statistics = statistics
        self.scale = scale
        self.aggregation = aggregation
        self.max_missing = max_missing
        self.missing_window = missing_window
        self.sees = sees
        self.thought_tags = ["<think>", "</think>"] if thought_tags is None else thought_tags
        self._scorers = Scorers([*self.rewards, *(self.judges or ())])
        self._base_scores: dict[tuple[int, ...], Tensor] = {}
        self._no_signal = RareWarning()
        self._missing = MissingWindow(missing_window, max_missing)
        self._in_validation = StepStatistics()
        self._had_first_step = False

    @property
    def scores(self) -> bool:
        """Return whether there is anything to score by."""
        return bool(self.rewards or self.judges)

    def faults(self, trains: bool = True) -> Faults:
        """Return what is wrong with the settings; imports the reward functions.

        Args:
            trains: Whether training, too, reads rewards.
        """
        faults = Faults()
        faults.at_least("scoring.tie_tolerance", self.tie_tolerance, 0)
        faults.one_of("scoring.comparison", self.comparison, get_args(Comparison))
        faults.one_of("scoring.sees", self.sees, get_args(Seen))
        if len(self.thought_tags) != 2 or not all(self.thought_tags):
            faults.add(
                "scoring.thought_tags must be the two texts that open and close a thought, such as "
                f"[<think>, </think>]; got {self.thought_tags}"
            )
        faults.one_of("scoring.aggregation", self.aggregation, get_args(Aggregation))
        faults.between("scoring.max_missing", self.max_missing, 0, 1)
        faults.at_least("scoring.missing_window", self.missing_window, 1)
        if self.statistics is not None:
            faults.one_of("scoring.statistics", self.statistics, get_args(GroupStatistics))
        if self.scale is not None:
            faults.one_of("scoring.scale", self.scale, get_args(GroupScale))
        if trains and not self.rewards:
            faults.add(
                "scoring.rewards must name at least one reward function; got none: add an entry "
                "such as {function: my_package.my_module.my_reward}"
            )
        if self.judges is not None and not self.judges:
            faults.add("scoring.judges must name a reward function or be null; got none: remove it")
        faults.add(*self._scorers.faults())
        return faults

    @property
    def held_out_accuracy(self) -> dict[str, Estimate]:
        """Return the share of validation pairs that learned rewards tell, by name."""
        return self._scorers.held_out_accuracy

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Load the reward functions, fit those that learn from preference pairs, try all once.

        Raises:
            UserError: A function asks for a column that is not there, cannot learn, or fails.
        """
        if not pl_module.samples:
            return
        data: Any = getattr(trainer, "datamodule", None)
        for split, rows in getattr(data, "examples", {}).items():
            columns = {name for row in rows for name in row.columns}
            where = f"in scoring.rewards on data.{split}"
            faults = self._scorers.column_faults(columns)
            if not data.has_reference_answers(split):
                faults.add(*self._answer_faults(split))
            faults.raise_if_any(where)
        self._scorers.learn(getattr(data, "preference_pairs", lambda split: ([], [], [])))
        for split, rows in list(getattr(data, "examples", {}).items())[:1]:
            few = rows[:_PROBED]
            answers = [row.reference_answer for row in few]
            arguments = scorer_arguments(
                [conversation_text(row.prompt) for row in few],
                [answer or "An answer." for answer in answers],
                answers if data.has_reference_answers(split) else None,
                [False] * len(few),
                [row.columns for row in few],
            )
            faults = self._scorers.probe_faults(arguments, f"data.{split}")
            faults.raise_if_any("in scoring.rewards")

    def _answer_faults(self, split: str) -> Faults:
        """Return what cannot be had of prompts alone."""
        faults = Faults()
        if split == "train" and self.comparison == "pairwise":
            faults.add(
                "scoring.comparison must be raw where data.train has no reference answers to "
                "compare with; got pairwise"
            )
        faults.add(*self._scorers.answer_faults(self.rewards if split == "train" else self._judges))
        return faults

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Score the groups and compute their advantages."""
        if not pl_module.trains_on_groups:
            return
        with phase(trainer, batch, "score"):
            assert batch.completions is not None, "GroupSampling has not filled batch.completions"
            scores = self._score(batch, batch.completions, self.rewards)
            batch.compared = self._compared(batch, scores)
            batch.advantages = group_advantages(
                batch.compared,
                statistics=self.statistics or pl_module.group_statistics,
                scale=self.scale or pl_module.group_scale,
            ).float()
        self._note(batch, trainer.global_step, needs_spread=pl_module.needs_spread)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Stop a run whose rewards have been missing for too long, or from its first step on.

        Raises:
            UserError: More than ``max_missing`` of the window's completions got no reward, or none
                of the first step's.
        """
        share = pl_module.step_values.get("missing_rewards")  # over all ranks: they stop together
        first, self._had_first_step = not self._had_first_step, True
        if first and share == 1:
            raise UserError(
                "scoring.rewards must give rewards from the first step on; got none for any of its "
                "completions: see the messages above, and mend the reward functions or the judge"
            )
        mean = None if share is None else self._missing.exceeded_by(share)
        if mean is not None:
            raise UserError(
                f"scoring.max_missing must not be exceeded over scoring.missing_window="
                f"{self.missing_window} steps; got {mean:.0%} of the rewards missing, with "
                f"max_missing={self.max_missing}, at step {trainer.global_step}: see the judge's "
                "messages above, mend it and go on from last.ckpt with --ckpt_path, or raise "
                "scoring.max_missing"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin with nothing noted but the names, which all ranks must note."""
        if not pl_module.samples:
            return
        self._in_validation = StepStatistics()
        for spec in self._judges:
            self._in_validation.mean(f"rewards/{spec.label}/mean", torch.empty(0))
        self._in_validation.mean("missing_rewards", torch.empty(0))
        self._note_statistics(self._in_validation, self._judges)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: PromptBatch, *_: Any
    ) -> None:
        """Compare the policy's completions with the reference answers and with the base's."""
        if not pl_module.samples:
            return
        with phase(trainer, batch, "score"):
            assert batch.completions is not None, "GroupSampling has not filled batch.completions"
            self._score(batch, batch.completions, self._judges)
            if batch.base_completions is not None:
                self._score_base(batch, batch.base_completions)
        assert batch.outcomes is not None and batch.rewards is not None
        note = self._in_validation.mean
        for name, scores in batch.rewards_by_name.items():
            note(f"rewards/{name}/mean", scores[:, :-1])
        # A pair without its reference answer's reward is missing too.
        counted = batch.outcomes if batch.has_reference_answers else batch.rewards[:, :-1]
        note("missing_rewards", counted.isnan().double())
        self._note_statistics(self._in_validation, self._judges)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log what the judges said of themselves, and tell when verdicts are missing."""
        if not pl_module.samples:
            return
        values = self._in_validation.reduced(pl_module.reduce_over_ranks)
        pl_module.log_validation({f"val/{name}": value for name, value in values.items()})
        if values["missing_rewards"] > 0:
            rank_zero_warn(
                f"validation at step {trainer.global_step}: {values['missing_rewards']:.1%} of the "
                "completions got no reward: RAS, NAG and reward are those of the others"
            )

    def _score_base(self, batch: PromptBatch, completions: Completions) -> None:
        assert batch.rewards is not None
        key = tuple(batch.indices)
        base = self._base_scores.get(key)
        if base is None:
            scores = self._scores(batch, completions, self._judges)
            base = _total(scores, self._judges)[:, 0]
            if not base.isnan().any():  # the base never changes, nor do its scores
                self._base_scores[key] = base
        batch.base_rewards = base
        batch.base_outcomes = compare(base, batch.rewards[:, 1], self.tie_tolerance)
        batch.gain_outcomes = compare(batch.rewards[:, 0], base, self.tie_tolerance)

    @property
    def _judges(self) -> list[RewardSpec]:
        return self.judges or self.rewards

    def _score(
        self, batch: PromptBatch, completions: Completions, specs: list[RewardSpec]
    ) -> Tensor:
        """Fill in what the batch says of its rewards; return the scores, [F, B, G+1]."""
        scores = self._scores(batch, completions, specs)
        batch.rewards = _total(scores, specs)
        batch.rewards_by_name = {spec.label: part for spec, part in zip(specs, scores, strict=True)}
        batch.outcomes = self._outcomes(batch.rewards)
        return scores

    def _outcomes(self, rewards: Tensor) -> Tensor:
        """Return each completion against the reference answer, [B, G] in {-1, 0, 1}."""
        of_completions, of_answer = rewards[:, :-1], rewards[:, -1:]
        return compare(of_completions, of_answer.expand_as(of_completions), self.tie_tolerance)

    def _scores(
        self, batch: PromptBatch, completions: Completions, specs: list[RewardSpec]
    ) -> Tensor:
        """Return the scores of every function for every member, [F, B, G+1] float64."""
        arguments = _arguments(batch, completions, self._seen(batch, completions))
        number = len(batch) if batch.has_reference_answers else 0
        called = self._scorers.scores(specs, arguments, num_reference_answers=number)
        scores = torch.tensor(called, dtype=torch.double)
        of_completions, of_answers = scores.split([len(completions.ids), number], dim=1)
        if not number:
            of_answers = torch.full((len(specs), len(batch)), torch.nan, dtype=torch.double)
        groups = of_completions.view(len(scores), len(batch), -1)
        return torch.cat([groups, of_answers[:, :, None]], dim=2)

    def _seen(self, batch: PromptBatch, completions: Completions) -> list[str]:
        """Return what scorers see of the completions, then of the reference answers if any."""
        tags = self.thought_tags
        opened = [opening(end, tags[0]) for end in completions.prompt_ends]
        whole = [
            opened[number // completions.group_size] + written if opened else written
            for number, written in enumerate(completions.written)
        ]
        both = zip(completions.texts, whole, strict=True)
        texts = [text_seen(self.sees, plain, written, tags) for plain, written in both]
        answers = batch.reference_answers if batch.has_reference_answers else []
        return texts + [text_seen(self.sees, text, text, tags) for text in answers]

    def _compared(self, batch: PromptBatch, scores: Tensor) -> Tensor:
        assert batch.rewards is not None and batch.outcomes is not None
        rewards, outcomes = batch.rewards, batch.outcomes
        if self.aggregation == "normalized":
            rewards = _total(standardised(scores), self.rewards)
            outcomes = self._outcomes(rewards)
        if self.comparison == "raw":
            return rewards
        own = torch.zeros_like(rewards[:, -1:])  # R(y, y) = 0
        return torch.cat([outcomes.double(), own], dim=1)

    def _note_statistics(self, statistics: StepStatistics, specs: list[RewardSpec]) -> None:
        for name, (total, count) in self._scorers.statistics(specs).items():
            statistics.add(name, total, count)

    def _note(self, batch: PromptBatch, step: int, *, needs_spread: bool) -> None:
        assert batch.rewards is not None and batch.outcomes is not None
        assert batch.advantages is not None and batch.compared is not None
        note, completions = batch.statistics.mean, batch.rewards[:, :-1]
        note("reward", completions)
        note("reward_std", _population_std(completions))
        note("missing_rewards", batch.compared[:, :-1].isnan().double())
        if batch.has_reference_answers:
            note("reference_answer/reward", batch.rewards[:, -1])
            note("ras", (batch.outcomes > 0).double().where(~batch.outcomes.isnan(), torch.nan))
        for name, scores in batch.rewards_by_name.items():
            note(f"rewards/{name}/mean", scores[:, :-1])
        self._note_statistics(batch.statistics, self.rewards)
        dead = (batch.advantages == 0).all(dim=1)
        note("dead_groups", dead.double())
        note("mean_abs_advantage", batch.advantages.abs())
        if needs_spread and self._no_signal.due(step, dead.all()):
            rank_zero_warn(
                f"step {step}: no group carries a signal (all rewards of each group are equal or "
                "missing): this step learns nothing; sample more completions, raise the "
                "temperature or use a finer reward"
            )


def _total(scores: Tensor, specs: list[RewardSpec]) -> Tensor:
    return weighted_sum(scores, [spec.weight for spec in specs])


def _arguments(
    batch: PromptBatch, completions: Completions, seen: list[str]
) -> dict[str, list[Any]]:
    """Return what reward functions are called with: the completions, then the reference answers.

    Args:
        batch: Of prompts.
        completions: To score.
        seen: The texts of both, as scorers see them.
    """
    owners = [number // completions.group_size for number in range(len(completions.ids))]
    answers = batch.reference_answers if batch.has_reference_answers else []
    owners += range(len(answers))
    return scorer_arguments(
        [batch.prompts[owner] for owner in owners],
        seen,
        [answers[owner] for owner in owners] if answers else None,
        completions.truncated + [False] * len(answers),
        [batch.columns[owner] for owner in owners],
    )


def _population_std(rewards: Tensor) -> Tensor:
    """Return the standard deviation of each group's present rewards, [B]; NaN where none is."""
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    return centred.square().nanmean(dim=1).sqrt()
