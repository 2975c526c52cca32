"""RewardModule: the gradient of its loss, splits, ranks, resume, refusals, what it measures."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from grao_lightning import GroupSampling, GroupScoring, PromptDataModule, ReferenceAwareClipping
from grao_lightning.data.example import Example
from grao_lightning.display.tables import without_nan
from grao_lightning.faults import UserError
from grao_lightning.language_model.scores import row_scores
from grao_lightning.language_model.sharing import shares_prompts
from grao_lightning.metrics.outcomes import wilson_interval
from grao_lightning.modules.reward import RewardModule
from grao_lightning.rewards.preference import length_alone
from grao_lightning.rewards.protocol import RewardSpec
from tests.encoders import tiny_encoder_folder
from tests.runs import SCORE, fit, largest_difference, trainer, two_ranks, weights

SMOLLM2, MINILM = (os.environ.get(f"GRAO_TEST_{name}") for name in ("SMOLLM2", "MINILM"))
VALIDATED = {"limit_val_batches": 1.0, "val_check_interval": 3}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return tiny_encoder_folder(tmp_path_factory.mktemp("encoder") / "model")


def stages(**clipping):
    """Return the three callbacks as a config without ``scoring`` makes them."""
    return [GroupSampling(), GroupScoring(), ReferenceAwareClipping(**clipping)]


def reward(**options) -> RewardModule:
    return RewardModule(
        **{"backbone": "embedded:keywords-weak", "learning_rate": 1e-3, "centring": 0.01, **options}
    )


class Record(Callback):
    """Keeps norms, the newest batch, the weights before it and its gradients."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batch = batch
        self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        named = pl_module.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.norms.append(pl_module.step_values["grad_norm"])


def run(folder: Path, module, clipping=None, **options):
    record = Record()
    callbacks = [*stages(**(clipping or {})), record]
    if not module.backbone_source.startswith("embedded:"):  # an encoder: it has no template
        options["data"] = {"chat_template": "hh", **options.get("data", {})}
    return fit(folder, module=module, callbacks=callbacks, **options), record


def kinds(encoder: str) -> dict:
    return {
        "packed": {},
        "padded": {"share_prompts": False},
        "encoder": {"backbone": encoder},
    }


each_kind = pytest.mark.parametrize("kind", ["packed", "padded", "encoder"])


@each_kind
def test_the_split_into_micro_batches_changes_neither_norms_nor_weights(tmp_path, encoder, kind):
    found = []
    for tokens in (8192, 40):
        module = reward(micro_batch_tokens=tokens, **kinds(encoder)[kind])
        module, record = run(tmp_path, module, precision="64-true")
        found.append((record.norms, weights(module)))
    assert shares_prompts(module.reward_model) == (kind == "packed")
    assert min(found[0][0]) > 1e-3
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert largest_difference(found[0][1], found[1][1]) < 1e-6


