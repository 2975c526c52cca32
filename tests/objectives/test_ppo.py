"""PPO: advantages against torchrl's, losses against arithmetic by hand."""

import pytest
import torch

from grao_lightning.objectives.ppo import (
    adapted_kl_weight,
    clipped_value_loss,
    generalized_advantages,
    token_rewards,
)

LENGTHS = torch.tensor([5, 1, 3, 4])
MASK = torch.arange(5) < LENGTHS[:, None]


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_advantages_equal_torchrls(discount, trace):
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    torch.manual_seed(0)
    rewards, values = torch.randn(2, 4, 5).double()
    found = generalized_advantages(rewards, values, MASK, discount=discount, trace=trace)
    for row, length in enumerate(LENGTHS.tolist()):
        own, reward = values[row, :length, None], rewards[row, :length, None]
        following = torch.cat([own[1:], torch.full((1, 1), 7.0)])  # behind the end: never read
        done = torch.zeros(length, 1, dtype=torch.bool)
        done[-1] = True
        expected, returns = generalized_advantage_estimate(
            discount, trace, own, following, reward, done
        )
        torch.testing.assert_close(found[row, :length], expected[:, 0])
        torch.testing.assert_close(found[row, :length] + own[:, 0], returns[:, 0])
        assert (found[row, length:] == 0).all()


def test_padding_never_reaches_an_advantage():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 4, 5).double()
    clean = generalized_advantages(rewards, values, MASK, discount=0.9, trace=0.9)
    dirty = [part.where(MASK, torch.tensor(1e9, dtype=torch.double)) for part in (rewards, values)]
    assert torch.equal(clean, generalized_advantages(*dirty, MASK, discount=0.9, trace=0.9))


def test_the_score_stands_on_the_last_token_and_drift_costs_on_every_one():
    scores, drift = torch.tensor([1.0, -1.0]), torch.tensor([[0.5, 2.0, 9.0], [1.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rewards = token_rewards(scores, drift, mask, kl_weight=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.8, 0.0], [-1.1, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        (0.5, 0.4, 1.0, 0.125, -0.5),  # near the old value: half the squared error
        (0.9, 0.0, 1.0, 0.32, 0.0),  # moved too far towards the target: earns no more
        (-0.9, 0.0, 1.0, 1.805, -1.9),  # moved away: the larger, unclipped error
        (1.5, 0.0, 1.0, 0.32, 0.0),  # .5 * max(.25, (.2 - 1)^2)
    ],
)
def test_clipped_value_loss_by_hand(value, old, target, loss, slope):
    values = torch.tensor([value], requires_grad=True)
    found = clipped_value_loss(values, torch.tensor([old]), torch.tensor([target]), clip=0.2)
    assert found.item() == pytest.approx(loss)
    found.sum().backward()
    assert values.grad.item() == pytest.approx(slope, abs=1e-6)


def test_without_a_bound_the_value_loss_is_half_the_squared_error():
    values, returns = torch.tensor([0.9, -2.0]), torch.tensor([1.0, 1.0])
    found = clipped_value_loss(values, torch.zeros(2), returns, clip=None)
    torch.testing.assert_close(found, torch.tensor([0.005, 4.5]))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.1), (6.6, 0.1 * (1 + 0.1 * 0.064)), (60.0, 0.1 * (1 + 0.2 * 0.064)), (0.0, 0.09872)],
)
def test_the_kl_weight_follows_its_bounded_error(kl, expected):
    found = adapted_kl_weight(0.1, kl, target=6.0, num_completions=64, horizon=1000)
    assert found == pytest.approx(expected)
