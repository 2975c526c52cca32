"""What must hold of every method: splits, ranks, resume, updates, refusals."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from grao_lightning import DPOModule, GRPOModule, PPOModule
from grao_lightning.data.example import Example
from grao_lightning.faults import UserError
from grao_lightning.objectives.dpo import DPOSettings, dpo_loss
from tests.runs import fit, largest_difference, stages, trainer, two_ranks, weights

METHODS = {
    "grpo": (GRPOModule, {"updates_per_rollout": 2, "kl_weight": 0.05}),
    "grpo by sequence": (GRPOModule, {"updates_per_rollout": 2, "ratio": "sequence"}),
    "ppo": (PPOModule, {"updates_per_rollout": 2, "kl_weight": 0.05, "kl_target": 0.5}),
    "dpo": (DPOModule, {}),
    "ipo": (DPOModule, {"kind": "ipo"}),
}
every_method = pytest.mark.parametrize("method", METHODS)


def made(method: str, **options):
    kind, settings = METHODS[method]
    return kind(
        **{"policy": "embedded:keywords-weak", "learning_rate": 1e-3, **settings, **options}
    )


class Norms(Callback):
    """Keeps the gradient norm of every update."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.values.append(torch.nn.utils.get_total_norm(gradients).item())


def run(folder: Path, module, **options):
    norms = Norms()
    module = fit(folder, module=module, callbacks=[*stages(), norms], **options)
    return module, norms.values


@every_method
@pytest.mark.parametrize("share_prompts", [True, False], ids=["packed", "padded"])
def test_the_split_into_micro_batches_changes_neither_norms_nor_weights(
    tmp_path, method, share_prompts
):
    options = {"precision": "64-true"}
    whole, norms = run(tmp_path, made(method, share_prompts=share_prompts), **options)
    small = made(method, share_prompts=share_prompts, micro_batch_tokens=30)
    parts, norms_of_parts = run(tmp_path, small, **options)
    assert min(norms) > 1e-3
    assert norms == pytest.approx(norms_of_parts, rel=1e-6)
    assert largest_difference(weights(whole), weights(parts)) < 1e-6


@every_method
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, method):
    whole = fit(tmp_path, module=made(method), max_steps=6)
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, filename="three")
    options = {"callbacks": [*stages(), saver], "enable_checkpointing": True}
    fit(tmp_path, module=made(method), max_steps=3, **options)
    checkpoint = str(tmp_path / "saved/three.ckpt")
    resumed = fit(tmp_path, module=made(method), max_steps=6, ckpt_path=checkpoint)
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert getattr(whole, "kl_weight", 0) == getattr(resumed, "kl_weight", 0)
    assert whole.step_values["loss"] == resumed.step_values["loss"]


@every_method
def test_two_processes_take_the_step_of_one(tmp_path, method):
    """Same norms and weights, also where a rank has no signal; in float64."""
    kind, settings = METHODS[method]
    options = {**settings, "learning_rate": 1e-4}
    data = {"prompts_per_step": 2}  # one a rank: some groups have only ties
    one = fit(tmp_path, module=made(method, **options), data=data, precision="64-true")
    run = {"precision": "64-true", "method": kind.__name__, "model": options}
    both = two_ranks(tmp_path, data, {}, run)
    assert both["apart"] == 0.0
    assert one.trainer.global_step == both["steps"] == 3
    assert both["kl_weight"] == pytest.approx(getattr(one, "kl_weight", None))
    assert largest_difference(weights(one), torch.load(tmp_path / "weights.pt")) < 1e-6
    alone, together = (
        {name: value for name, value in values.items() if not re.search("perf|time", name)}
        for values in (one.step_values, both["values"])
    )
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_each_update_moves_the_optimiser_and_only_rollouts_are_counted(tmp_path, method):
    module, norms = run(tmp_path, made(method, updates_per_rollout=3), max_steps=2)
    assert module.trainer.global_step == 2
    assert len(norms) == 6
    states = module.trainer.optimizers[0].state_dict()["state"].values()
    assert {int(state["step"]) for state in states} == {6}


def test_the_first_update_clips_nothing_and_later_ones_do(tmp_path):
    for updates, clipped in ((1, False), (4, True)):
        module = made("grpo", updates_per_rollout=updates, learning_rate=5e-3)
        module, _ = run(tmp_path, module, max_steps=1)
        sides = [module.step_values[f"clip_ratio/{side}_mean"] for side in ("low", "high")]
        assert [side > 0 for side in sides] == [clipped, clipped]


@every_method
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_step_is_taken_in_every_precision(tmp_path, method, precision):
    before = weights(fit(tmp_path, module=made(method), max_steps=0, precision=precision))
    module = made(method, learning_rate=1e-2)
    after = weights(fit(tmp_path, module=module, max_steps=1, precision=precision))
    assert largest_difference(before, after) > 1e-4
    assert all(value.isfinite().all() for value in after.values())


