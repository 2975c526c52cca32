"""What a user reads while a run goes on."""

import html
import io
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from grao_lightning.batch import Completions, PromptBatch
from grao_lightning.callbacks import console
from grao_lightning.callbacks.console import StepProgressBar, step_line, validation_line
from grao_lightning.callbacks.panels import completion_table
from grao_lightning.callbacks.phase import RareWarning
from grao_lightning.display.vocabulary import VALIDATION
from grao_lightning.metrics.outcomes import Estimate
from tests.runs import fit, stages

SAMPLING = re.compile(r"Sampling (\d+)/12 tokens, (\d+) of (\d+) rows left")


VALUES = {
    "loss": 1.0,
    "reward": 0.6666,
    "ras": 0.361,
    "kl": 0.00123,
    "entropy": 1.5,
    "completions/mean_length": 5.83,
    "completions/cut_off": 0.25,
    "dead_groups": 0.125,
    "step_time": 0.0312,
}


def test_a_step_is_one_line_with_the_figures_that_matter():
    assert step_line(7, 200, VALUES) == (
        "step   7/200  reward 0.667  RAS 36%  length 5.8  cut off 25%  KL 0.0012  0.03 s"
    )


def test_a_method_without_rewards_shows_its_loss():
    assert step_line(1, 9, {"loss": 2.5, "entropy": 1.0, "step_time": 1.0}) == (
        "step 1/9  loss 2.500  entropy 1.00  1.00 s"
    )


def test_a_validation_is_one_line_with_length_and_diversity():
    """A policy that gives one answer to all shows, however good its RAS."""
    estimates = {
        "ras": Estimate(0.96, 0.934, 0.986),
        "nag": Estimate(1.0, 0.973, 1.0),
        "reward": Estimate(0.5, 0.4, 0.6),
        "length": Estimate(11.0, 10.9, 11.1),
        "distinct": Estimate(1 / 224, math.nan, math.nan),
    }
    assert validation_line(100, 100, estimates) == (
        "val  100/100  RAS 96.0% [93.4, 98.6]  NAG +100.0%  length 11.0  distinct 0.4%"
    )
    # Where both have no room, the interval goes.
    assert validation_line(10**6, 10**6, estimates) == (
        "val  1000000/1000000  RAS 96.0%  NAG +100.0%  length 11.0  distinct 0.4%"
    )


def test_a_validation_of_pairs_or_answers_has_its_own_figures():
    loss = {"loss": Estimate(0.293, 0.268, 0.318)}
    assert validation_line(5, 60, loss) == "val   5/60  loss 0.293 [0.268, 0.318]"
    margin = Estimate(1.305, 1.2, 1.4)
    pairs = {"rewards/accuracies": Estimate(0.95, 0.9, 0.99), "rewards/margins": margin, **loss}
    assert validation_line(5, 60, pairs) == (
        "val   5/60  loss 0.293 [0.268, 0.318]  accuracy 95.0%  margin +1.305"
    )


@pytest.mark.parametrize("steps", [9, 200, 12345678])
def test_no_line_fills_a_terminal_of_80_columns(steps):
    large = {name: 1234.5 for name in VALUES}
    assert len(step_line(steps, steps, large)) < 80
    estimates = {name: Estimate(123.4, -123.4, 123.4) for name in VALIDATION}
    assert len(validation_line(steps, steps, estimates)) < 80


def lines_of(tmp_path, capsys, bar: StepProgressBar, **options) -> list[str]:
    """Return what a run writes where there is no terminal, without numbers behind the step."""
    fit(tmp_path, callbacks=[*stages(), bar], enable_progress_bar=True, **options)
    captured = capsys.readouterr()
    assert "Epoch" not in captured.out + captured.err
    assert "/-2" not in captured.out + captured.err
    lines = captured.out.splitlines()
    return [line.split("  ")[0] for line in lines if line.startswith(("step ", "val "))]


def test_a_log_has_a_line_every_few_seconds_and_one_a_validation(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(Callback):
        def on_train_batch_start(self, *_) -> None:
            now[0] += 2.0  # so that the fifth second passes in every third step

    bar = StepProgressBar(every_n_seconds=5.0)
    whole = {"max_steps": 9, "limit_val_batches": 1, "val_check_interval": 6}
    data = {"prompts_per_step": 1, "validation_batch_size": 4}
    fit(tmp_path, data=data, callbacks=[*stages(), Slow(), bar], enable_progress_bar=True, **whole)
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split("  ")[0] for line in lines if line.startswith(("step ", "val "))]
    assert shown == ["step 1/9", "step 4/9", "val", "step 7/9", "step 9/9"]


def test_every_step_may_have_its_line(tmp_path, capsys):
    bar = StepProgressBar(every_n_seconds=0)
    assert lines_of(tmp_path, capsys, bar) == ["step 1/3", "step 2/3", "step 3/3"]


def test_a_warning_is_repeated_only_after_its_pause():
    warning = RareWarning(every=10)
    spoken = [step for step in range(25) if warning.due(step, step != 0)]
    assert spoken == [1, 11, 21]


