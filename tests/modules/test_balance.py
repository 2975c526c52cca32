"""The loss that balances experts: transformers' own, whatever the split, in every method."""

import logging
from copy import deepcopy

import pytest
import torch

from grao_lightning import (
    DPOModule,
    GRAOModule,
    GRPOModule,
    PPOModule,
    RewardModule,
    SFTModule,
)
from grao_lightning.batch import TokenRow
from grao_lightning.faults import UserError
from grao_lightning.language_model.logprobs import row_routing, token_logprobs
from grao_lightning.language_model.routing import prompt_shares
from grao_lightning.language_model.sharing import share_prompts
from grao_lightning.modules.balance import RouterBalance
from grao_lightning.objectives.balance import Routing, load_balancing_loss
from tests.conftest import tiny_model
from tests.language_model.architectures import build
from tests.language_model.test_architectures import ROWS
from tests.mixtures import mixture
from tests.runs import fit, two_ranks

FAMILIES = ["qwen3_moe", "mixtral"]


def double(family, **options):
    model = build(family, **options).double()
    model.set_experts_implementation("eager")
    return model


def gates(model):
    return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "gate.w" in n])


def balanced(model, rows, micro_batches, weight=1.0):
    """Add the loss of rows to the gradients and return its value and the gates' gradient."""
    balance = RouterBalance(
        weight, rows, micro_batches, lambda *part: row_routing(model, *part), lambda sums: sums
    )
    for numbers in micro_batches:
        chosen = [rows[number] for number in numbers]
        balance.loss(
            token_logprobs(model, chosen, shares=balance.shares(numbers)).routing
        ).backward()
    return balance.value, gates(model)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_rows_of_different_prompts_it_is_the_loss_of_transformers(family, shared):
    rows = [TokenRow([5, 6, 7], [8, 9, 10, 11]), TokenRow([20], [21, 22]), TokenRow([30, 31], [3])]
    alone, model = double(family), double(family)
    assert not shared or share_prompts(model)
    ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    for number, row in enumerate(rows):
        text = torch.tensor((row.prompt_ids + row.answer_ids)[:-1])  # the last predicts nothing
        ids[number, : len(text)], mask[number, : len(text)] = text, 1
    expected = alone(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    expected.backward()
    value, gradient = balanced(model, rows, [[0, 2], [1]])
    torch.testing.assert_close(value.float(), expected.detach().float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, gates(alone), rtol=1e-5, atol=1e-9)


SPLITS = [
    [[*range(len(ROWS))]],
    [[number] for number in range(len(ROWS))],
    [[*range(1, 12)], [0, *range(12, len(ROWS))]],
]


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_the_split_nor_the_layout_changes_it(family):
    """Every prompt counts once, in whatever passes its answers are read."""
    fresh = double(family)
    found = []
    for shared in (True, False):
        for micro_batches in SPLITS:
            model = deepcopy(fresh)
            assert not shared or share_prompts(model)
            found.append(balanced(model, ROWS, micro_batches))
    (value, gradient), *others = found
    tokens = sum(len(row.answer_ids) - 1 for row in ROWS)
    tokens += sum(map(len, {tuple(row.prompt_ids) for row in ROWS}))
    total = row_routing(fresh, ROWS, prompt_shares(ROWS)).total
    assert total.item() == pytest.approx(tokens * fresh.config.num_hidden_layers)
    for other, its_gradient in others:
        torch.testing.assert_close(other, value, rtol=1e-6, atol=0)
        assert (its_gradient - gradient).norm() < 1e-6 * gradient.norm()


def test_checkpointed_layers_give_its_gradient_too():
    plain, checkpointed = double("qwen3_moe"), double("qwen3_moe")
    assert share_prompts(plain) and share_prompts(checkpointed)
    checkpointed.train().gradient_checkpointing_enable({"use_reentrant": False})
    (_, expected), (_, found) = (balanced(m, ROWS, SPLITS[2]) for m in (plain, checkpointed))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_the_loss_by_hand():
    """Two experts, three tokens, one expert each: 2 * (2/3 * 1.5/3 + 1/3 * 1.5/3) = 1."""
    whole = Routing(torch.tensor([2.0, 1.0]), torch.tensor([1.5, 1.5]), torch.tensor(3.0))
    assert load_balancing_loss(whole, whole).item() == pytest.approx(1.0)
    leaning = Routing(torch.tensor([3.0, 0.0]), torch.tensor([2.4, 0.6]), torch.tensor(3.0))
    assert load_balancing_loss(leaning, leaning).item() == pytest.approx(1.6)


METHODS = {
    "GRAO": (GRAOModule, {}),
    "GRPO": (GRPOModule, {"updates_per_rollout": 2}),
    "PPO": (PPOModule, {"updates_per_rollout": 2}),
    "DPO": (DPOModule, {}),
    "SFT": (SFTModule, {}),
    "reward model": (RewardModule, {}),
}


def settings(method, **options):
    """Return a module of a mixture in float64."""
    given = mixture("qwen3_moe")
    if method is RewardModule:
        from transformers import AutoModelForSequenceClassification

        given["policy"].config.num_labels = 1
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(given["policy"].config)
        model.base_model.load_state_dict(given["policy"].model.state_dict())
        given = {"backbone": model, "tokenizer": given["tokenizer"]}
    next(iter(given.values())).set_experts_implementation("eager")
    return method(**given, learning_rate=1e-3, **options)


@pytest.mark.parametrize("name", METHODS)
def test_it_enters_every_method_whatever_the_micro_batches(tmp_path, name):
    method, options = METHODS[name]
    found = []
    for more in ({"micro_batch_tokens": 60}, {}, {"router_loss": None}):
        module = settings(method, **{"router_loss": 1.0, **options, **more})
        found.append(fit(tmp_path, module=module, max_steps=1, precision="64-true").step_values)
    split, whole, without = found
    assert 1.0 < whole["router_loss"] < 4.0  # 2 experts a token: even is 2
    assert split["router_loss"] == pytest.approx(whole["router_loss"], rel=1e-6)
    assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
    assert abs(whole["grad_norm"] - without["grad_norm"]) > 1e-3 * without["grad_norm"]
    assert "router_loss" not in without
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    if "updates_per_rollout" not in options:  # else the second update starts elsewhere
        assert split["loss"] == pytest.approx(without["loss"], rel=1e-5)  # stands beside it


def test_two_processes_balance_as_one_does(tmp_path):
    given = mixture("qwen3_moe")
    for part in given.values():
        part.save_pretrained(tmp_path / "model")
    model = {"policy": str(tmp_path / "model"), "router_loss": 1.0, "micro_batch_tokens": 60}
    alone = fit(tmp_path, module=SFTModule(**model), max_steps=1).step_values
    run = {"method": "SFTModule", "model": model, "precision": "32-true", "max_steps": 1}
    found = two_ranks(tmp_path, {}, {}, run)
    assert found["apart"] == 0.0
    assert found["values"]["router_loss"] == pytest.approx(alone["router_loss"], rel=1e-5)
    assert found["norms"][0] == pytest.approx(alone["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("deepseek_v3", "balanced by a bias .e_score_correction_bias., which is not trained"),
        ("llama", "transformers has no such loss for it"),
    ],
)
def test_a_model_without_such_a_loss_is_refused_with_the_reason(tmp_path, family, reason):
    given = mixture(family) if family != "llama" else {"policy": tiny_model("Llama")}
    given.setdefault("tokenizer", mixture("mixtral")["tokenizer"])
    with pytest.raises(UserError, match=f"model.router_loss must be null for .*{reason}; got 0.1"):
        fit(tmp_path, module=SFTModule(**given, router_loss=0.1), max_steps=0)


def test_a_weight_of_zero_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model.router_loss must be > 0 or null; got 0"):
        fit(tmp_path, module=SFTModule(router_loss=0.0))


@pytest.mark.parametrize("sharing", [True, False])
def test_a_loss_that_is_left_out_is_said_once_and_gives_no_logits(tmp_path, caplog, sharing):
    module = SFTModule(**mixture("mixtral", output_router_logits=True), share_prompts=sharing)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, module=module, max_steps=0)
    assert caplog.text.count("router_aux_loss_coef=0.001): model.router_loss=0.001 adds it") == 1
    assert module.policy.config.output_router_logits is False
