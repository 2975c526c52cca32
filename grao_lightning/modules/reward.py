"""Reward models: a score for an answer, learned from pairs of a chosen and a rejected one."""

from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import Unpack

from grao_lightning.batch import PromptBatch, TokenRow
from grao_lightning.faults import Faults, UserError
from grao_lightning.language_model.frozen import inside
from grao_lightning.language_model.loading import (
    ModelSource,
    load_classifier,
    model_fault,
    source_name,
)
from grao_lightning.language_model.logprobs import MicroBatch, evened_out, split_together
from grao_lightning.language_model.routing import Router, leave_out_router_logits, router_of
from grao_lightning.language_model.scores import (
    fitted,
    most_tokens,
    reading_of,
    row_scores,
    with_room,
)
from grao_lightning.language_model.sharing import share_prompts, shares_prompts
from grao_lightning.language_model.transfer import sent
from grao_lightning.metrics.outcomes import Estimate
from grao_lightning.metrics.pairs import PairMetrics, ReliabilityBin
from grao_lightning.modules.balance import check_router_loss
from grao_lightning.modules.checks import check_pairs
from grao_lightning.modules.step import Charts, Mode, StepModule, StepSettings
from grao_lightning.objectives.balance import Routing
from grao_lightning.objectives.bradley_terry import BradleyTerrySettings, bradley_terry_loss
from grao_lightning.randomness import run_seed
from grao_lightning.rewards.preference import length_alone


