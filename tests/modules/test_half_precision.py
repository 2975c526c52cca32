"""In half precision a policy is the one that transformers loads in half precision."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from grao_lightning import GRAOModule, PPOModule
from tests.mixtures import mixture
from tests.runs import fit, weights

HALF = {"precision": "bf16-true"}


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_a_policy_in_bf16_gives_the_logits_of_one_that_was_loaded_in_bf16(tmp_path, family):
    given = mixture(family)
    given["policy"].save_pretrained(tmp_path / "model")
    given["tokenizer"].save_pretrained(tmp_path / "model")
    module = fit(tmp_path, module=GRAOModule(policy=str(tmp_path / "model")), max_steps=0, **HALF)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    own, frozen = module.policy.eval(), module.reference_model.model
    ids = torch.arange(100)[None] % 36
    expected = loaded(ids).logits
    types = {name: (p.dtype) for name, p in [*loaded.named_parameters(), *loaded.named_buffers()]}
    assert {torch.bfloat16, torch.float32} == set(types.values())
    for model in (own, frozen):
        found = {n: p.dtype for n, p in [*model.named_parameters(), *model.named_buffers()]}
        assert found == types
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("masters", [False, True], ids=["plain", "masters"])
@pytest.mark.parametrize("method", [GRAOModule, PPOModule])
def test_gates_are_trained_in_float32_beside_weights_in_bf16(tmp_path, method, masters):
    def module():
        return method(**mixture("deepseek_v3"), learning_rate=1e-3, master_weights=masters)

    before = weights(fit(tmp_path, module=module(), max_steps=0, **HALF))
    trained = fit(tmp_path, module=module(), max_steps=2, **HALF)
    after = weights(trained)
    gate, bias = (f"model.layers.1.mlp.gate.{n}" for n in ("weight", "e_score_correction_bias"))
    assert after[gate].dtype == after[bias].dtype == torch.float32
    moved = (after[gate] - before[gate]).abs()
    # Adam's first steps are of the learning rate, which bfloat16 would round to its own grid.
    assert 1e-4 < moved.max() < 3e-3
    assert (after[gate] != after[gate].bfloat16().float()).float().mean() > 0.9
    assert torch.equal(after[bias], before[bias])
    assert after["model.layers.1.mlp.experts.down_proj"].dtype == torch.bfloat16
    (optimizer,) = trained.trainer.optimizers
    moments = [state["exp_avg"] for state in optimizer.state_dict()["state"].values()]
    kinds = {torch.float32} if masters else {torch.float32, torch.bfloat16}
    assert {moment.dtype for moment in moments} == kinds


def test_a_cast_to_double_or_back_reaches_everything(tmp_path):
    module = fit(tmp_path, module=GRAOModule(**mixture("deepseek_v3")), max_steps=0)
    assert {p.dtype for p in module.double().policy.parameters()} == {torch.float64}
    assert {p.dtype for p in module.float().policy.parameters()} == {torch.float32}