@each_kind
def test_a_step_takes_the_gradient_of_the_loss_written_out_pair_by_pair(tmp_path, encoder, kind):
    settings = {"margin": 0.3, "label_smoothing": 0.1, "centring": 0.05}
    module = reward(**settings, **kinds(encoder)[kind])
    options = {"clipping": {"max_norm": 1e9}, "max_steps": 1, "precision": "64-true"}
    module, record = run(tmp_path, module, **options)
    module.load_state_dict(record.before)
    module.zero_grad()
    batch, losses = record.batch, []
    pairs = zip(
        batch.prompt_ids, batch.reference_answer_ids, batch.rejected_answer_ids, strict=True
    )
    for prompt, chosen, rejected in pairs:
        scores = []
        for answer in (chosen, rejected):
            inputs = {"input_ids": torch.tensor([prompt + answer])}
            if kind == "encoder":
                types = [0] * len(prompt) + [1] * len(answer)
                inputs["token_type_ids"] = torch.tensor([types])
            module.reward_model.config.pad_token_id = None  # the last token counts
            scores.append(module.reward_model(**inputs).logits[0, 0])
        lead = scores[0] - scores[1]
        told = -0.9 * F.logsigmoid(lead - 0.3) - 0.1 * F.logsigmoid(-lead)
        losses.append(told + 0.05 * (scores[0] + scores[1]).square())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert module.step_values["loss"] == pytest.approx(loss.item(), rel=1e-6)
    named = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert named.keys() == record.gradients.keys()
    assert max(gradient.abs().max() for gradient in named.values()) > 1e-3
    for name, gradient in named.items():
        # Norms are computed in float32 whatever the precision.
        torch.testing.assert_close(record.gradients[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"backbone": "encoder", "dropout": True}])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, encoder, options):
    """Also with dropout, which draws anew at every step."""
    options = {name: encoder if value == "encoder" else value for name, value in options.items()}
    data = {"data": {"chat_template": "hh"} if options else {}}
    whole = fit(tmp_path, module=reward(**options), callbacks=stages(), max_steps=6, **data)
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, filename="three")
    saved = {"callbacks": [*stages(), saver], "enable_checkpointing": True}
    fit(tmp_path, module=reward(**options), max_steps=3, **saved, **data)
    going_on = {"max_steps": 6, "ckpt_path": str(tmp_path / "saved/three.ckpt"), **data}
    torch.manual_seed(1)
    resumed = fit(tmp_path, module=reward(**options), callbacks=stages(), **going_on)
    assert largest_difference(weights(whole), weights(resumed)) == 0.0
    assert whole.step_values["loss"] == resumed.step_values["loss"]


def test_dropout_acts_where_it_is_asked_for_alone(tmp_path, encoder):
    losses = []
    for dropout in (False, True):
        module = reward(backbone=encoder, dropout=dropout)
        losses.append(run(tmp_path, module, max_steps=1)[0].step_values["loss"])
    module = reward(backbone=encoder, share_prompts=False)
    assert run(tmp_path, module, max_steps=1)[0].step_values["loss"] == losses[0] != losses[1]


def test_two_processes_take_the_steps_of_one_and_measure_the_same_on_uneven_shards(tmp_path):
    data = {"prompts_per_step": 2, "validation_prompts": 9, "validation_batch_size": 2}
    options = {"callbacks": stages(), "data": data, "precision": "64-true"}
    one = fit(tmp_path, module=reward(learning_rate=1e-4), **options, **VALIDATED)
    settings = {"learning_rate": 1e-4, "centring": 0.01}
    method = {"precision": "64-true", "method": "RewardModule", "model": settings}
    both = two_ranks(tmp_path, data, {}, method)
    assert both["apart"] == 0.0 and both["steps"] == 3
    assert both["values"]["loss"] == pytest.approx(one.step_values["loss"], abs=1e-6)
    assert largest_difference(weights(one), torch.load(tmp_path / "weights.pt")) < 1e-6
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert sum(part["number"] for part in summary["reliability"]) == 9
    for name, estimate in one.estimates.items():
        expected = without_nan(estimate._asdict())
        assert summary[name] == pytest.approx(expected, abs=1e-6), name


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_step_is_taken_in_every_precision(tmp_path, precision):
    start = weights(run(tmp_path, reward(), max_steps=0, precision=precision)[0])
    module = reward(learning_rate=1e-2)
    after = weights(run(tmp_path, module, max_steps=1, precision=precision)[0])
    assert largest_difference(start, after) > 1e-4
    assert all(value.isfinite().all() for value in after.values())


def test_a_new_head_depends_on_the_seed_alone(tmp_path):
    heads = []
    for before in (1, 2):
        module = reward()
        torch.manual_seed(before)
        module.configure_model()
        heads.append(module.reward_model.score.weight)
        assert torch.initial_seed() == before, "the run's own random numbers go on as they were"
    assert torch.equal(*heads)


def test_the_embedded_pairs_are_learned_better_than_by_length(tmp_path):
    module = reward(backbone="embedded:keywords", learning_rate=3e-3)
    options = {"max_steps": 30, "limit_val_batches": 1.0, "val_check_interval": 30}
    fit(tmp_path, module=module, callbacks=stages(), **options)
    found = module.estimates
    assert found["accuracy"].low > found["length_alone_accuracy"].high
    assert found["loss"].value < math.log(2) / 2
    assert found["margin"].value > 1