class Grab(Callback):
    """Keeps the batch, the weights before it and the gradients."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batch = batch
        self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        named = pl_module.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def one_step(folder: Path, module):
    """Return the module after a step, and what `Grab` kept of it."""
    grab = Grab()
    callbacks = [*stages(clipping={"max_norm": 1e9}), grab]
    fit(folder, module=module, callbacks=callbacks, max_steps=1, precision="64-true")
    module.load_state_dict(grab.before)
    module.zero_grad()
    return module, grab


def naive_logprobs(model, row, states=False):
    """Return the answer tokens' log-probabilities (and states) by the plain model, one row."""
    ids = torch.tensor([row.prompt_ids + row.answer_ids])
    output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    first = len(row.prompt_ids)
    everyone = output.logits[0, first - 1 : -1].log_softmax(dim=-1)
    logprobs = everyone.gather(1, ids[0, first:, None])[:, 0]
    return (logprobs, output.hidden_states[-1][0, first - 1 : -1]) if states else logprobs


def assert_same_gradients(module, gradients) -> None:
    named = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert named.keys() == gradients.keys()
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3
    for name, gradient in named.items():
        # Norms are computed in float32 whatever the precision.
        torch.testing.assert_close(gradients[name], gradient, atol=1e-7, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_dpo_takes_the_gradient_of_its_loss_on_plain_logits(tmp_path, kind):
    module, grab = one_step(tmp_path, DPOModule(policy="embedded:keywords", kind=kind, beta=0.3))
    chosen, rejected = grab.batch.reference_answer_rows(), grab.batch.rejected_answer_rows()
    settings, losses = DPOSettings(kind, 0.3), []
    for pair in zip(chosen, rejected, strict=True):
        ratios = [
            (
                naive_logprobs(module.policy, row)
                - naive_logprobs(module.reference_model.model, row)
            ).sum()
            for row in pair
        ]
        lengths = [torch.tensor(len(row.answer_ids)) for row in pair]
        losses.append(dpo_loss(*ratios, *lengths, settings))
    torch.stack(losses).mean().backward()
    assert_same_gradients(module, grab.gradients)


def test_ppo_takes_the_gradient_written_out_token_by_token(tmp_path):
    """First update: ratios are 1 and values the old ones, so their bounds do not bind."""
    settings = {"kl_weight": 0.05, "value_weight": 0.7, "discount": 0.9, "trace": 0.8}
    module = PPOModule(policy="embedded:keywords-weak", logprob_temperature=1.0, **settings)
    module, grab = one_step(tmp_path, module)
    scores = grab.batch.compared[:, :-1].flatten()
    advantages, returns, logprobs, values = [], [], [], []
    for row, score in zip(grab.batch.completion_rows(), scores, strict=True):
        own, states = naive_logprobs(module.policy, row, states=True)
        frozen = naive_logprobs(module.reference_model.model, row).detach()
        value = module.value_head(states)[:, 0]
        reward = -0.05 * (own.detach() - frozen)
        reward[-1] += score
        following, row_advantages = 0.0, []
        for t in reversed(range(len(own))):
            ahead = value[t + 1].item() if t + 1 < len(own) else 0.0
            following = reward[t].item() + 0.9 * ahead - value[t].item() + 0.9 * 0.8 * following
            row_advantages.insert(0, following)
        advantages.append(torch.tensor(row_advantages).double())
        returns.append(advantages[-1] + value.detach())
        logprobs.append(own)
        values.append(value)
    flat = torch.cat(advantages)
    whitened = (flat - flat.mean()) / flat.std(correction=0)
    policy_loss = -(whitened * torch.cat(logprobs)).mean()
    value_loss = 0.5 * (torch.cat(values) - torch.cat(returns)).square().mean()
    (policy_loss + 0.7 * value_loss).backward()
    assert_same_gradients(module, grab.gradients)


def test_ppo_leaves_out_completions_without_a_score(tmp_path):
    class Missing(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            batch.compared[0, :2] = torch.nan

    callbacks = [*stages(), Missing()]
    module = fit(tmp_path, module=made("ppo"), callbacks=callbacks, max_steps=2)
    assert all(value.isfinite().all() for value in weights(module).values())


def test_the_kl_weight_of_ppo_rises_above_its_target_and_falls_below(tmp_path):
    near, _ = run(tmp_path, made("ppo", kl_target=100.0, kl_horizon=100))
    far, _ = run(tmp_path, made("ppo", kl_target=1e-6, kl_horizon=100))
    assert near.kl_weight < 0.05 < far.kl_weight


def test_dpo_reads_the_reference_model_once_a_pair(tmp_path, monkeypatch):
    from grao_lightning.modules import dpo

    calls = []
    original = dpo.frozen_logprobs

    def counted(model, rows, *arguments, **options):
        calls.append(rows)
        return original(model, rows, *arguments, **options)

    monkeypatch.setattr(dpo, "frozen_logprobs", counted)

    class FewRows(Callback):
        def on_fit_start(self, trainer, pl_module) -> None:
            trainer.datamodule.examples["train"] = trainer.datamodule.examples["train"][:8]

    fit(tmp_path, module=made("dpo"), callbacks=[*stages(), FewRows()], max_steps=4)
    assert len(calls) == 8


@pytest.mark.parametrize(
    ("module", "clipping", "message"),
    [
        (made("grpo", eps_low=2.0), {}, "model.eps_low must"),
        (made("grpo", reference_model=None), {}, "model.kl_weight needs a reference model"),
        (made("grpo"), {"drift_every": 2}, "model.kl_weight needs clipping.drift_every=1; got 2"),
        (made("grpo"), {"outward_mask": True}, "clipping.outward_mask works on GRAOModule alone"),
        (made("ppo", kl_weight=0.0), {}, "model.kl_target must be > 0 and needs a model.kl_weight"),
        (made("ppo", trace=1.5), {}, "model.trace must"),
        (made("dpo", reference_model=None), {}, "model.reference_model must be policy or a model"),
        (made("ipo", label_smoothing=0.1), {}, "model.label_smoothing needs model.kind=sigmoid"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, module, clipping, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, module=module, callbacks=stages(clipping=clipping))


def test_dpo_refuses_rows_without_a_rejected_answer(tmp_path):
    from grao_lightning import PromptDataModule

    data = PromptDataModule()
    data.examples["train"] = [
        Example("apple", reference_answer="apple", rejected_answer=None, columns={"keywords": "a"})
    ] * 9
    run = trainer(tmp_path, callbacks=stages())
    with pytest.raises(UserError, match="9 of 9 rows have none: use preference data"):
        run.fit(made("dpo"), datamodule=data)


def test_grpo_takes_no_gradient_from_completions_cut_off_where_it_shall_not(tmp_path):
    """The gradient is that of the others alone, divided by the tokens of the others."""
    options = {"aggregation": "tokens", "mask_truncated_completions": True, "weight_decay": 0.0}
    module = GRPOModule(policy="embedded:keywords-weak", **options)
    grab = Grab()
    sampling = {"max_new_tokens": 7, "temperature": 1.0}
    callbacks = [*stages(sampling, clipping={"max_norm": 1e9}), grab]
    fit(tmp_path, module=module, callbacks=callbacks, max_steps=1, precision="64-true")
    batch = grab.batch
    assert batch.completions.max_tokens == 7
    cut = batch.completions.truncated
    assert 0 < sum(cut) < len(cut)
    module.load_state_dict(grab.before)
    module.zero_grad()
    advantages = batch.advantages[:, :-1].flatten()
    whole = [number for number, is_cut in enumerate(cut) if not is_cut]
    assert any(advantages[number] != 0 for number in whole)
    rows = batch.completion_rows()
    total = sum(len(rows[number].answer_ids) for number in whole)
    loss = -sum(
        advantages[number] * naive_logprobs(module.policy, rows[number]).sum() for number in whole
    )
    (loss / total).backward()
    assert_same_gradients(module, grab.gradients)


def test_updates_of_a_rollout_follow_the_loss_of_the_policy_that_sampled(tmp_path):
    """Two updates at a rate of 0 see the same policy: the same gradient twice, ratios of 1."""
    norms = Norms()
    module = made("ppo", updates_per_rollout=2, learning_rate=0.0, weight_decay=0.0)
    fit(tmp_path, module=module, callbacks=[*stages(), norms], max_steps=1, precision="64-true")
    assert norms.values[0] == pytest.approx(norms.values[1], rel=1e-9) and norms.values[0] > 1e-3


@pytest.mark.parametrize("bound", [None, 0.2])
def test_a_value_that_moved_beyond_its_bound_teaches_the_head_no_more(tmp_path, bound):
    """With a head that moves far in one update, the second one's value loss has no gradient."""
    heads = []

    class Record(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            heads.append(pl_module.value_head.bias.grad.abs().item())

    class FarReturns(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            batch.compared = torch.full_like(batch.compared, 50.0)

    module = PPOModule(
        policy="embedded:keywords-weak",
        learning_rate=0.5,
        updates_per_rollout=2,
        value_clip=bound,
        trace=1.0,
    )
    callbacks = [*stages(clipping={"max_norm": 1e9}), FarReturns(), Record()]
    fit(tmp_path, module=module, callbacks=callbacks, max_steps=1)
    assert heads[0] > 1.0
    # The value, up by .5 or more, is beyond the bound and on the way to the return: only the other,
    # unclipped error is larger where it overshot, which 50 is too far away for.
    assert (heads[1] > 1.0) == (bound is None)


def test_clipped_shares_are_those_of_the_ratio_that_clips(tmp_path, monkeypatch):
    """By sequence a token is clipped as its whole completion is: all of its tokens or none."""
    from grao_lightning.modules.rollout import RolloutModule

    seen = []
    original = RolloutModule.note_clipped

    def recorded(self, batch, ratio, advantages):
        seen.append((ratio.detach(), advantages))
        original(self, batch, ratio, advantages)

    monkeypatch.setattr(RolloutModule, "note_clipped", recorded)
    run(tmp_path, made("grpo by sequence", learning_rate=5e-3), max_steps=1)
    ratios = torch.cat([ratio for ratio, _ in seen[len(seen) // 2 :]])  # the second update's
    assert (ratios != 1).any()
    assert len(ratios.unique()) <= 32, "one a completion"
