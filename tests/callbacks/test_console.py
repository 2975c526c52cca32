"""What a user reads while a run goes on."""

import html
import sys

import torch

from grao_lightning.batch import Completions, PromptBatch
from grao_lightning.callbacks.console import StepProgressBar, step_line
from grao_lightning.callbacks.panels import completion_table
from grao_lightning.callbacks.phase import RareWarning
from tests.runs import fit, stages


def test_a_step_is_one_line_with_the_figures_that_matter():
    values = {
        "loss": 1.0,
        "reward": 0.6666,
        "ras": 0.361,
        "kl": 0.00123,
        "entropy": 1.5,
        "completions/mean_length": 5.83,
        "completions/clipped_ratio": 0.25,
        "frac_reward_zero_std": 0.125,
        "step_time": 0.0312,
    }
    assert step_line(7, 200, values) == (
        "step   7/200 | reward 0.667 | ras 36% | drift 0.0012 | entropy 1.50 | length 5.8 | "
        "cut off 25% | dead groups 12% | 0.03 s/step"
    )


def test_a_method_without_rewards_shows_its_loss():
    assert step_line(1, 9, {"loss": 2.5, "entropy": 1.0, "step_time": 1.0}) == (
        "step 1/9 | loss 2.500 | entropy 1.00 | 1.00 s/step"
    )


def test_every_step_prints_one_line_and_none_speaks_of_epochs(tmp_path, capsys):
    fit(tmp_path, callbacks=[*stages(), StepProgressBar()], enable_progress_bar=True)
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith("step ")]
    assert [line.split(" | ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3"]
    assert "Epoch" not in captured.out + captured.err
    assert "/-2" not in captured.out + captured.err


def test_lines_can_be_fewer(tmp_path, capsys):
    bar = StepProgressBar(every_n_steps=2)
    fit(tmp_path, callbacks=[*stages(), bar], enable_progress_bar=True)
    assert capsys.readouterr().out.count("step ") == 1


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


def test_under_a_terminal_a_bar_counts_the_steps_and_in_a_file_there_is_none(
    tmp_path, capsys, monkeypatch
):
    def output() -> str:
        fit(tmp_path, callbacks=[*stages(), StepProgressBar()], enable_progress_bar=True)
        return "".join(capsys.readouterr())

    assert "Training:" not in output()
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    shown = output()
    assert "Training:" in shown and "| 3/3 [" in shown
    assert "Epoch" not in shown