def test_the_text_panel_shows_every_text_as_one_cell():
    texts = ["line one\nline two", "a | pipe", "<b>bold</b>"]
    batch = PromptBatch(
        indices=[0],
        prompt_ids=[[1]],
        prompts=["what?"],
        reference_answer_ids=[[2]],
        reference_answers=["the answer"],
        columns=[{}],
        completions=Completions([[1]] * 3, texts, [False] * 3, 3),
        rewards=torch.tensor([[1.0, 2.0, 3.0, 2.5]]),
        advantages=torch.tensor([[-1.0, 0.0, 1.0, 0.5]]),
    )
    table = completion_table(batch, num_prompts=3)
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert rows[1] == "| reference answer | 2.500 | +0.50 | the answer |"
    assert rows[2] == "| completion 1 | 1.000 | -1.00 | line one<br>line two |"
    assert all(row.count("|") == 5 for row in rows)
    assert html.escape(texts[2]) in rows[4]


def test_the_text_panel_can_show_what_the_ids_say():
    from grao_lightning.data.encoding import batch_as_read
    from grao_lightning.embedded.base import keyword_tokenizer

    tokenizer = keyword_tokenizer()
    ids = tokenizer(
        ["<bos> apple <sep>", "river <eos>", "yarn"], add_special_tokens=False
    ).input_ids
    batch = PromptBatch(
        indices=[0],
        prompt_ids=[ids[0]],
        prompts=["apple"],
        reference_answer_ids=[ids[1]],
        reference_answers=["river"],
        columns=[{}],
        completions=Completions(ids[1:], ["river", "yarn"], [False, True], 2),
        rewards=torch.tensor([[1.0, 2.0, 3.0]]),
    )
    table = completion_table(batch_as_read(batch, tokenizer), num_prompts=1)
    texts = ["reference answer | 3.000 |  | river <eos>", "completion 1 | 1.000 |  | river <eos>"]
    for text in ("**prompt** <bos> apple <sep>", *texts, "completion 2 | 2.000 |  | yarn |"):
        assert html.escape(text) in table
    assert "<" not in table.replace("<br>", "") and "<eos>" not in completion_table(batch, 1)


def pretend_a_terminal(monkeypatch) -> None:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)


def test_under_a_terminal_a_bar_counts_the_steps_and_in_a_file_there_is_none(
    tmp_path, capsys, monkeypatch
):
    def output() -> str:
        fit(tmp_path, callbacks=[*stages(), StepProgressBar()], enable_progress_bar=True)
        return "".join(capsys.readouterr())

    assert "Training:" not in output()
    pretend_a_terminal(monkeypatch)
    shown = output()
    assert "Training:" in shown and "| 3/3 [" in shown and "reward " in shown
    assert "Epoch" not in shown and "v_num" not in shown and "step 1/3" not in shown


def shown_by_a_run(tmp_path, capsys) -> str:
    """Return what a run of one step, with validation before and after it, writes."""
    fit(
        tmp_path,
        data={"prompts_per_step": 2, "validation_batch_size": 8},
        callbacks=[*stages(), StepProgressBar()],
        enable_progress_bar=True,
        max_steps=1,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        val_check_interval=1,
    )
    return "".join(capsys.readouterr())


def test_the_bar_shows_how_far_sampling_is_wherever_a_run_samples_and_clears_it(
    tmp_path, capsys, monkeypatch
):
    pretend_a_terminal(monkeypatch)
    monkeypatch.setattr(console, "_SECONDS_BETWEEN", 0.0)
    frames = shown_by_a_run(tmp_path, capsys).replace("\n", "\r").split("\r")
    stages_seen, last = [], ""
    for frame in frames:
        if shown := SAMPLING.match(frame):
            tokens, running, num_rows = map(int, shown.groups())
            assert 1 <= tokens <= 12 and 0 <= running <= num_rows
            if tokens == 1:
                stages_seen.append((last.split(":")[0], num_rows))
        else:
            last = frame if ":" in frame else last
    # Policy and base before training; two prompts with four completions; the policy once more.
    assert stages_seen == [
        ("Sanity Checking", 8),
        ("Sanity Checking", 8),
        ("Training", 8),
        ("Validation", 8),
    ]
    finished = [frame for frame in frames if "| 1/1 [" in frame]
    assert finished and not any(map(SAMPLING.match, finished))


def test_a_bar_is_drawn_anew_at_most_five_times_a_second_and_not_for_a_short_wait(monkeypatch):
    seconds = 0.0
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: seconds))
    bar, terminal = StepProgressBar(), io.StringIO()
    bar._trainer = SimpleNamespace(training=True)
    bar.train_progress_bar = Tqdm(total=1, desc="Training", file=terminal)
    before = terminal.getvalue()
    for longest, drawn in [(2, []), (16, [4, 8, 12, 16])]:
        with bar.sampling(num_rows=3, longest=longest) as progress:
            for tokens in range(1, longest + 1):
                seconds += 1 / 16  # so that every fourth position comes 0.25 s after the last drawn
                progress(tokens, 2)
        shown = re.findall(r"Sampling (\d+)/", terminal.getvalue())
        assert list(map(int, shown)) == drawn
        assert drawn or terminal.getvalue() == before
        assert bar.train_progress_bar.desc == "Training"


def test_nothing_is_shown_of_sampling_where_no_bar_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "_SECONDS_BETWEEN", 0.0)
    assert "Sampling" not in shown_by_a_run(tmp_path, capsys)
