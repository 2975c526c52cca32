"""No update waits for its device: each is run on ``meta``, where nothing can be read."""

import pytest
import torch

from grao_lightning import DPOModule, GRAOModule, GRPOModule, PPOModule, RewardModule, SFTModule
from grao_lightning.language_model import masked
from grao_lightning.language_model.logprobs import frozen_logprobs
from grao_lightning.language_model.ragged import repeated
from tests.host_reads import HostRead, no_host_reads
from tests.runs import fit, stages

OUTWARD = {"outward_mask": True, "drift_target": 0.1}
UPDATES = {
    "grao": (GRAOModule, {}, {}),
    "grao in many passes": (GRAOModule, {"micro_batch_tokens": 60}, {}),
    "grao, rows padded": (GRAOModule, {"share_prompts": False}, {}),
    "grao with drift and outward mask": (GRAOModule, {}, OUTWARD),
    "grao with adapters": (GRAOModule, {"lora": {"rank": 4}}, OUTWARD),
    "grpo with KL, two updates": (GRPOModule, {"kl_weight": 0.05, "updates_per_rollout": 2}, {}),
    "grpo by sequence, two updates": (
        GRPOModule, {"ratio": "sequence", "updates_per_rollout": 2}, {},
    ),
    "ppo with KL, two updates": (
        PPOModule, {"kl_weight": 0.05, "kl_target": 0.5, "updates_per_rollout": 2}, {},
    ),
    "dpo": (DPOModule, {}, {}),
    "ipo in many passes": (DPOModule, {"kind": "ipo", "micro_batch_tokens": 60}, {}),
    "sft": (SFTModule, {}, {}),
    "a reward model": (RewardModule, {}, {}),
    "a reward model in many passes": (RewardModule, {"micro_batch_tokens": 60}, {}),
}  # fmt: skip


class Done(Exception):
    """The update is formed."""


def on_meta(kind):
    """Return a kind of module whose update is formed on ``meta``, once, and then given up.

    What a step reads at its end stays out: the norm, statistics, PPO's drift, DPO's cache.
    """

    class OnMeta(kind):
        def training_step(self, batch, batch_idx):
            self.to("meta")
            if batch.reference_model_logprobs is not None:
                batch.reference_model_logprobs = [
                    part.to("meta") for part in batch.reference_model_logprobs
                ]
            with no_host_reads():
                if kind is not RewardModule and self.reference_model is not None:
                    frozen_logprobs(self.reference_model, self.rows(batch), 100)
                super().training_step(batch, batch_idx)
            assert all(p.grad is not None and p.grad.is_meta for p in self._trained())
            raise Done

        def cpu(self):
            return self  # at the end of a run; nothing can come back

        def update(self):
            pass

        def finish_step(self, batch):
            pass

        def _adapt(self, batch, rollout):
            pass

        def _keep(self, batch, frozen):
            pass

    return OnMeta


def update(folder, name, **more) -> None:
    kind, settings, clipping = UPDATES[name]
    source = kind.source_setting.rpartition(".")[2]
    module = on_meta(kind)(**{source: "embedded:keywords-weak", **settings, **more})
    fit(folder, module=module, callbacks=stages(clipping=clipping), max_steps=1)


@pytest.mark.parametrize("name", UPDATES)
def test_no_update_waits_for_its_device(tmp_path, name, monkeypatch):
    if name == "grao, rows padded":  # transformers reads the positions, once a pass: not ours
        found = "transformers.masking_utils.find_packed_sequence_indices"
        monkeypatch.setattr(found, lambda position_ids: None)
    with pytest.raises(Done):
        update(tmp_path, name)


def test_no_update_waits_for_its_device_where_flex_attention_works(tmp_path, monkeypatch):
    """The mask is made and read as there; in flex_attention's own place, which knows no meta."""
    masks = []

    def flex(query, key, value, block_mask, **options):
        masks.append(block_mask)
        places = torch.arange(query.shape[2], device=query.device)
        none = places[:1]
        mask = block_mask.mask_mod(none, none, places[:, None], places)
        repeats = query.shape[1] // key.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(
            query, repeated(key, repeats), repeated(value, repeats), attn_mask=mask
        )

    monkeypatch.setattr(masked, "flex_works", lambda *_: True)
    monkeypatch.setattr(masked, "_flex", lambda: flex)
    with pytest.raises(Done):
        update(tmp_path, "grao")
    assert masks and all(mask.kv_indices.is_meta and mask.q_indices.is_meta for mask in masks)


NUMBERS = torch.arange(3.0)
READS = {
    "item": lambda x: x.sum().item(),
    "list": lambda x: x.tolist(),
    "copy to the host": lambda x: x.cpu(),
    "boolean index": lambda x: x[x > 1],
    "repeats of unknown number": lambda x: x.repeat_interleave(x.long()),
    "truth": lambda x: bool(x.sum()),
    "list from the host": lambda x: torch.tensor([1.0], device=x.device),
    "copy from the host": lambda x: NUMBERS.to(x.device),
    "index of the host": lambda x: x[torch.tensor([0, 1])],
    "index by a list": lambda x: x[[0, 1]],
    "sum with the host": lambda x: x + NUMBERS,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_waits_for_a_device_is_seen(read):
    with no_host_reads(), pytest.raises((HostRead, RuntimeError, NotImplementedError)):
        read(torch.ones(3, device="meta"))


def test_what_does_not_wait_is_let_through():
    with no_host_reads():
        device = NUMBERS.to("meta", non_blocking=True)
        assert (device[NUMBERS.to("meta", non_blocking=True).long()] + torch.tensor(1.0)).is_meta
        assert NUMBERS.sum().item() == 3.0
