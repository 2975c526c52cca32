"""DPO and its kin against TRL's own loss."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from grao_lightning.objectives.dpo import DPOSettings, dpo_loss

CHOSEN, REJECTED = torch.tensor([3, 7, 1, 5]), torch.tensor([4, 2, 6, 5])
LENGTHS = torch.cat([CHOSEN, REJECTED])
ROW = torch.arange(8).repeat_interleave(LENGTHS)


def tensors():
    torch.manual_seed(0)
    new = -torch.rand(int(LENGTHS.sum())).double() * 3
    return new.requires_grad_(), new.detach() + torch.randn(len(new)).double()


def trl_loss(new, frozen, lengths, kind, beta, label_smoothing=0.0):
    """Return what DPOTrainer._compute_loss says of the same tokens."""
    from trl import DPOTrainer

    def padded(flat):  # a leading column for the first token, which nothing predicts
        rows = [torch.cat([part.new_zeros(1), part]) for part in flat.split(lengths.tolist())]
        return pad_sequence(rows, batch_first=True)

    def answers(flat):
        logprobs = padded(flat)[:, 1:]
        logged = {"entropy": logprobs, "mean_logits": logprobs, "is_top1": logprobs > -1}
        return SimpleNamespace(log_probs=logprobs, **logged)

    class Model(torch.nn.Module):
        is_gradient_checkpointing = False

        def forward(self, **_):
            return answers(new)

    trainer = DPOTrainer.__new__(DPOTrainer)
    ones = padded(torch.ones(int(lengths.sum())))
    attributes = {
        "accelerator": SimpleNamespace(
            device="cpu",
            gather_for_metrics=lambda value: value,
            gather=lambda value: value,
            reduce=lambda value, reduction: value,
        ),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False),
        "model": Model(),
        "ref_model": lambda **_: answers(frozen),
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": False,
        "f_divergence_type": "reverse_kl",
        "loss_types": [kind],
        "loss_weights": [1.0],
        "use_weighting": False,
        "beta": beta,
        "label_smoothing": label_smoothing,
    }
    for name, value in attributes.items():
        object.__setattr__(trainer, name, value)
    inputs = {
        "input_ids": ones.long(),
        "attention_mask": ones.long(),
        "completion_mask": ones.long(),
    }

    return trainer._compute_loss(trainer.model, inputs, return_outputs=False)


def our_loss(new, frozen, settings):
    sums = new.new_zeros(8).index_add(0, ROW, new - frozen)
    return dpo_loss(sums[:4], sums[4:], CHOSEN, REJECTED, settings).mean()


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_loss_and_gradient_equal_trls(kind, beta):
    settings = DPOSettings(kind, beta)
    new, frozen = tensors()
    theirs = trl_loss(new, frozen, LENGTHS, kind, beta)
    (their_gradient,) = torch.autograd.grad(theirs, new)
    ours = our_loss(new, frozen, settings)
    (our_gradient,) = torch.autograd.grad(ours, new)
    assert (ours - theirs).abs() < 1e-6
    assert their_gradient.abs().max() > 1e-3
    assert (our_gradient - their_gradient).abs().max() < 1e-6


def test_label_smoothing_equals_trls_aot_on_a_single_pair():
    """AOT sorts log-ratios over pairs and then smooths: on one pair it is smoothed DPO."""
    new, frozen = tensors()
    for pair in range(4):
        mine = (pair == ROW) | (4 + pair == ROW)
        lengths = LENGTHS[[pair, 4 + pair]]
        theirs = trl_loss(new[mine], frozen[mine], lengths, "aot", 0.5, 0.1)
        sums = [(new - frozen)[at == ROW].sum()[None] for at in (pair, 4 + pair)]
        ours = dpo_loss(*sums, *lengths[:, None], DPOSettings("sigmoid", 0.5, 0.1))
        assert (ours - theirs).abs() < 1e-6


def test_the_oracle_has_hinge_pairs_on_both_sides():
    """Otherwise the comparison above would say nothing of the hinge's corner."""
    new, frozen = tensors()
    sums = new.new_zeros(8).index_add(0, ROW, new - frozen)
    margins = 0.7 * (sums[:4] - sums[4:])
    assert (margins > 1).any() and (margins < 1).any()