class RewardModule(StepModule):
    """Trains a sequence classification model of one label on preference pairs (Bradley-Terry).

    The score of an answer is read at its last token (decoders) or from the pair of texts (encoders
    such as BERT). Where the backbone can share prompts, a pair's prompt is read once. Nothing is
    sampled: ``sampling``, ``scoring`` and the drift of ``clipping`` have no part in such a run.

    A pair of which an answer alone is longer than the backbone's positions is left out; where
    prompt and answer together are, the prompt loses its oldest tokens.

    Args:
        backbone: Model whose states are scored: hub name, folder, ``.gguf`` file or
            ``embedded:keywords``, or the folder of an adapter (peft). A reward model goes on being
            trained; the head of anything else starts from small random numbers that depend on the
            seed alone. In Python also a loaded sequence classification model of one label, which is
            trained in place.
        margin: Log-odds by which the chosen answer must lead before a pair counts as told.
        margin_column: Column of the data that holds each pair's own margin; null = none.
        label_smoothing: Share of pairs thought to be labelled the wrong way round, in [0, 0.5).
        centring: Weight of ``(chosen + rejected)^2``, which keeps scores near 0; 0 = none.
        dropout: Use the backbone's dropout. Off by default: it makes rewards noisy, and the
            gradient depend on the split into micro-batches.
        step_settings: The settings of `StepModule`.
    """

    trains_on_pairs = True
    source_setting = "model.backbone"
    charts: ClassVar[Charts] = {"loss": ["train/loss$", "val/loss$"]}

    def __init__(
        self,
        backbone: ModelSource = "embedded:keywords",
        margin: float = 0.0,
        margin_column: str | None = None,
        label_smoothing: float = 0.0,
        centring: float = 0.0,
        dropout: bool = False,
        **step_settings: Unpack[StepSettings],
    ) -> None:
        self._sources = {"backbone": backbone}
        super().__init__(**step_settings)
        self.backbone_source = source_name(backbone)
        self.settings = BradleyTerrySettings(margin, label_smoothing, centring)
        self.margin_column = margin_column
        self.dropout = dropout
        self.reward_model: Any = None
        self.validation_metrics = PairMetrics()
        self._length_alone: Estimate | None = None

    @property
    def source(self) -> str:
        """Return where the backbone comes from."""
        return self.backbone_source

    @property
    def trained_model(self) -> Any:
        """Return the reward model."""
        return self.reward_model

    @property
    def drops_out(self) -> bool:
        """Return whether our settings ask for dropout in training."""
        return self.dropout or super().drops_out

    @property
    def validation_monitor(self) -> tuple[str, Mode]:
        """Return the accuracy on held-out pairs."""
        return "val/accuracy", "max"

    # -- set-up ------------------------------------------------------------------------------------

    def faults(self) -> Faults:
        """Return what is wrong with the settings, without loading a model."""
        faults = Faults()
        backbone = self._sources["backbone"]
        faults.add(model_fault("model.backbone", backbone, is_policy=False, trained=True))
        faults.add(*super().faults())
        faults.at_least("model.margin", self.settings.margin, 0)
        faults.at_least("model.centring", self.settings.centring, 0)
        if not 0 <= self.settings.label_smoothing < 0.5:
            faults.add(
                "model.label_smoothing must lie in [0, 0.5), since at 0.5 a pair says nothing; got "
                f"{self.settings.label_smoothing}"
            )
        if self.margin_column is not None and self.settings.margin:
            faults.add(
                "model.margin must be 0 where model.margin_column gives every pair its own; got "
                f"{self.settings.margin}: remove one of them"
            )
        return faults

    def setup(self, stage: str) -> None:
        """Check the run, and that every row is a pair with what its loss needs."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        splits = ("train", "validation") if stage == "fit" else ("validation",)
        check_pairs(data, splits, "a reward model")
        column, rows = self.margin_column, getattr(data, "examples", {}).get("train", ())
        if stage != "fit" or column is None:
            return
        for number, row in enumerate(rows, start=1):
            margin = row.columns.get(column)
            if not isinstance(margin, int | float):
                raise UserError(
                    f"model.margin_column: row {number} of data.train must have a number in "
                    f"{column!r}; got {margin!r}: name another column, or null"
                )

    def configure_model(self) -> None:
        """Load tokenizer and backbone; does nothing the second time."""
        if self.reward_model is not None:
            return
        self.own_tokenizer()
        self.reward_model, made_up = self._loaded()
        self.check_vocabulary()
        if not self.dropout:
            for part in self.reward_model.modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = 0.0
        leave_out_router_logits(self.reward_model)
        self.adapt(self.reward_model, made_up)
        with torch.no_grad():
            inside(self.reward_model, self._try_out)
        if self.gradient_checkpointing:
            self.reward_model.gradient_checkpointing_enable({"use_reentrant": False})

    def _try_out(self, model: Any) -> None:
        """Find by trial how the model can be read."""
        # An attention that was asked for stays: sharing prompts would replace it.
        asked = self.attn_implementation is not None
        if reading_of(model) == "last token" and self.share_prompts and not asked:
            share_prompts(model, gives_tokens=False)
        if self.router_loss is not None and reading_of(model) != "last token":
            raise UserError(
                f"model.router_loss must be null for {type(model).__name__}, whose scores are read "
                f"{reading_of(model)}; got {self.router_loss}"
            )
        check_router_loss(model, lambda model: model.base_model, self.router_loss)

    def _loaded(self) -> tuple[Any, list[str]]:
        """Return the model, with the attention asked for, and the weights that are random."""
        source, asked = self._sources["backbone"], self.attn_implementation
        if self.lora is not None:
            source = self.base_source  # its adapters are no part of it
        if not isinstance(source, str):
            if asked or shares_prompts(source):  # as an earlier module left it
                source.set_attn_implementation(asked or "sdpa")
            return source, []
        options: dict[str, Any] = {"num_labels": 1}
        if asked:
            options["attn_implementation"] = asked
        options |= self.quantization()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run_seed())  # of the new head, on every rank and in every run
            return load_classifier("model.backbone", source, self.sharding, **options)

    def on_fit_start(self) -> None:
        """Put the model in training mode, and say what has no effect."""
        super().on_fit_start()
        if any(getattr(part, "rewards", None) for part in self.trainer.callbacks):  # type: ignore[attr-defined]
            rank_zero_warn(
                "scoring.rewards has no effect on RewardModule, which learns from the data's pairs "
                "alone; remove it"
            )

    # -- one step ----------------------------------------------------------------------------------

    def rows(self, batch: PromptBatch) -> list[TokenRow]:
        """Return the chosen answers of all pairs that fit, then their rejected ones."""
        pairs, _ = self._pairs(batch)
        return [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Take one step on a batch of pairs."""
        rows, margins = self.rows(batch), self._margins(batch)
        total = self.global_sum(len(rows) / 2)
        parts = self._micro_batches(rows)
        micro_batches = [part.numbers for part in evened_out(self.reward_model, parts)]
        found: list[Tensor] = []
        balance = self.router_balance(rows, micro_batches, self._routing)
        for at, numbers in enumerate(micro_batches, start=1):
            router = None if balance is None else self._router()
            shares = None if balance is None else balance.shares(numbers)
            chosen = [rows[number] for number in numbers]
            with self.kept_activations():
                computed = row_scores(self.reward_model, chosen, router, shares)[:, 0]
            own = None
            if margins is not None:
                own = sent(self.device, margins[numbers[0::2]])[0].to(computed.dtype)
            loss = bradley_terry_loss(computed[0::2], computed[1::2], self.settings, own)
            loss = loss.sum() / total
            if balance is not None and router is not None:
                loss = loss + balance.loss(router.routing)
            self.backward_part(loss, is_last=at == len(micro_batches))
            found.append(computed.detach().double())
        self._note(batch, self._in_order(found, micro_batches), margins)
        self.finish_step(batch)

    def _in_order(self, found: list[Tensor], micro_batches: list[list[int]]) -> Tensor:
        """Return the scores of all rows, [R] float64, from those of each micro-batch."""
        places = torch.tensor([number for numbers in micro_batches for number in numbers])
        return torch.cat(found)[sent(self.device, places.argsort())[0]]

    def _router(self) -> Router:
        return router_of(self.reward_model, self.reward_model.base_model)

    def _routing(self, rows: list[TokenRow], shares: list[float]) -> Routing:
        router = self._router()
        row_scores(self.reward_model, rows, router, shares)
        assert router.routing is not None
        return router.routing

    def _micro_batches(self, rows: list[TokenRow]) -> list[MicroBatch]:
        """Return rows by forward pass, a pair's chosen and rejected answer side by side."""
        half = len(rows) // 2
        room = with_room(rows) if shares_prompts(self.reward_model) else rows
        # By falling length: where rows are padded, little is.
        longest = [max(len(rows[number]), len(rows[half + number])) for number in range(half)]
        order = sorted(range(half), key=lambda number: -longest[number])
        units = [(number, half + number) for number in order]
        return split_together(self.reward_model, room, units, self.micro_batch_tokens)

    def _pairs(self, batch: PromptBatch) -> tuple[list[tuple[TokenRow, TokenRow]], list[int]]:
        """Return the pairs that fit the backbone, chosen answer first, and their numbers."""
        most = most_tokens(self.reward_model)
        pairs, numbers = [], []
        both = zip(batch.reference_answer_rows(), batch.rejected_answer_rows(), strict=True)
        for number, (chosen, rejected) in enumerate(both):
            # The first token, which an encoder reads its score from, stays.
            left, right = fitted(chosen, most, keep=1), fitted(rejected, most, keep=1)
            if left is not None and right is not None:
                pairs.append((left, right))
                numbers.append(number)
        return pairs, numbers

    def _margins(self, batch: PromptBatch) -> Tensor | None:
        """Return the pairs' own margins, [B], where the data has them."""
        if self.margin_column is None:
            return None
        _, numbers = self._pairs(batch)
        return torch.tensor([float(batch.columns[n][self.margin_column]) for n in numbers])

    def _note(self, batch: PromptBatch, scores: Tensor, margins: Tensor | None) -> None:
        chosen, rejected = scores.view(2, -1)
        note, lead = batch.statistics.mean, chosen - rejected
        own = None if margins is None else sent(scores.device, margins.double())[0]
        note("loss", bradley_terry_loss(chosen, rejected, self.settings, own))
        note("accuracy", (lead > 0).double() + 0.5 * (lead == 0).double())
        note("margin", lead)
        note("mean_score", scores)
        note("left_out_pairs", 1 - len(chosen) / len(batch))

    # -- validation --------------------------------------------------------------------------------

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Take in the margins of one batch."""
        rows = self.rows(batch)
        parts = self._micro_batches(rows)
        micro_batches = [part.numbers for part in evened_out(self.reward_model, parts)]
        found = [
            row_scores(self.reward_model, [rows[number] for number in numbers])[:, 0].double()
            for numbers in micro_batches
        ]
        scores = self._in_order(found, micro_batches).cpu()
        lengths = torch.tensor([len(row.answer_ids) for row in rows], dtype=torch.double)
        (chosen, rejected), (of_chosen, of_rejected) = scores.view(2, -1), lengths.view(2, -1)
        self.validation_metrics.update(chosen - rejected, of_chosen - of_rejected)

    def validation_figures(self) -> dict[str, Estimate]:
        """Return what this validation measured, with what length alone would tell beside it."""
        figures = super().validation_figures()
        alone = self._by_length_alone()
        return figures if alone is None else {**figures, "length_alone_accuracy": alone}

    @property
    def reliability(self) -> list[ReliabilityBin]:
        """Return the reliability curve of the newest validation."""
        bins: list[ReliabilityBin] = self.validation_metrics.reliability
        return bins

    def _by_length_alone(self) -> Estimate | None:
        """Return the pair accuracy of a guess by length, learned on the train pairs."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if self._length_alone is None and hasattr(data, "preference_pairs"):
            _, *train = data.preference_pairs("train")
            _, *held_out = data.preference_pairs("validation")
            number = data.validation_prompts
            chosen, rejected = (answers[:number] for answers in held_out)
            self._length_alone = length_alone((train[0], train[1]), (chosen, rejected))
        return self._length_alone
