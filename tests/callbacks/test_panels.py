"""TensorBoard opens on what matters, explains it, and charts what a method has."""

import re

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_START_INFO_TAG,
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from grao_lightning import (
    DPOModule,
    GRAOModule,
    GRPOModule,
    PPOModule,
    RewardModule,
    SFTModule,
)
from grao_lightning.callbacks.panels import TensorBoardPanels
from grao_lightning.command.trainer import LOGGER_DEFAULTS
from grao_lightning.display.vocabulary import figure_of, metrics_page
from tests.runs import fit, stages

UNSCORED = {"scoring": {"rewards": []}}
WEAK = {"policy": "embedded:keywords-weak", "learning_rate": 1e-3}
METHODS = {
    "GRAO": (GRAOModule, WEAK, {}),
    "GRPO": (GRPOModule, {**WEAK, "kl_weight": 0.02}, {}),
    "PPO": (PPOModule, {**WEAK, "kl_weight": 0.02}, {}),
    "SFT": (SFTModule, WEAK, UNSCORED),
    "DPO": (DPOModule, WEAK, UNSCORED),
    "Reward": (RewardModule, {"learning_rate": 1e-3}, UNSCORED),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return, by method, the events of two steps with a validation after each."""
    found = {}
    for name, (kind, options, scoring) in METHODS.items():
        folder = tmp_path_factory.mktemp(name)
        logger = TensorBoardLogger(**{**LOGGER_DEFAULTS, "save_dir": folder})
        fit(
            folder,
            module=kind(**options),
            callbacks=[*stages(**scoring), TensorBoardPanels()],
            data={"prompts_per_step": 2, "validation_prompts": 6},
            logger=logger,
            max_steps=2,
            limit_val_batches=1.0,
            val_check_interval=1,
            log_every_n_steps=1,
        )
        found[name] = EventAccumulator(logger.log_dir).Reload()
    return found


every_method = pytest.mark.parametrize("method", METHODS)


def scalars(events) -> set[str]:
    return set(events.Tags()["scalars"])


@every_method
def test_every_curve_is_explained_and_none_counts_epochs(written, method):
    tags = scalars(written[method])
    assert {tag.partition("/")[0] for tag in tags} == {"train", "val", "val_bounds"}
    assert not [tag for tag in tags if figure_of(tag) is None]
    assert not [tag for tag in tags if "epoch" in tag or "hp_metric" in tag]


def test_the_page_of_metrics_is_that_of_the_vocabulary(repository):
    assert (repository / "docs/metrics.md").read_text() == metrics_page()


@every_method
def test_bounds_stand_apart_and_hold_their_figure(written, method):
    events = written[method]
    ends = [tag for tag in scalars(events) if tag.startswith("val_bounds/")]
    assert ends
    for tag in ends:
        name = tag.removeprefix("val_bounds/").removesuffix("_low").removesuffix("_high")
        assert f"val/{name}" in scalars(events)
    assert not [tag for tag in scalars(events) if re.search("^val/.*_(low|high)$", tag)]


@every_method
def test_each_chart_of_the_page_has_something_to_draw(written, method):
    """The tags of a chart are regular expressions, those of an interval whole names."""
    config = written[method].Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(config)
    charts = [chart for category in layout.category for chart in category.chart]
    assert charts and [category.title for category in layout.category] == ["validation", method]
    tags = scalars(written[method])
    for chart in charts:
        for series in chart.margin.series:
            assert {series.value, series.lower, series.upper} <= tags, chart.title
        for pattern in chart.multiline.tag:
            found = [tag for tag in tags if re.search(pattern, tag)]
            assert len(found) == 1, f"{chart.title}: {pattern} draws {found}"
    titles = {chart.title for chart in charts}
    assert "loss" in titles or {"RAS", "NAG", "length", "cut off", "distinct"} <= titles


def points(events, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


@pytest.mark.parametrize(("method", "figure"), [("GRAO", "ras"), ("SFT", "loss"), ("DPO", "loss")])
def test_the_untrained_base_is_where_a_curve_of_validation_begins(written, method, figure):
    curve = points(written[method], f"val/{figure}")
    assert set(curve) == {0, 1, 2}
    assert curve[0] == points(written[method], f"val/base_{figure}")[1]
    low = points(written[method], f"val_bounds/{figure}_low")
    assert set(low) == {0, 1, 2} and low[0] <= curve[0]
    assert set(points(written[method], "train/loss")) == {0, 1}


def test_a_base_that_is_no_start_begins_no_curve(tmp_path):
    logger = TensorBoardLogger(**{**LOGGER_DEFAULTS, "save_dir": tmp_path})
    module = SFTModule(**WEAK, reference_model="embedded:keywords")
    options = {"limit_val_batches": 1.0, "val_check_interval": 1, "max_steps": 1}
    data = {"prompts_per_step": 2, "validation_prompts": 6}
    fit(tmp_path, module=module, callbacks=stages(**UNSCORED), data=data, logger=logger, **options)
    assert set(points(EventAccumulator(logger.log_dir).Reload(), "val/loss")) == {1}


def test_a_run_that_goes_on_does_not_begin_its_curves_anew(tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, filename="two")
    options = {"limit_val_batches": 1.0, "val_check_interval": 1}
    data = {"prompts_per_step": 2, "validation_prompts": 6}
    checkpoint = None
    for steps, expected in ((2, {0, 1, 2}), (4, {3, 4})):
        logger = TensorBoardLogger(**{**LOGGER_DEFAULTS, "save_dir": tmp_path})
        fit(
            tmp_path,
            module=SFTModule(**WEAK),
            callbacks=[*stages(**UNSCORED), saver],
            data=data,
            logger=logger,
            max_steps=steps,
            ckpt_path=checkpoint,
            enable_checkpointing=True,
            **options,
        )
        assert set(points(EventAccumulator(logger.log_dir).Reload(), "val/loss")) == expected
        checkpoint = str(tmp_path / "saved/two.ckpt")


@pytest.mark.parametrize(
    ("method", "metric"), [("GRAO", "val/ras"), ("SFT", "val/loss"), ("Reward", "val/accuracy")]
)
def test_the_table_of_settings_holds_all_that_decides_with_the_methods_figure(
    written, method, metric
):
    data = written[method].summary_metadata
    start = parse_session_start_info_plugin_data(data[SESSION_START_INFO_TAG].plugin_data.content)
    settings = {name: value for name, value in start.hparams.items()}
    assert settings["model.learning_rate"].number_value == 1e-3
    assert settings["method"].string_value == METHODS[method][0].__name__
    assert settings["clipping.max_norm"].number_value == 1.0
    sampled = {"sampling.group_size", "sampling.temperature", "scoring.rewards"}
    assert sampled <= set(settings) if method == "GRAO" else not sampled & set(settings)
    assert settings["data.prompts_per_step"].number_value == 2
    experiment = parse_experiment_plugin_data(data[EXPERIMENT_TAG].plugin_data.content)
    assert [info.name.tag for info in experiment.metric_infos] == [metric]
