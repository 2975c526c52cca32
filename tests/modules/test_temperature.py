"""At which temperature log-probabilities are trained, and which ones make no sense."""

import warnings

import pytest

from grao_lightning import DPOModule, GRAOModule, GRPOModule, PPOModule, SFTModule
from grao_lightning.faults import UserError
from grao_lightning.modules import base
from tests.runs import fit, stages

SMALL = {"policy": "embedded:keywords-weak", "micro_batch_tokens": 256}


def trained_at(tmp_path, monkeypatch, module, **sampling):
    """Return the temperatures of a step's log-probabilities."""
    found = set()
    token_logprobs = base.token_logprobs

    def noted(*arguments, temperature, **options):
        found.add(temperature)
        return token_logprobs(*arguments, temperature=temperature, **options)

    monkeypatch.setattr(base, "token_logprobs", noted)
    scoring = {"comparison": "raw"}
    fit(tmp_path, module=module, callbacks=stages(sampling, scoring), max_steps=1)
    return found


@pytest.mark.parametrize(
    ("method", "expected"), [(GRPOModule, 0.5), (PPOModule, 0.5), (GRAOModule, 1.0)]
)
def test_a_ratio_is_to_the_policy_that_sampled(method, expected, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*did not sample")
        found = trained_at(tmp_path, monkeypatch, method(**SMALL), temperature=0.5)
    assert found == {expected}


def test_a_ratio_to_a_policy_that_did_not_sample_is_warned_of(tmp_path, monkeypatch):
    module = GRPOModule(**SMALL, logprob_temperature=1.0)
    with pytest.warns(
        UserWarning, match=r"logprob_temperature=1.0 is not sampling.temperature=0.5"
    ):
        assert trained_at(tmp_path, monkeypatch, module, temperature=0.5) == {1.0}


@pytest.mark.parametrize("method", [GRAOModule, GRPOModule, PPOModule])
def test_groups_of_one_completion_many_times_are_refused(method, tmp_path):
    with pytest.raises(UserError, match=r"sampling.temperature must be > 0 where groups .* got 0"):
        fit(tmp_path, module=method(**SMALL), callbacks=stages({"temperature": 0}))


@pytest.mark.parametrize("method", [SFTModule, DPOModule])
def test_methods_without_groups_may_validate_greedily(method, tmp_path):
    fit(tmp_path, module=method(**SMALL), callbacks=stages({"temperature": 0}), max_steps=1)
