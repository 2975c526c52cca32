"""Drift and the outward mask."""

import math

import pytest
import torch

from grao_lightning.objectives.clipping import capped_norm, outward_mask, token_drift


def test_drift_equals_the_k3_form_by_hand_and_is_never_negative():
    logprobs = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.double)
    frozen = torch.tensor([-1.0, -1.5, -0.5], dtype=torch.double)
    expected = [0.0, math.exp(-0.5) + 0.5 - 1, math.exp(0.5) - 0.5 - 1]
    assert token_drift(logprobs, frozen).tolist() == pytest.approx(expected, abs=1e-12)
    assert (token_drift(torch.randn(1000), torch.randn(1000)) >= 0).all()


def test_mean_drift_over_the_policys_samples_estimates_its_kl_to_the_reference_model():
    torch.manual_seed(0)
    policy = torch.distributions.Categorical(logits=torch.tensor([1.0, 0.0, -1.0]).double())
    frozen = torch.distributions.Categorical(logits=torch.tensor([0.0, 0.5, 0.0]).double())
    samples = policy.sample((200_000,))
    drift = token_drift(policy.log_prob(samples), frozen.log_prob(samples)).mean()
    expected = torch.distributions.kl_divergence(policy, frozen)
    torch.testing.assert_close(drift, expected, rtol=0.02, atol=0)  # 1 % standard error


def test_drift_stays_finite_however_far_the_models_are_apart():
    assert token_drift(torch.tensor([-200.0]), torch.tensor([0.0])).isfinite().all()


@pytest.mark.parametrize(
    ("ratio", "coefficient", "counts"),
    [
        (0.1, -1.0, False),  # already below 0.2 and pushed down
        (0.1, +1.0, True),  # pushed back in
        (0.3, -1.0, True),
        (6.0, +1.0, False),  # already above 5 and pushed up
        (6.0, -1.0, True),
        (4.0, +1.0, True),
        (0.1, 0.0, True),
    ],
)
def test_only_tokens_pushed_further_out_are_dropped(ratio, coefficient, counts):
    mask = outward_mask(
        torch.tensor([math.log(ratio)]),
        torch.tensor([0.0]),
        torch.tensor([coefficient]),
        low=0.2,
        high=5.0,
    )
    assert mask.item() is counts


def test_the_cap_falls_in_proportion_only_beyond_the_drift_target():
    assert capped_norm(1.0, 0.4, None) == 1.0
    assert capped_norm(1.0, 0.05, 0.1) == 1.0
    assert capped_norm(1.0, 0.4, 0.1) == pytest.approx(0.25)
    assert capped_norm(1.0, math.nan, 0.1) == 1.0
