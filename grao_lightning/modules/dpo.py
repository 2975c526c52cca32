"""DPO: learns from pairs of a chosen and a rejected answer, without sampling."""

from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from grao_lightning.batch import PromptBatch, TokenRow
from grao_lightning.faults import Faults
from grao_lightning.language_model.frozen import bare
from grao_lightning.language_model.head import Weigh, weigh_by_gradient
from grao_lightning.language_model.logprobs import frozen_logprobs, split_together
from grao_lightning.language_model.sharded import passes_over_ranks
from grao_lightning.language_model.transfer import sent
from grao_lightning.metrics.outcomes import MeanWithInterval, ShareWithInterval
from grao_lightning.modules.base import AlignmentModule, AlignmentSettings
from grao_lightning.modules.checks import check_pairs
from grao_lightning.modules.step import Charts
from grao_lightning.modules.validation import MetricSet
from grao_lightning.objectives.dpo import DPOKind, DPOSettings, dpo_loss


class DPOModule(AlignmentModule):
    """Direct Preference Optimization and its kin.

    Validation gives the loss, accuracy and margins on held-out pairs. With ``scoring.rewards`` or
    ``judges`` it samples and scores too, so that RAS and NAG are those of every method.

    Args:
        kind: "sigmoid" (arXiv 2305.18290), "ipo" (arXiv 2310.12036) or "hinge" (arXiv 2305.10425).
        beta: How dearly the policy pays for leaving the reference model.
        label_smoothing: Share of pairs thought to be labelled the wrong way round, for "sigmoid".
        base_settings: The settings of `AlignmentModule`.
    """

    trains_on_groups = False
    trains_on_pairs = True
    charts: ClassVar[Charts] = {
        "loss": ["train/loss$", "val/loss$"],
        "accuracy": ["train/rewards/accuracies", "val/rewards/accuracies"],
        "margin": ["train/rewards/margins", "val/rewards/margins"],
        "rewards by beta": ["train/rewards/chosen", "train/rewards/rejected"],
        "log-probabilities": ["train/logps/chosen", "train/logps/rejected"],
    }

    def __init__(
        self,
        kind: DPOKind = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        **base_settings: Unpack[AlignmentSettings],
    ) -> None:
        super().__init__(**base_settings)
        self.settings = DPOSettings(kind, beta, label_smoothing)
        self._frozen_sums: dict[int, list[float]] = {}
        self._frozen_validation: dict[tuple[int, ...], Tensor] = {}
        means = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "base_loss")
        self.answer_metrics = MetricSet(
            {
                **{name: MeanWithInterval() for name in means},
                "rewards/accuracies": ShareWithInterval(),
            }
        )

    def faults(self) -> Faults:
        """Return what is wrong with the settings."""
        faults = super().faults()
        faults.one_of("model.kind", self.settings.kind, get_args(DPOKind))
        faults.between("model.label_smoothing", self.settings.label_smoothing, 0, 0.5)
        if not self.settings.beta > 0:
            faults.add(f"model.beta must be > 0; got {self.settings.beta}")
        if self.settings.label_smoothing and self.settings.kind != "sigmoid":
            faults.add(
                "model.label_smoothing needs model.kind=sigmoid; got "
                f"{self.settings.kind}: remove it"
            )
        if self.reference_model_source is None:
            faults.add(
                "model.reference_model must be policy or a model, since DPO is measured from it; "
                "got null"
            )
        return faults

    def setup(self, stage: str) -> None:
        """Check the run, and that every row that is read has a rejected answer."""
        super().setup(stage)
        train = ["train"] if stage == "fit" else []
        validation = ["validation"] if self.trainer.enable_validation else []
        check_pairs(getattr(self.trainer, "datamodule", None), [*train, *validation], "DPO")

    def rows(self, batch: PromptBatch) -> list[TokenRow]:
        """Return the chosen answers, then the rejected ones."""
        return batch.reference_answer_rows() + batch.rejected_answer_rows()

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Take one step on a batch of pairs."""
        rows, num_pairs = self.rows(batch), len(batch)
        frozen = self._frozen(batch, rows)  # [2B]
        lengths = torch.tensor([len(row.answer_ids) for row in rows])
        total = self.global_sum(num_pairs)

        def weigh_for(numbers: list[int]) -> Weigh:
            sizes = lengths[numbers]
            row = torch.arange(len(numbers)).repeat_interleave(sizes)
            row, sizes, places = sent(self.device, row, sizes, torch.tensor(numbers))

            def loss(_: slice, logprobs: Tensor) -> Tensor:
                sums = logprobs.new_zeros(len(numbers)).index_add(0, row, logprobs)
                ratios = sums - frozen[places].to(sums)
                pairs = (*_by_pair(ratios), *_by_pair(sizes))
                return dpo_loss(*pairs, self.settings).sum() / total

            return weigh_by_gradient(loss)

        pairs = [(number, num_pairs + number) for number in range(num_pairs)]
        micro_batches = split_together(self.policy, rows, pairs, self.micro_batch_tokens)
        computed = self.accumulate(rows, micro_batches, weigh_for, weigh_rows=True)
        sums = torch.stack([logprobs.sum() for logprobs in computed.logprobs])
        self._note(batch, sums, frozen, *sent(self.device, lengths))
        self._keep(batch, frozen)
        batch.statistics.mean("entropy", torch.cat(computed.entropies[:num_pairs]))
        self.finish_step(batch)

    def _frozen(self, batch: PromptBatch, rows: list[TokenRow]) -> Tensor:
        """Return the reference model's log-probability of each answer, [2B]; read once a pair.

        Every pair is read by itself, so that the figure does not depend on the batch it is first
        met in, and a resumed run equals an uninterrupted one.
        """
        unread = {
            index: [rows[number], rows[len(batch) + number]]
            for number, index in enumerate(batch.indices)
            if index not in self._frozen_sums
        }
        (most,) = passes_over_ranks(bare(self.reference_model), len(unread))
        pairs = [*unread.values(), *[[]] * (most - len(unread))]
        passes = [self._frozen_logprobs(pair) for pair in pairs]
        kept = [index for index in batch.indices if index in self._frozen_sums]
        known = torch.tensor([self._frozen_sums[index] for index in kept], dtype=torch.double)
        found = dict(zip(kept, sent(self.device, known)[0], strict=True))
        for index, both in zip(unread, passes, strict=False):
            found[index] = torch.stack([logprobs.sum() for logprobs in both]).double()
        return torch.stack([found[index] for index in batch.indices], dim=1).flatten()

    def _keep(self, batch: PromptBatch, frozen: Tensor) -> None:
        """Keep what `_frozen` found, read from the device in one piece once the step is formed."""
        if any(index not in self._frozen_sums for index in batch.indices):
            found = frozen.view(2, -1).t().tolist()
            self._frozen_sums |= dict(zip(batch.indices, found, strict=True))

    def _frozen_logprobs(self, rows: list[TokenRow]) -> list[Tensor]:
        return frozen_logprobs(
            self.reference_model,
            rows,
            self.micro_batch_tokens,
            temperature=self.training_temperature,
        )

    # -- validation --------------------------------------------------------------------------------

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Take in how far the policy tells the answers of held-out pairs."""
        super().validation_step(batch, batch_idx)
        assert self.answer_metrics is not None
        rows, key = self.rows(batch), tuple(batch.indices)
        if key not in self._frozen_validation:
            self._frozen_validation[key] = self._sums(self.reference_model, rows)
        sums, frozen = self._sums(self.policy, rows), self._frozen_validation[key]
        lengths = torch.tensor([len(row.answer_ids) for row in rows])
        of_chosen, of_rejected = lengths.split(len(batch))
        chosen, rejected = (sums - frozen).split(len(batch))
        add, beta = self.answer_metrics.add, self.settings.beta
        add("loss", dpo_loss(chosen, rejected, of_chosen, of_rejected, self.settings))
        # Before training the policy is the reference model: all log-ratios are 0.
        zeros = torch.zeros_like(chosen)
        add("base_loss", dpo_loss(zeros, zeros, of_chosen, of_rejected, self.settings))
        add("rewards/chosen", beta * chosen)
        add("rewards/rejected", beta * rejected)
        add("rewards/margins", beta * (chosen - rejected))
        add("rewards/accuracies", chosen > rejected)

    def _sums(self, model: Any, rows: list[TokenRow]) -> Tensor:
        """Return a model's log-probability of each answer, [R] float64."""
        logprobs = frozen_logprobs(
            model, rows, self.micro_batch_tokens, temperature=self.training_temperature
        )
        return torch.stack([row.double().sum().cpu() for row in logprobs])

    def _note(self, batch: PromptBatch, sums: Tensor, frozen: Tensor, lengths: Tensor) -> None:
        chosen, rejected = (sums - frozen.to(sums)).split(len(batch))
        of_chosen, of_rejected = lengths.split(len(batch))
        note, beta = batch.statistics.mean, self.settings.beta
        note("loss", dpo_loss(chosen, rejected, of_chosen, of_rejected, self.settings))
        note("rewards/chosen", beta * chosen)
        note("rewards/rejected", beta * rejected)
        note("rewards/margins", beta * (chosen - rejected))
        note("rewards/accuracies", (chosen > rejected).double())
        note("logps/chosen", sums[: len(batch)])
        note("logps/rejected", sums[len(batch) :])
        note("reference_answer/mean_logprob", sums[: len(batch)] / of_chosen)


def _by_pair(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chosen and the rejected answers' values out of alternating ones."""
    return values[0::2], values[1::2]
