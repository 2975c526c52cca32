"""What validation samples, compares and reports."""

import json

import pytest

from grao_lightning import GRAOModule
from grao_lightning.callbacks.panels import TensorBoardPanels
from grao_lightning.callbacks.sampling import GroupSampling
from grao_lightning.callbacks.summary import RunSummary, summary_table
from grao_lightning.metrics.outcomes import Estimate
from tests.runs import fit, stages

VALIDATED = {"limit_val_batches": 1.0, "val_check_interval": 2, "max_steps": 4}
DATA = {"validation_prompts": 40, "validation_batch_size": 16}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with two validations, its folder, and how often each model sampled."""
    from lightning.pytorch.loggers import TensorBoardLogger

    folder = tmp_path_factory.mktemp("run")
    sampled: list[str] = []

    class Counted(GroupSampling):
        def _sample(self, trainer, pl_module, model, batch, uniforms):
            who = "base" if model is pl_module.reference_model else "policy"
            sampled.append(f"{who} {len(uniforms[0])}")
            return super()._sample(trainer, pl_module, model, batch, uniforms)

    _, *others = stages()
    module = fit(
        folder,
        callbacks=[
            Counted(group_size=4, max_new_tokens=12),
            *others,
            TensorBoardPanels(every_n_steps=2),
            RunSummary(),
        ],
        data=DATA,
        logger=TensorBoardLogger(folder, name=None),
        log_every_n_steps=1,
        **VALIDATED,
    )
    return module, folder / "version_0", sampled


def test_the_base_answers_each_validation_batch_once_and_the_policy_at_every_validation(finished):
    _, _, sampled = finished
    batches = 3  # 40 prompts in batches of 16
    assert sampled.count("base 1") == batches
    assert sampled.count("policy 1") == 2 * batches
    assert sampled.count("policy 4") == 4, "one group sampling a training step"


def test_an_untrained_policy_ties_with_its_base_on_every_prompt(tmp_path):
    """Same weights, same prompts, same random numbers: the same completions."""
    module = GRAOModule(policy="embedded:keywords", learning_rate=0.0, weight_decay=0.0)
    fit(tmp_path, module=module, data=DATA, **VALIDATED)
    assert module.estimates["nag"].value == 0.0
    assert module.estimates["ras"] == module.estimates["base_ras"]
    assert module.estimates["length"] == module.estimates["base_length"]


def test_without_a_reference_model_there_is_no_gain_and_no_base(tmp_path):
    module = GRAOModule(policy="embedded:keywords", reference_model=None)
    fit(tmp_path, module=module, data=DATA, **VALIDATED)
    assert "ras" in module.estimates
    assert not {"nag", "base_ras"} & module.estimates.keys()


def test_the_summary_holds_what_validation_found_and_what_the_run_cost(finished):
    module, folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["distinct"]["low"] is None, "JSON has no NaN"
    for name in ("ras", "nag", "reward", "length", "cut_off"):
        assert summary[name] == module.estimates[name]._asdict()
        assert summary[name]["low"] <= summary[name]["value"] <= summary[name]["high"]
    assert summary["steps"] == summary["validated_step"] == 4
    assert summary["sampled_tokens"] == module.num_sampled_tokens > 4 * 8 * 4
    assert set(summary["seconds_per_step"]) == {
        "sample",
        "score",
        "reference_model",
        "update",
        "step",
    }
    parts = [value for name, value in summary["seconds_per_step"].items() if name != "step"]
    assert summary["seconds_per_step"]["step"] == pytest.approx(sum(parts))
    assert summary["peak_memory_bytes"] > 100e6


def test_tensorboard_gets_the_known_names_the_layout_and_texts(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[1])).Reload()
    tags = events.Tags()
    expected = [
        "reward",
        "reward_std",
        "dead_groups",
        "rewards/keyword_score/mean",
        "kl",
        "entropy",
        "grad_norm",
        "completions/mean_length",
        "completions/min_length",
        "completions/max_length",
        "completions/cut_off",
        "learning_rate",
        "num_tokens",
        "step_time",
        "objective/exploration",
        "objective/imitation",
        "objective/regularizer",
        "objective/exploration_share",
        "objective/imitation_share",
        "objective/regularizer_share",
        "reference_answer/advantage",
        "reference_answer/grad_share",
        "perf/tokens_per_second",
        "perf/sample_time",
        "perf/score_time",
        "perf/update_time",
    ]
    missing = {f"train/{name}" for name in expected} - set(tags["scalars"])
    assert not missing
    for name in ("ras", "nag", "reward", "length"):
        ends = {f"val_bounds/{name}_{end}" for end in ("low", "high")}
        assert {f"val/{name}", *ends} <= set(tags["scalars"])
    assert len(events.Scalars("train/reward")) == 4
    assert "custom_scalars__config__" in tags["tensors"]
    text = events.Tensors("train/completions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "reference answer" in text and "completion 4" in text and "advantage" in text


def test_shares_of_the_terms_sum_to_one(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[1])).Reload()
    terms = ("exploration", "imitation", "regularizer")
    steps = [
        sum(events.Scalars(f"train/objective/{term}_share")[step].value for term in terms)
        for step in range(4)
    ]
    assert steps == pytest.approx([1.0] * 4, abs=1e-5)


def test_the_table_shows_percentages_intervals_and_the_meaning_of_ties():
    estimates = {
        "ras": Estimate(0.945, 0.91, 0.967),
        "base_ras": Estimate(0.363, 0.3, 0.4),
        "nag": Estimate(-0.05, -0.1, 0.0),
        "reward": Estimate(0.96, 0.95, 0.97),
        "reference_answer_reward": Estimate(0.704, 0.69, 0.72),
    }
    table = summary_table(estimates, ties_as="half", gain="net").splitlines()
    cells = {line[:16].strip(): line[16:].split() for line in table}
    assert cells["RAS %"] == ["94.5", "[91.0,", "96.7]", "36.3"]
    assert cells["NAG %"] == ["-5.0", "[-10.0,", "+0.0]"]
    assert cells["reward"] == ["0.960", "[0.950,", "0.970]", "0.704"]
    assert "RAS: wins over the reference answer, ties count as half." in table
    assert "NAG: wins minus losses against the untrained base." in table
    assert max(map(len, table)) < 80, "a terminal of 80 columns wraps nothing"


def test_a_second_validation_forgets_the_first(tmp_path):
    """An untrained policy: the same outcomes, and intervals that do not narrow."""

    def estimates(max_steps: int):
        module = GRAOModule(policy="embedded:keywords", learning_rate=0.0, weight_decay=0.0)
        fit(tmp_path, module=module, data=DATA, **{**VALIDATED, "max_steps": max_steps})
        return module.estimates

    assert estimates(4) == estimates(2)


def test_sampled_tokens_add_up_over_the_training_steps_alone(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[1])).Reload()
    means = [event.value for event in events.Scalars("train/completions/mean_length")]
    total = [event.value for event in events.Scalars("train/num_tokens")]
    per_step = [8 * 4 * mean for mean in means]  # 8 prompts, 4 completions
    assert total == pytest.approx([sum(per_step[: step + 1]) for step in range(4)], abs=0.1)
    lengths = [
        [event.value for event in events.Scalars(f"train/completions/{name}_length")]
        for name in ("min", "mean", "max")
    ]
    assert all(1 <= low <= mean <= high <= 12 for low, mean, high in zip(*lengths, strict=True))


def test_the_table_puts_base_and_reference_answer_under_their_headings():
    estimates = {
        "length": Estimate(6.0, 5.0, 7.0),
        "base_length": Estimate(4.0, 3.0, 5.0),
        "reference_answer_length": Estimate(5.0, 4.5, 5.5),
    }
    _, header, _, line, *_ = summary_table(estimates, ties_as="loss", gain="wins").splitlines()
    assert header.split()[-3:] == ["base", "reference", "answer"]
    assert line.split()[-2:] == ["4.0", "5.0"]
