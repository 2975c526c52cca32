"""What SFT and DPO validate by themselves: no reward, no sampling."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from grao_lightning import DPOModule, GRAOModule, PromptDataModule, SFTModule
from grao_lightning.callbacks.answers import ValidationAnswers
from grao_lightning.callbacks.sampling import GroupSampling
from grao_lightning.faults import UserError
from grao_lightning.metrics.outcomes import mean_interval, wilson_interval
from grao_lightning.rewards.protocol import RewardSpec
from tests.runs import SCORE, fit, stages, trainer, two_ranks

UNSCORED = {"scoring": {"rewards": []}}
DATA = {"validation_prompts": 9, "validation_batch_size": 4}
VALIDATED = {"limit_val_batches": 1.0, "val_check_interval": 3}


def made(kind, **options):
    return kind(policy="embedded:keywords-weak", learning_rate=1e-3, **options)


def finished(folder, kind, **options):
    callbacks = [*stages(**UNSCORED), ValidationAnswers()]
    module = made(kind, **options)
    return fit(folder, module=module, data=DATA, callbacks=callbacks, **VALIDATED)


def nats(model, rows) -> torch.Tensor:
    """Return what each answer costs, [R], from the model's own logits, one row by itself."""
    costs = []
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.answer_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
        costs.append(F.cross_entropy(logits, torch.tensor(row.answer_ids), reduction="sum"))
    return torch.stack(costs).double()


def held_out(pairs: bool = False):
    """Return the nine validation prompts as one batch."""
    data = PromptDataModule(validation_prompts=9, tokenizer="embedded:keywords-weak")
    data.setup("validate")
    data._reads_rejected = pairs
    (batch,) = data.val_dataloader()
    return batch


def test_sft_without_rewards_validates_the_loss_of_the_reference_answers(tmp_path, monkeypatch):
    def sampled(*_) -> None:
        pytest.fail("something was sampled")

    monkeypatch.setattr(GroupSampling, "_sample", sampled)
    module = finished(tmp_path, SFTModule)
    rows = held_out().reference_answer_rows()
    tokens = torch.tensor([len(row.answer_ids) for row in rows])
    assert set(module.estimates) == {"loss", "base_loss"}
    for name, model in (("loss", module.policy), ("base_loss", module.reference_model.model)):
        expected = nats(model, rows).sum() / tokens.sum()
        assert module.estimates[name].value == pytest.approx(expected.item(), rel=1e-5)
        low, high = module.estimates[name][1:]
        assert low < module.estimates[name].value < high
    assert module.estimates["loss"] != module.estimates["base_loss"]
    assert not (tmp_path / "answers.jsonl").exists()
    assert set(module.trainer.callback_metrics) >= {"val/loss", "val_bounds/loss_low"}


def test_dpo_without_rewards_validates_loss_accuracy_and_margin_of_held_out_pairs(tmp_path):
    module = finished(tmp_path, DPOModule, beta=0.5)
    batch = held_out(pairs=True)
    rows = batch.reference_answer_rows() + batch.rejected_answer_rows()
    ratios = nats(module.reference_model.model, rows) - nats(module.policy, rows)
    chosen, rejected = (0.5 * part for part in ratios.split(9))
    margins = chosen - rejected
    expected = {
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/margins": margins.mean().item(),
        "loss": F.softplus(-margins).mean().item(),
        "base_loss": math.log(2),
    }
    found = {name: estimate.value for name, estimate in module.estimates.items()}
    accuracy = module.estimates["rewards/accuracies"]
    assert accuracy == wilson_interval(int((margins > 0).sum()), 9)
    assert found == pytest.approx({**expected, "rewards/accuracies": accuracy.value}, rel=1e-4)
    spread = mean_interval(margins.mean().item(), margins.var().item(), 9)
    assert module.estimates["rewards/margins"] == pytest.approx(spread, rel=1e-4)


@pytest.mark.parametrize("kind", [SFTModule, DPOModule])
def test_rewards_bring_back_ras_beside_a_methods_own_figures(tmp_path, kind):
    """Judges alone do too: nothing is trained by rewards."""
    scoring = {"rewards": [], "judges": [RewardSpec(SCORE)]}
    callbacks = stages(scoring=scoring)
    module = fit(tmp_path, module=made(kind), data=DATA, callbacks=callbacks, **VALIDATED)
    assert {"ras", "nag", "distinct", "loss", "base_loss"} <= set(module.estimates)
    assert module.validation_monitor == ("val/ras", "max")


def test_own_figures_on_two_ranks_with_uneven_shards_equal_those_of_one(tmp_path):
    kind, options = SFTModule, {"learning_rate": 1e-4}
    callbacks = stages(**UNSCORED)
    model = kind(policy="embedded:keywords-weak", **options)
    exact = {"callbacks": callbacks, "precision": "64-true", **VALIDATED}
    one = fit(tmp_path, module=model, data=DATA, **exact)
    run = {"precision": "64-true", "method": kind.__name__, "model": options}
    two_ranks(tmp_path, DATA, UNSCORED, run)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["world_size"] == 2
    for name, estimate in one.estimates.items():
        assert summary[name] == pytest.approx(estimate._asdict(), abs=1e-9), name


def test_dpo_refuses_to_validate_on_rows_that_are_no_pairs(tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "apple", "completion": "apple"}\n' * 4)
    data = PromptDataModule(validation=str(held_out))
    run = trainer(tmp_path, callbacks=stages(**UNSCORED), **VALIDATED)
    with pytest.raises(UserError, match=r"data\.validation must have a rejected answer in every"):
        run.fit(made(DPOModule), datamodule=data)


def test_training_on_groups_still_needs_a_reward(tmp_path):
    with pytest.raises(UserError, match=r"scoring\.rewards must name at least one reward"):
        fit(tmp_path, module=made(GRAOModule), callbacks=stages(**UNSCORED))


@pytest.mark.parametrize(
    ("kind", "monitor", "mode", "expected"),
    [
        (SFTModule, "val/ras", "max", "got val/ras: remove it, and val/loss decides"),
        (SFTModule, "val/loss", "max", "mode must be min with monitor=val/loss, or the worst"),
        (DPOModule, "val/rewards/margins", "min", "mode must be max with monitor=val/rewards"),
        (DPOModule, "val/rewards/margin", "max", "did you mean val/rewards/margins?"),
    ],
)
def test_a_checkpoint_that_could_not_keep_the_best_is_refused(
    tmp_path, kind, monitor, mode, expected
):
    best = ModelCheckpoint(tmp_path, monitor=monitor, mode=mode)
    callbacks = [*stages(**UNSCORED), best]
    with pytest.raises(UserError, match=expected):
        fit(tmp_path, module=made(kind), callbacks=callbacks, enable_checkpointing=True)


def test_the_checkpoint_of_the_least_loss_is_kept(tmp_path):
    module = made(SFTModule)
    figure, mode = "val/loss", "min"
    best = ModelCheckpoint(tmp_path / "saved", monitor=figure, mode=mode, filename="best")
    options = {**VALIDATED, "val_check_interval": 1, "enable_checkpointing": True}
    fit(tmp_path, module=module, data=DATA, callbacks=[*stages(**UNSCORED), best], **options)
    assert module.validation_monitor == (figure, mode)
    assert best.best_model_score.item() == pytest.approx(module.estimates["loss"].value)
    assert (tmp_path / "saved/best.ckpt").is_file()