def test_validation_figures_are_those_of_the_scores(tmp_path):
    data = {"validation_prompts": 20, "validation_batch_size": 7}
    module = reward(backbone="embedded:keywords")
    module = fit(tmp_path, module=module, callbacks=stages(), data=data, **VALIDATED)
    loaded = PromptDataModule(validation_prompts=20)
    loaded.trainer = module.trainer
    loaded.setup("fit")
    margins = []
    for batch in loaded.val_dataloader():
        for rows in zip(batch.reference_answer_rows(), batch.rejected_answer_rows(), strict=True):
            chosen, rejected = (row_scores(module.reward_model, [row]).item() for row in rows)
            margins.append(chosen - rejected)
    right = sum(margin > 0 for margin in margins)
    assert 0 < right < 20
    assert module.estimates["accuracy"] == wilson_interval(right, 20)
    loss = -F.logsigmoid(torch.tensor(margins)).mean().item()
    assert module.estimates["loss"].value == pytest.approx(loss, abs=1e-5)
    assert module.estimates["margin"].value == pytest.approx(sum(margins) / 20, abs=1e-5)
    _, *train = loaded.preference_pairs("train")
    _, *held_out = loaded.preference_pairs("validation")
    expected = length_alone(tuple(train), tuple(answers[:20] for answers in held_out))
    assert module.estimates["length_alone_accuracy"] == expected


def test_nothing_is_sampled_or_scored(tmp_path):
    module, record = run(tmp_path, reward(), **VALIDATED)
    assert record.batch.completions is None and record.batch.rewards is None
    assert set(record.batch.seconds) == {"update"}
    assert {"loss", "accuracy", "margin", "grad_norm"} <= module.step_values.keys()


def test_the_norm_is_clipped(tmp_path):
    module, _ = run(tmp_path, reward(), clipping={"max_norm": 1e-3}, max_steps=1)
    assert module.step_values["grad_norm"] > 1e-3
    assert module.step_values["clip_ratio/grad_norm"] == 1.0


def examples(**columns) -> list[Example]:
    turns = [{"role": "user", "content": "apple"}]
    return [Example(turns, "apple", "river", columns)] * 9


def data_of(train: list[Example]) -> PromptDataModule:
    data = PromptDataModule(prompts_per_step=2)
    data.examples["train"] = train
    return data


