"""The one DataModule: rows from any source -> batches of prompts with their reference answers."""

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from grao_lightning.batch import PromptBatch
from grao_lightning.data.encoding import PromptEncoder, conversation_text
from grao_lightning.data.example import Example
from grao_lightning.data.formats import HH_TEXT, MESSAGES, PLAIN, parse_rows
from grao_lightning.data.reading import (
    effect_faults,
    told_reading,
    undecided_template,
    unknown_words_fault,
)
from grao_lightning.data.sampler import StepBatchSampler, even_batches
from grao_lightning.data.templates import template_fault, template_text
from grao_lightning.data.text_pairs import encoder_for
from grao_lightning.faults import Faults, NamedSettings, UserError
from grao_lightning.language_model.loading import checked_tokenizer, eos_ids, load_tokenizer
from grao_lightning.language_model.tokenizing import TokenizerSource, tokenizer_difference
from grao_lightning.randomness import run_seed

if TYPE_CHECKING:
    import datasets

    RowSource: TypeAlias = str | list[str] | Sequence[Mapping[str, Any]] | datasets.Dataset
else:  # what a config can hold: the command line's parser goes by it
    RowSource = str | list[str]

log = logging.getLogger(__name__)

_EMBEDDED = "embedded:"


class PromptDataModule(NamedSettings, LightningDataModule):
    """Supplies prompts and reference answers, tokenised when they are needed.

    Rows may be Anthropic HH's one-string dialogues or TRL's standard and conversational formats
    (prompt-only, prompt-completion, preference with explicit or implicit prompt).

    Args:
        train: Hub name, local file or files (JSONL, JSONL.gz, Parquet, CSV), or
            ``embedded:keywords``. In Python also a `datasets.Dataset`, or a list of rows as dicts.
        validation: As ``train``; by default the same source with ``validation_split``. Files and
            rows have no splits: name a held-out one, or the figures are those of training rows.
        tokenizer: Hub name or folder, in Python also a loaded one; null = the module's own, which
            another one must equal. Needed where there is no module: without a trainer.
        subset: Configuration of a hub data set.
        data_dir: Folder inside a hub data set, such as ``harmless-base`` of Anthropic/hh-rlhf.
        train_split: Split of ``train``.
        validation_split: Split of ``validation``.
        rename: Column names of the data set -> prompt, chosen, rejected, completion or messages.
        prompts_per_step: Prompts of one optimiser step over all devices; must be a multiple of
            their number.
        validation_prompts: How many validation rows are used, from the first; null = all.
        validation_batch_size: Prompts sampled together in validation, on each device.
        max_prompt_tokens: Longer prompts lose their oldest turns; reference answers are never cut.
        chat_template: Jinja text, or a file of it, instead of the tokenizer's own template; or hh
            for Anthropic HH's text. Needed for messages with roles where the tokenizer has none.
        as_chat: Make of every prompt that is a plain string a user's turn, and of its answers the
            assistant's, so that the template applies.
        num_workers: Processes that tokenise; 0 = none.
        wrong_reference_share: Share of the training rows whose chosen and rejected answers change
            places, to see how a method bears wrong references. Rewards that learn from pairs still
            learn from the right ones.
    """

    def __init__(
        self,
        train: RowSource = "embedded:keywords",
        validation: RowSource | None = None,
        tokenizer: TokenizerSource | None = None,
        subset: str | None = None,
        data_dir: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        rename: dict[str, str] | None = None,
        prompts_per_step: int = 8,
        validation_prompts: int | None = None,
        validation_batch_size: int = 32,
        max_prompt_tokens: int | None = 1024,
        chat_template: str | None = None,
        as_chat: bool = False,
        num_workers: int = 0,
        wrong_reference_share: float = 0.0,
    ) -> None:
        super().__init__()
        self.prompts_per_step = prompts_per_step
        self._sources: dict[str, Any] = {
            "train": train,
            "validation": train if validation is None else validation,
        }
        self._splits = {"train": train_split, "validation": validation_split}
        self.validation_prompts = validation_prompts
        self._tokenizer_source = tokenizer
        self._subset, self._data_dir = subset, data_dir
        self._rename = rename
        self._validation_batch_size = validation_batch_size
        self._max_prompt_tokens = max_prompt_tokens
        self._chat_template = chat_template
        self._as_chat = as_chat
        self._num_workers = num_workers
        self._wrong_reference_share = wrong_reference_share
        self.examples: dict[str, list[Example]] = {}
        self.encoder: PromptEncoder | None = None
        self._reads_rejected = False
        self._written: dict[str, Counter[str]] = {}  # by split, see `FormatReport.prompts`
        self._told = False
        # Who needs reference answers; nobody where a method does without.
        self._answers_needed_by: str | None = "every other method and metric"

    def faults(self, world_size: int = 1) -> Faults:
        """Return what is wrong with the settings, as far as it shows without reading data."""
        faults = Faults()
        faults.at_least("data.prompts_per_step", self.prompts_per_step, 1)
        faults.at_least("data.validation_batch_size", self._validation_batch_size, 1)
        faults.at_least("data.num_workers", self._num_workers, 0)
        faults.between("data.wrong_reference_share", self._wrong_reference_share, 0, 1)
        if self.validation_prompts is not None:
            faults.at_least("data.validation_prompts", self.validation_prompts, 1)
        if self._max_prompt_tokens is not None:
            faults.at_least("data.max_prompt_tokens", self._max_prompt_tokens, 1)
        if self.prompts_per_step % world_size:
            fitting = max(1, self.prompts_per_step // world_size) * world_size
            faults.add(
                f"data.prompts_per_step must be a multiple of the {world_size} devices; got "
                f"{self.prompts_per_step}: {fitting} works"
            )
        faults.add(template_fault(self._chat_template))
        faults.add(_source_fault("data.train", self._sources["train"]))
        if not self._is_one_source:
            faults.add(_source_fault("data.validation", self._sources["validation"]))
        return faults

    @property
    def validates_on_train_rows(self) -> bool:
        """Return whether both splits are the same files or rows, which have no splits."""
        return self._is_one_source and _has_no_splits(self._sources["train"])

    @property
    def _is_one_source(self) -> bool:
        train, validation = self._sources.values()
        return validation is train or (_is_named(train) and bool(validation == train))

    def setup(self, stage: str) -> None:
        """Read the rows; the train split only where it is trained on or a reward learns from it."""
        module: Any = self.trainer and self.trainer.lightning_module
        if hasattr(module, "check_run"):
            module.check_run()  # what is wrong elsewhere is told before anything is read
        if self.validates_on_train_rows:
            rank_zero_warn(
                f"data.validation is data.train ({_told(self._sources['train'])}), and files and "
                "rows have no splits: RAS, NAG and reward will be those of training rows; name "
                "held-out ones"
            )
        if self.encoder is None:
            tokenizer, ends = self._tokenizer(module)
            self.encoder = encoder_for(
                tokenizer,
                max_prompt_tokens=self._max_prompt_tokens,
                chat_template=template_text(self._chat_template),
                eos_ids=ends,
            )
        self._reads_rejected = getattr(module, "trains_on_pairs", False)
        if module is not None:
            needs = getattr(module, "needs_reference_answers", True)
            self._answers_needed_by = type(module).__name__ if needs else None
        splits = ("train", "validation") if stage == "fit" else ("validation",)
        for split in splits:
            self.read(split)
        self._check_template(splits)
        num_rows = len(self.examples.get("train", ()))
        if stage == "fit" and num_rows < self.prompts_per_step:
            raise UserError(
                f"data.prompts_per_step must be <= {num_rows}, the usable rows of data.train, or a "
                f"step sees a prompt twice; got {self.prompts_per_step}: lower it or add data"
            )

    def _tokenizer(self, module: Any) -> tuple[Any, tuple[int, ...]]:
        """Return the tokenizer and every id that ends a sequence.

        Raises:
            UserError: There is none, or another one than the module's.
        """
        given, own = self._tokenizer_source, None
        if hasattr(module, "own_tokenizer"):
            own = module.own_tokenizer()
        if own is None and given is None:
            raise UserError(
                "data.tokenizer must be set where no module gives its own, as without a trainer: "
                "PromptDataModule(tokenizer=...), a hub name, a folder or a loaded tokenizer; got "
                "null"
            )
        if own is not None and (given is None or given in (own, module.tokenizer_name)):
            return own, module.eos_ids()
        setting = "data.tokenizer"
        if isinstance(given, str):
            tokenizer = load_tokenizer(setting, given)
        else:
            tokenizer = checked_tokenizer(setting, given)
        if own is None:
            return tokenizer, eos_ids(given if isinstance(given, str) else None, tokenizer)
        difference = tokenizer_difference(own, tokenizer, templates=self._chat_template is None)
        if difference:
            raise UserError(
                f"data.tokenizer must read as that of {module.source_setting} does, or the model "
                f"learns other tokens than it samples: {difference}; remove data.tokenizer"
            )
        return own, module.eos_ids()

    @property
    def template_in_use(self) -> str | None:
        """Return the chat template by which conversations are read, None where there are none."""
        assert self.encoder is not None, "setup() makes the encoder"
        chats = sum(map(self._forms, self.examples), Counter[str]())
        if not chats[MESSAGES] + chats[HH_TEXT] and not (self._as_chat and chats[PLAIN]):
            return None
        return self.encoder.template

    def has_reference_answers(self, split: str) -> bool:
        """Return whether the rows of a split, read by now, have reference answers."""
        return all(row.reference_answer is not None for row in self.examples[split][:1])

    @property
    def _tells(self) -> bool:
        """Return whether this device says what it reads: all read the same."""
        return not (self.trainer and self.trainer.global_rank)

    def _forms(self, split: str) -> Counter[str]:
        """Return the rows of a split by how their prompts are written, see `FormatReport`."""
        if split in self._written:
            return self._written[split]
        # Not read by us: how conversations were written is for who made them to know.
        prompts = [example.prompt for example in self.examples[split]]
        return Counter(PLAIN if isinstance(prompt, str) else HH_TEXT for prompt in prompts)

    def _check_template(self, splits: Sequence[str]) -> None:
        """Refuse chats without a template; say once how prompts are read."""
        assert self.encoder is not None
        for split in splits:
            written = self._forms(split)
            fault = undecided_template(split, written, self.encoder, as_chat=self._as_chat)
            if fault:
                raise UserError(fault)
        if self._told or not self._tells:
            return
        self._told, split = True, splits[0]
        written, first = self._forms(split), self.examples[split][0]
        for fault in effect_faults(
            written, as_chat=self._as_chat, chat_template=self._chat_template
        ):
            rank_zero_warn(fault)
        log.info(told_reading(split, written, self.encoder, first, as_chat=self._as_chat))
        unknown = unknown_words_fault(split, self.encoder, first)
        if unknown:
            rank_zero_warn(unknown)

    def read(self, split: str) -> list[Example]:
        """Return the examples of "train" or "validation", read on first use.

        Raises:
            UserError: The source cannot be read or holds no usable row.
        """
        if split not in self.examples:
            source = self._sources[split]
            try:
                examples, report = parse_rows(
                    self._rows(split), self._rename, as_chat=self._as_chat
                )
            except (ValueError, OSError) as error:
                raise UserError(f"data.{split}: {error}") from None
            if self._tells:
                log.info("data.%s: %s", split, report)
            if report.drops_many:
                rank_zero_warn(
                    f"data.{split}: {sum(report.dropped.values())} of {report.rows_read} rows are "
                    "dropped, see above: is this the format you meant?"
                )
            if not examples:
                raise UserError(f"data.{split}: no usable row in {_told(source)}: {report}")
            self._written[split] = report.prompts
            self.examples[split] = examples
        if self._answers_needed_by and not self.has_reference_answers(split):
            raise UserError(
                f"data.{split}: {_told(self._sources[split])} has prompts without reference "
                f"answers, and {self._answers_needed_by} needs those; add a column completion (or "
                "chosen and rejected), name yours with data.rename, e.g. {answer: completion}, or "
                "train with GRPOModule or PPOModule and scoring.comparison=raw, which need none"
            )
        return self.examples[split]

    def preference_pairs(self, split: str) -> tuple[list[str], list[str], list[str]]:
        """Return prompts, chosen and rejected answers of the rows that have both."""
        pairs = [
            (conversation_text(example.prompt), example.reference_answer, example.rejected_answer)
            for example in self.read(split)
            if example.reference_answer is not None and example.rejected_answer is not None
        ]
        prompts, chosen, rejected = zip(*pairs, strict=True) if pairs else ((), (), ())
        return list(prompts), list(chosen), list(rejected)

    def _rows(self, split: str) -> Any:
        source = self._sources[split]
        if isinstance(source, str) and source.startswith(_EMBEDDED):
            from grao_lightning.embedded.keywords import keyword_rows

            return keyword_rows(split)
        if not _is_named(source):
            return source
        from grao_lightning.data.sources import load_rows  # imports `datasets`, which takes long

        return load_rows(
            source, split=self._splits[split], subset=self._subset, data_dir=self._data_dir
        )

    def train_dataloader(self) -> DataLoader:
        """Return endless batches that start at the trainer's global step."""
        trainer = self.trainer
        sampler = StepBatchSampler(
            len(self.examples["train"]),
            self.prompts_per_step,
            seed=run_seed(),
            first_step=trainer.global_step if trainer else 0,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        examples = self.examples["train"]
        if self._wrong_reference_share:
            examples = with_wrong_references(examples, self._wrong_reference_share)
        return self._loader(examples, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        """Return this rank's share of the validation rows: nothing repeated, nothing dropped."""
        rank, world_size = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        rows = list(range(len(self.examples["validation"])))[: self.validation_prompts]
        options: dict[str, Any] = {
            "sampler": rows[rank::world_size],
            "batch_size": self._validation_batch_size,
        }
        strategy = getattr(self.trainer, "strategy", None)
        if getattr(strategy, "keeps_step", False):
            if len(rows) < world_size:
                raise UserError(
                    f"data.validation_prompts must be at least {world_size} with the strategy "
                    f"fsdp2, one for each device; got {len(rows)}: take more, or fewer devices"
                )
            size = self._validation_batch_size
            shares = even_batches(len(rows), size, rank=rank, world_size=world_size)
            options = {"batch_sampler": shares}
        return self._loader(self.examples["validation"], **options)

    def _loader(self, examples: list[Example], **options: Any) -> DataLoader:
        return DataLoader(
            _Numbered(examples), collate_fn=self._collate, num_workers=self._num_workers, **options
        )

    def _collate(self, numbered: Sequence[tuple[int, Example]]) -> PromptBatch:
        assert self.encoder is not None, "setup() makes the encoder"
        indices, examples = zip(*numbered, strict=True)
        answers = [example.reference_answer for example in examples]
        return PromptBatch(
            indices=list(indices),
            prompt_ids=[self.encoder.encode_prompt(example.prompt).ids for example in examples],
            prompts=[conversation_text(example.prompt) for example in examples],
            reference_answer_ids=[
                []
                if example.reference_answer is None
                else self.encoder.encode_answer(example.reference_answer, example.prompt)
                for example in examples
            ],
            reference_answers=["" if answer is None else answer for answer in answers],
            rejected_answer_ids=[
                self.encoder.encode_answer(example.rejected_answer, example.prompt)
                for example in examples
                if self._reads_rejected and example.rejected_answer is not None
            ],
            columns=[example.columns for example in examples],
        )


def with_wrong_references(examples: list[Example], share: float) -> list[Example]:
    """Return examples of which a share has its chosen and rejected answers exchanged.

    Which ones depends on nothing but their number, and a larger share includes a smaller one's.

    Raises:
        UserError: An example that is to be exchanged has no rejected answer.
    """
    chosen = random.Random(0).sample(range(len(examples)), len(examples))
    changed = list(examples)
    for number in chosen[: round(share * len(examples))]:
        example = examples[number]
        if example.rejected_answer is None:
            raise UserError(
                f"data.wrong_reference_share={share} needs a rejected answer in every row of "
                f"data.train; row {number + 1} has none: use preference data, or set it to 0"
            )
        changed[number] = replace(
            example,
            reference_answer=example.rejected_answer,
            rejected_answer=example.reference_answer,
        )
    return changed


class _Numbered(Dataset[tuple[int, Example]]):
    """Examples with their row numbers, for a DataLoader."""

    def __init__(self, examples: list[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[int, Example]:
        return index, self._examples[index]


def _is_named(source: Any) -> bool:
    """Return whether rows are named, and not there already."""
    one = isinstance(source, str)
    return one or (isinstance(source, list) and all(isinstance(part, str) for part in source))


def _told(source: Any) -> str:
    """Return a source in a few words."""
    return str(source) if _is_named(source) else f"{len(source)} rows"


def _source_fault(setting: str, source: Any) -> str | None:
    """Return what is wrong with a source as far as can be told without reading it."""
    if not _is_named(source):
        return _rows_fault(setting, source)
    from grao_lightning.data.sources import is_local

    for path in [source] if isinstance(source, str) else source:
        if path.startswith(_EMBEDDED):
            if source != "embedded:keywords":
                return f"{setting}: no embedded data {source!r}; there is embedded:keywords"
        elif is_local(path) and not has_magic(path) and not Path(path).expanduser().exists():
            return f"{setting}: no such file: {path} (looked in {Path.cwd()})"
    return None


def _rows_fault(setting: str, rows: Any) -> str | None:
    """Return what is wrong with rows that are handed over."""
    import datasets

    rule = f"{setting} must be a source's name, a datasets.Dataset or a list of rows as dicts"
    got = f"{rule}; got {type(rows).__name__}"
    if isinstance(rows, Mapping):  # a DatasetDict too
        return f"{got}: take one of {', '.join(map(str, rows))}"
    if isinstance(rows, datasets.IterableDataset):
        return f"{got}, whose end is not known: take list({setting}.take(10_000)) or so"
    if not isinstance(rows, datasets.Dataset | list | tuple):
        return got
    if not len(rows):
        return f"{rule}; got no row"
    if not isinstance(rows, datasets.Dataset):
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, Mapping):
                return f"{rule}; got {type(row).__name__} as row {number}: {row!r:.60}"
    return None


def _has_no_splits(source: Any) -> bool:
    """Return whether a source is rows or local files, and not a folder or a hub name."""
    from grao_lightning.data.sources import is_local

    if isinstance(source, str):
        return is_local(source) and not Path(source).expanduser().is_dir()
    return True
