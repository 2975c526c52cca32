"""The Bradley-Terry loss against TRL's own and by hand."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from grao_lightning.objectives.bradley_terry import BradleyTerrySettings, bradley_terry_loss


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 5, dtype=torch.double) * 2
    return chosen.requires_grad_(), rejected.requires_grad_()


def trl_loss(chosen, rejected, margins=None, centring=None):
    """Return what RewardTrainer.compute_loss says of the same scores."""
    from trl import RewardTrainer

    trainer = RewardTrainer.__new__(RewardTrainer)
    attributes = {
        "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(center_rewards_coefficient=centring),
        "accelerator": SimpleNamespace(
            gather_for_metrics=lambda value: value, gather=lambda value: value
        ),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "_metrics": {"train": defaultdict(list)},
    }
    for name, value in attributes.items():
        setattr(trainer, name, value)
    inputs = {"attention_mask": torch.ones(1)}
    if margins is not None:
        inputs["margin"] = margins
    logits = torch.cat([chosen, rejected])[:, None]
    return trainer.compute_loss(lambda **_: SimpleNamespace(logits=logits), inputs)


@pytest.mark.parametrize("margins", [None, torch.tensor([0.0, 1.0, 0.5, 2.0, 0.1]).double()])
@pytest.mark.parametrize("centring", [None, 0.01, 0.7])
def test_loss_and_gradient_are_those_of_trls_trainer(margins, centring):
    found = []
    settings = BradleyTerrySettings(centring=centring or 0.0)
    for compute in (
        lambda *scores: trl_loss(*scores, margins, centring),
        lambda *scores: bradley_terry_loss(*scores, settings, margins).mean(),
    ):
        scores = tensors()
        loss = compute(*scores)
        loss.backward()
        found.append([loss.detach(), *(part.grad for part in scores)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_every_option_by_hand():
    """Scores 2 and 1, margin 0.5, smoothing 0.2, centring 0.1: sigmoid(0.5), sigmoid(-1), 3^2."""
    settings = BradleyTerrySettings(margin=0.5, label_smoothing=0.2, centring=0.1)
    loss = bradley_terry_loss(torch.tensor([2.0]), torch.tensor([1.0]), settings)
    told, untold = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(1.0))
    expected = -0.8 * math.log(told) - 0.2 * math.log(untold) + 0.1 * 9
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_pairs_own_margin_takes_the_place_of_the_common_one():
    chosen, rejected = tensors()
    own = bradley_terry_loss(
        chosen, rejected, BradleyTerrySettings(margin=9.0), torch.full((5,), 0.3).double()
    )
    torch.testing.assert_close(
        own, bradley_terry_loss(chosen, rejected, BradleyTerrySettings(margin=0.3))
    )


def test_only_centring_sees_what_is_added_to_all_scores():
    chosen, rejected = tensors()
    for settings, same in (
        (BradleyTerrySettings(margin=0.5, label_smoothing=0.1), True),
        (BradleyTerrySettings(centring=0.1), False),
    ):
        moved = bradley_terry_loss(chosen + 3, rejected + 3, settings)
        assert torch.allclose(moved, bradley_terry_loss(chosen, rejected, settings)) == same


@pytest.mark.parametrize(
    "settings", [BradleyTerrySettings(), BradleyTerrySettings(0.5, 0.2, 0.1)], ids=["plain", "all"]
)
def test_the_gradient_is_that_of_the_loss(settings):
    torch.autograd.gradcheck(lambda *scores: bradley_terry_loss(*scores, settings), tensors())
