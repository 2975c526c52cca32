"""Batches: which prompts, in which order, with which tokens."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from grao_lightning import PromptDataModule
from grao_lightning.data.datamodule import with_wrong_references
from grao_lightning.data.example import Example
from grao_lightning.data.sampler import StepBatchSampler
from grao_lightning.faults import UserError


def first_batches(sampler: StepBatchSampler, number: int) -> list[list[int]]:
    return [batch for _, batch in zip(range(number), sampler, strict=False)]


def test_every_pass_over_the_data_holds_each_row_once_in_another_order():
    sampler = StepBatchSampler(12, 4, seed=0)
    rows = [row for batch in first_batches(sampler, 6) for row in batch]
    assert sorted(rows[:12]) == sorted(rows[12:]) == list(range(12))
    assert rows[:12] != rows[12:]


def test_a_batch_may_reach_over_the_end_of_a_pass_and_drops_nothing():
    sampler = StepBatchSampler(10, 4, seed=0)
    rows = [row for batch in first_batches(sampler, 5) for row in batch]
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))


def test_a_batch_is_a_function_of_seed_and_step():
    whole = first_batches(StepBatchSampler(50, 8, seed=1), 9)
    assert first_batches(StepBatchSampler(50, 8, seed=1, first_step=4), 5) == whole[4:]
    assert first_batches(StepBatchSampler(50, 8, seed=2), 9) != whole


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_a_single_process(world_size):
    whole = first_batches(StepBatchSampler(50, 8, seed=1), 3)
    shares = [
        first_batches(StepBatchSampler(50, 8, seed=1, rank=rank, world_size=world_size), 3)
        for rank in range(world_size)
    ]
    for step in range(3):
        together = [row for share in shares for row in share[step]]
        assert sorted(together) == sorted(whole[step])
        assert all(len(share[step]) == 8 // world_size for share in shares)


@pytest.fixture(scope="module")
def data() -> PromptDataModule:
    module = PromptDataModule(
        tokenizer="embedded:keywords", validation_prompts=20, validation_batch_size=8
    )
    module.setup("fit")
    return module


def test_validation_shows_each_of_the_first_rows_once(data):
    batches = list(data.val_dataloader())
    assert [index for batch in batches for index in batch.indices] == list(range(20))
    assert [len(batch) for batch in batches] == [8, 8, 4]


def test_a_batch_holds_prompts_answers_and_other_columns(data):
    batch = next(iter(data.val_dataloader()))
    tokenizer = data.encoder._tokenizer
    for number in range(len(batch)):
        keywords = batch.columns[number]["keywords"]
        prompt = tokenizer.decode(batch.prompt_ids[number])
        assert prompt == f"<bos> {keywords} <sep>"
        assert batch.prompts[number] == f"\n\nHuman: {keywords}\n\nAssistant:"
        answer = tokenizer.decode(batch.reference_answer_ids[number])
        assert answer == f"{batch.reference_answers[number]} <eos>"


def test_the_whole_validation_split_gives_preference_pairs_whatever_is_validated(data):
    prompts, chosen, rejected = data.preference_pairs("validation")
    assert len(prompts) == len(chosen) == len(rejected) == 256
    assert prompts[0].startswith("\n\nHuman: ") and chosen[0] != rejected[0]


def test_workers_give_the_same_batches_as_none():
    def batches(num_workers: int):
        module = PromptDataModule(
            tokenizer="embedded:keywords", num_workers=num_workers, prompts_per_step=4
        )
        module.setup("fit")
        batches = zip(range(3), module.train_dataloader(), strict=False)
        return [batch.prompt_ids for _, batch in batches]

    assert batches(0) == batches(2)


def test_faults_name_the_prompts_per_step_that_would_work():
    faults = PromptDataModule(prompts_per_step=7).faults(world_size=4)
    assert faults == ["data.prompts_per_step must be a multiple of the 4 devices; got 7: 4 works"]
    assert PromptDataModule(prompts_per_step=8).faults(world_size=4) == []


def test_validation_on_training_rows_is_said_aloud(tmp_path):
    def warned(train: str, validation: str | None = None) -> bool:
        module = PromptDataModule(
            train, validation, tokenizer="embedded:keywords", prompts_per_step=1
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module.setup("validate")
        return any("those of training rows" in str(warning.message) for warning in caught)

    train, held_out = (str(tmp_path / name) for name in ("train.jsonl", "held_out.jsonl"))
    for path in (train, held_out):
        Path(path).write_text('{"prompt": "apple", "completion": "bridge"}\n')
    assert warned(train) and warned(train, train)
    assert not warned(train, held_out)
    assert not warned("embedded:keywords"), "it has splits of its own"


def test_a_source_without_usable_rows_tells_why(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "chosen": "same", "rejected": "same"}\n')
    module = PromptDataModule(train=str(path))
    with pytest.raises(UserError, match=r"no usable row in .*rows.jsonl.*kept 0"):
        module.read("train")


def test_settings_of_files_reach_the_rows(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "apple", "answer": "river"}\n')
    (tmp_path / "dev.jsonl").write_text('{"question": "kettle", "answer": "yarn"}\n')
    module = PromptDataModule(
        train=str(tmp_path / "train.jsonl"),
        validation=str(tmp_path / "dev.jsonl"),
        tokenizer="embedded:keywords",
        rename={"question": "prompt", "answer": "completion"},
        prompts_per_step=1,
    )
    module.setup("fit")
    assert [example.prompt for example in module.examples["train"]] == ["apple"]
    batch = next(iter(module.val_dataloader()))
    assert (batch.prompts, batch.reference_answers) == (["kettle"], ["yarn"])


def test_each_split_is_read_under_its_own_name_with_the_sources_other_settings(monkeypatch):
    asked = []

    def load_rows(source, **options):
        asked.append((source, options))
        return [{"prompt": "apple", "completion": "river"}]

    monkeypatch.setattr("grao_lightning.data.sources.load_rows", load_rows)
    options = {"subset": "harmless", "data_dir": "base"}
    module = PromptDataModule(
        train="me/data", train_split="most", validation_split="rest", **options
    )
    module.read("train"), module.read("validation")
    assert asked == [
        ("me/data", {"split": "most", **options}),
        ("me/data", {"split": "rest", **options}),
    ]


def test_length_limit_and_chat_template_reach_the_encoder(data):
    whole = next(iter(data.val_dataloader()))
    template = "{% for turn in messages %}{{ turn['content'] }} <sep> <eos>{% endfor %}"
    module = PromptDataModule(
        tokenizer="embedded:keywords", max_prompt_tokens=4, chat_template=template
    )
    module.setup("validate")
    batch = next(iter(module.val_dataloader()))
    tokenizer = module.encoder._tokenizer
    for ids, before in zip(batch.prompt_ids[:8], whole.prompt_ids, strict=True):
        last_words = " ".join(tokenizer.decode(before).split()[-3:-1])
        assert tokenizer.decode(ids) == f"{last_words} <sep> <eos>"


def test_ranks_validate_each_row_once(data):
    def rows(rank: int) -> list[int]:
        data.trainer = SimpleNamespace(global_rank=rank, world_size=3)
        try:
            return [index for batch in data.val_dataloader() for index in batch.indices]
        finally:
            data.trainer = None

    shares = [rows(rank) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == list(range(20))
    assert sorted(map(len, shares)) == [6, 7, 7]


def test_training_batches_are_those_of_seed_step_and_rank(data, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    data.trainer = SimpleNamespace(global_step=3, global_rank=1, world_size=2)
    try:
        _, batch = next(enumerate(data.train_dataloader()))
    finally:
        data.trainer = None
    assert batch.indices == StepBatchSampler(4096, 8, seed=5).batch(3)[1::2]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_wrong_references_change_places_with_rejected_answers_in_training_alone(share):
    data = PromptDataModule(tokenizer="embedded:keywords", wrong_reference_share=share)
    data.setup("fit")
    right = data.examples["train"]
    wrong = data.train_dataloader().dataset
    swapped = [
        number
        for number, example in enumerate(right)
        if (wrong[number][1].reference_answer, wrong[number][1].rejected_answer)
        == (example.rejected_answer, example.reference_answer)
    ]
    kept = sum(wrong[number][1] == example for number, example in enumerate(right))
    assert len(swapped) == share * len(right) and kept == (1 - share) * len(right)
    held_out = data.val_dataloader().dataset
    assert all(held_out[n][1] == row for n, row in enumerate(data.examples["validation"]))
    assert data.preference_pairs("train")[1][0] == right[0].reference_answer


def test_rejected_answers_are_encoded_for_methods_that_train_on_pairs_alone():
    for reads, expected in ((True, 8), (False, 0)):
        data = PromptDataModule(tokenizer="embedded:keywords")
        module = SimpleNamespace(trains_on_pairs=reads)
        data.trainer = SimpleNamespace(
            lightning_module=module, global_step=0, global_rank=0, world_size=1
        )
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        assert len(batch.rejected_answer_ids) == expected
        assert len(batch.reference_answer_ids) == 8


def test_a_larger_share_of_wrong_references_includes_a_smaller_one():
    rows = [Example(str(n), f"good {n}", f"bad {n}", {}) for n in range(40)]
    few, many = (
        {n for n, row in enumerate(with_wrong_references(rows, share)) if row != rows[n]}
        for share in (0.25, 0.5)
    )
    assert few < many and (len(few), len(many)) == (10, 20)


def test_wrong_references_need_rejected_answers():
    rows = [Example("q", "good", None, {})]
    with pytest.raises(UserError, match="row 1 has none: use preference data"):
        with_wrong_references(rows, 1.0)


# -- rows handed over in Python --------------------------------------------------------------------

ROWS = [{"prompt": word, "completion": f"{word} river", "hint": 3} for word in ("apple", "yarn")]


@pytest.mark.parametrize("kind", ["rows", "tuple", "dataset", "file"])
def test_rows_handed_over_are_those_of_a_file(tmp_path, kind):
    held_out = [{"prompt": "kettle", "completion": "yarn"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    train = {
        "rows": ROWS,
        "tuple": tuple(ROWS),
        "dataset": datasets.Dataset.from_list(ROWS),
        "file": str(tmp_path / "rows.jsonl"),
    }[kind]
    module = PromptDataModule(train, held_out, tokenizer="embedded:keywords", prompts_per_step=2)
    assert module.faults() == [] and not module.validates_on_train_rows
    module.setup("fit")
    assert [row.prompt for row in module.examples["train"]] == ["apple", "yarn"]
    batch = next(iter(module.train_dataloader()))
    assert sorted(batch.reference_answers) == ["apple river", "yarn river"]
    assert batch.columns == [{"hint": 3}] * 2
    assert next(iter(module.val_dataloader())).prompts == ["kettle"]


def test_validation_on_the_rows_of_training_is_said_aloud():
    assert PromptDataModule(ROWS).validates_on_train_rows
    assert PromptDataModule(ROWS, ROWS).validates_on_train_rows
    assert not PromptDataModule(ROWS, ROWS[:1]).validates_on_train_rows
    with pytest.warns(UserWarning, match=r"data.validation is data.train \(2 rows\)"):
        PromptDataModule(ROWS, tokenizer="embedded:keywords", prompts_per_step=1).setup("validate")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            datasets.DatasetDict(a=datasets.Dataset.from_list(ROWS)),
            "got DatasetDict: take one of a",
        ),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "end is not known: take list"),
        (datasets.Dataset.from_dict({"prompt": []}), "got no row"),
        ([ROWS[0], "apple"], "got str as row 2: 'apple'"),
        (7, "got int"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_list_of_rows_is_refused_with_what_may_stand_there(train, message):
    (fault,) = PromptDataModule(train).faults()
    assert fault.startswith("data.train must be a source's name, a datasets.Dataset or a list of")
    assert message in fault