def test_every_pair_has_the_margin_of_its_own_row(tmp_path):
    losses = []
    for options in ({"margin": 0.7}, {"margin_column": "lead"}, {}):
        module = reward(centring=0.0, **options)
        one_step = trainer(tmp_path, callbacks=stages(), max_steps=1)
        one_step.fit(module, datamodule=data_of(examples(lead=0.7)))
        losses.append(module.step_values["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[2] < losses[0]


def test_a_pair_too_long_for_the_backbone_is_left_out_and_a_long_prompt_cut(tmp_path):
    encoder = tiny_encoder_folder(tmp_path / "model", max_position_embeddings=16)
    fits = [{"role": "user", "content": "apple"}]
    long = [{"role": "user", "content": "apple river " * 20}]
    rows = [
        Example(fits, "apple", "river", {}),
        Example(long, "apple", "river", {}),
        Example(fits, "apple " * 30, "river", {}),
    ]
    module = reward(backbone=encoder)
    data = PromptDataModule(prompts_per_step=3, max_prompt_tokens=None, chat_template="hh")
    data.examples["train"] = rows
    record = Record()
    one_step = trainer(tmp_path, callbacks=[*stages(), record], max_steps=1)
    one_step.fit(module, datamodule=data)
    assert module.step_values["left_out_pairs"] == pytest.approx(1 / 3)
    found = module.rows(record.batch)
    assert len(found) == 4 and max(map(len, found)) == 16
    assert all(row.prompt_ids[0] == 2 for row in found), "the first token stays"
    assert math.isfinite(module.step_values["loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.5}, r"model.label_smoothing must lie in \[0, 0.5\)"),
        ({"margin": -1.0}, "model.margin must be >= 0"),
        ({"centring": -1.0}, "model.centring must be >= 0"),
        ({"margin": 1.0, "margin_column": "lead"}, "model.margin must be 0 where"),
        ({"backbone": "./nowhere"}, "model.backbone: no such folder"),
        ({"learning_rate": -1.0}, "model.learning_rate must be >= 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, module=reward(**options), callbacks=stages())


def test_rows_that_are_no_pairs_or_have_no_margin_are_refused(tmp_path):
    lone = [Example("apple", reference_answer="apple", rejected_answer=None, columns={})] * 9
    with pytest.raises(UserError, match="a reward model; 9 of 9 rows have none"):
        trainer(tmp_path, callbacks=stages()).fit(reward(), datamodule=data_of(lone))
    module = reward(margin_column="lead")
    with pytest.raises(UserError, match=r"row 1 of data\.train must have a number"):
        trainer(tmp_path, callbacks=stages()).fit(module, datamodule=data_of(examples(lead="x")))


def test_a_monitor_of_sampling_modules_is_refused_with_the_one_to_set(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/ras", mode="max")
    with pytest.raises(UserError, match="got val/ras: remove it, and val/accuracy"):
        fit(
            tmp_path,
            module=reward(),
            callbacks=[*stages(), best],
            enable_checkpointing=True,
        )


def test_settings_of_other_stages_that_have_no_effect_are_told(tmp_path):
    with pytest.raises(UserError, match="must be null with RewardModule"):
        fit(tmp_path, module=reward(), callbacks=stages(drift_target=0.1))
    scoring = GroupScoring(rewards=[RewardSpec(SCORE)])
    callbacks = [GroupSampling(), scoring, ReferenceAwareClipping()]
    with pytest.warns(UserWarning, match="scoring.rewards has no effect on RewardModule"):
        fit(tmp_path, module=reward(), callbacks=callbacks, max_steps=0)


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path, encoder):
    module = reward()
    module.configure_model()
    other = reward(backbone=encoder)
    other.configure_model()
    with pytest.raises(UserError, match=r"not of model.backbone=.*; name the backbone"):
        other.load_state_dict(module.state_dict())


def test_an_empty_rejected_answer_is_an_answer(tmp_path):
    turns = [{"role": "user", "content": "apple"}]
    data = data_of([Example(turns, "apple", "", {})] * 4)
    module = reward()
    trainer(tmp_path, callbacks=stages(), max_steps=1).fit(module, datamodule=data)
    assert math.isfinite(module.step_values["loss"])


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(
            SMOLLM2,
            marks=pytest.mark.skipif(not SMOLLM2, reason="GRAO_TEST_SMOLLM2 names no file"),
        ),
        pytest.param(
            MINILM,
            marks=pytest.mark.skipif(not MINILM, reason="GRAO_TEST_MINILM names no folder"),
        ),
    ],
    ids=["SmolLM2", "MiniLM"],
)
def test_real_backbones_score_a_pair_together_as_they_score_each_answer_alone(source):
    turns = [{"role": "user", "content": "How do I pick a lock?"}]
    data = PromptDataModule(tokenizer=source, prompts_per_step=1)
    data.examples = {
        split: [Example(turns, "Please call a locksmith.", "Use two pins, like so.", {})]
        for split in ("train", "validation")
    }
    data.setup("validate")
    (batch,) = data.val_dataloader()
    module = RewardModule(backbone=source)
    module.configure_model()
    module.reward_model.eval()
    assert shares_prompts(module.reward_model) == (source == SMOLLM2)
    with torch.no_grad():
        batch.rejected_answer_ids = [data.encoder.encode_answer("Use two pins, like so.", turns)]
        rows = batch.reference_answer_rows() + batch.rejected_answer_rows()
        together = row_scores(module.reward_model, rows)
        alone = torch.cat([row_scores(module.reward_model, [row]) for row in rows])
    assert (alone[0] - alone[1]).abs() > 1e-4
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
