"""GRPO and its descendants against TRL's own loss."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from grao_lightning.objectives.grpo import (
    GRPOSettings,
    grpo_token_loss,
    token_weights,
    weight_total,
)
from grao_lightning.objectives.ratio import clipped_loss, is_clipped, mean_by_row, policy_ratio

LENGTHS = torch.tensor([3, 7, 1, 5, 4, 6])
ROW = torch.arange(len(LENGTHS)).repeat_interleave(LENGTHS)
MAX_TOKENS = 9
OF_TRL = {"completions": "grpo", "tokens": "dapo", "max_tokens": "dr_grpo"}


def tensors(spread=0.4):
    torch.manual_seed(3)
    new, old, frozen = (-torch.rand(3, int(LENGTHS.sum())).double() * 3).unbind()
    old = new + spread * torch.randn(len(new)).double()
    return new.requires_grad_(), old, frozen, torch.randn(len(LENGTHS)).double()


def trl_loss(new, old, frozen, advantages, aggregation, settings):
    """Return what GRPOTrainer._compute_loss says of the same tokens."""
    from trl import GRPOTrainer

    def padded(flat):
        return pad_sequence(flat.split(LENGTHS.tolist()), batch_first=True)

    trainer = GRPOTrainer.__new__(GRPOTrainer)
    logprobs = padded(new)
    mask = padded(torch.ones(int(LENGTHS.sum()))).long()
    attributes = {
        "accelerator": SimpleNamespace(
            num_processes=1,
            device="cpu",
            gather=lambda value: value,
            reduce=lambda value, reduction: value,
        ),
        "args": SimpleNamespace(
            use_bias_correction_kl=False, delta=None, steps_per_generation=1, report_to=[]
        ),
        "model": SimpleNamespace(training=True),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, logprobs * 0, None),
        "_metrics": {"train": defaultdict(list)},
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": MAX_TOKENS,
        "loss_type": OF_TRL[aggregation],
        "beta": settings.kl_weight,
        "epsilon_low": settings.eps_low,
        "epsilon_high": settings.eps_high,
        "importance_sampling_level": settings.ratio,
    }
    for name, value in attributes.items():
        object.__setattr__(trainer, name, value)
    inputs = {
        "prompt_ids": mask[:, :2],
        "prompt_mask": mask[:, :2],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": padded(old),
        "ref_per_token_logps": padded(frozen),
        "num_items_in_batch": mask.sum(),
    }
    return trainer._compute_loss(None, inputs)


def our_loss(new, old, frozen, advantages, aggregation, settings):
    weights = token_weights(LENGTHS, aggregation) / weight_total(LENGTHS, aggregation, MAX_TOKENS)
    loss = grpo_token_loss(new, old, advantages[ROW], ROW, settings, frozen)
    return (weights[ROW] * loss).sum()


@pytest.mark.parametrize("aggregation", OF_TRL)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("eps_high", [0.2, 0.28])
def test_loss_and_gradient_equal_trls(aggregation, ratio, kl_weight, eps_high):
    settings = GRPOSettings(eps_low=0.2, eps_high=eps_high, ratio=ratio, kl_weight=kl_weight)
    new, *others = tensors()
    theirs = trl_loss(new, *others, aggregation, settings)
    (their_gradient,) = torch.autograd.grad(theirs, new)
    ours = our_loss(new, *others, aggregation, settings)
    (our_gradient,) = torch.autograd.grad(ours, new)
    assert theirs.abs() > 1e-3
    assert (ours - theirs).abs() < 1e-6
    assert their_gradient.abs().max() > 1e-3
    assert (our_gradient - their_gradient).abs().max() < 1e-6


def test_the_oracle_sees_clipped_tokens_on_both_sides():
    """Otherwise the comparison above would say nothing of the clipping."""
    new, old, _, advantages = tensors()
    below, above = is_clipped(policy_ratio(new, old, ROW), advantages[ROW], 0.8, 1.2)
    assert below.sum() >= 3 and above.sum() >= 3


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.5, 2.0, -2.4),  # clipped at 1.2
        (1.5, -2.0, 3.0),  # a bad sample made likelier is not clipped
        (0.5, 2.0, -1.0),
        (0.5, -2.0, 1.6),  # clipped at .8
        (1.1, 2.0, -2.2),
    ],
)
def test_clipped_loss_by_hand(ratio, advantage, loss):
    ratio = torch.tensor([ratio], requires_grad=True)
    found = clipped_loss(ratio, torch.tensor([advantage]), 0.8, 1.2)
    assert found.item() == pytest.approx(loss)
    found.sum().backward()
    below, above = is_clipped(ratio.detach(), torch.tensor([advantage]), 0.8, 1.2)
    assert (ratio.grad.item() == 0) == bool(below | above)


def test_a_rows_ratio_is_the_geometric_mean_of_its_tokens():
    new, old, *_ = tensors()
    ratio = policy_ratio(new, old, ROW, "sequence")
    for number, (mine, before) in enumerate(
        zip(new.split(LENGTHS.tolist()), old.split(LENGTHS.tolist()), strict=True)
    ):
        expected = (mine - before).exp().prod() ** (1 / len(mine))
        torch.testing.assert_close(ratio[number == ROW], expected.expand(len(mine)))
    assert mean_by_row(torch.ones(len(ROW)), ROW).tolist() == [1.0] * len(ROW)


@pytest.mark.parametrize("aggregation", OF_TRL)
def test_a_row_left_out_has_no_weight_and_only_the_mean_over_tokens_forgets_it(aggregation):
    lengths = LENGTHS.clone()
    lengths[1] = 0
    weights = token_weights(lengths, aggregation)
    assert weights[1] == 0 and (weights[[0, 2, 3, 4, 5]] > 0).all()
    whole, rest = (weight_total(part, aggregation, 9) for part in (LENGTHS, lengths))
    assert whole - rest == (7 if aggregation == "tokens" else 0)


def test_far_apart_policies_give_a_finite_loss_and_gradient():
    new = torch.tensor([0.0, -400.0], requires_grad=True)
    loss = grpo_token_loss(
        new,
        torch.tensor([-400.0, 0.0]),
        torch.tensor([-1.0, 1.0]),
        torch.tensor([0, 1]),
        GRPOSettings(kl_weight=1.0),
        torch.tensor([-400.0, 0.0]),
    )
    loss.sum().backward()
    assert loss.isfinite().all() and new.grad.isfinite().all()


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="aggregation must be one of completions, tokens, max_tok"):
        token_weights(LENGTHS, "rows")
