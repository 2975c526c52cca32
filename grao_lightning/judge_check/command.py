"""``grao judge-check``: scorers and preference pairs -> how far each scorer can be trusted."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch and Lightning, which `--help` need not wait for
    from grao_lightning.judge_check.judging import Judged
    from grao_lightning.judge_check.settings import Plan

HELP = """\
usage: grao judge-check --config CONFIG [options]

Score the chosen against the rejected answers of preference data, and report how
far each scorer can be trusted: accuracy, ties, position bias, length bias,
agreement between scorers. Scorers that learn from pairs learn from the train
split; all are measured on the validation split.

options:
  -h, --help                show this help message and exit
  --config CONFIG           settings, like configs/judge_check.yaml
  --print_config            show all settings and their values, then stop
  --scorers LIST            entries like those of scoring.rewards in `grao fit`;
                            with a negative weight lower scores are better
  --pairs NUMBER            validation pairs that are judged; null = all
  --pairs_at_once NUMBER    pairs that a scorer is called with (default: 64)
  --output FOLDER           of report.md, report.png, results.json and
                            pairs.csv, which are replaced (default:
                            runs/judge-check)
  --data.NAME VALUE         where the pairs come from, as in `grao fit`: train,
                            validation, subset, data_dir, train_split,
                            validation_split, rename
"""


def judge_check_command(arguments: Sequence[str]) -> int:
    """Run ``grao judge-check`` with its arguments; return the exit status.

    Raises:
        UserError: There are faults; nothing has been scored.
    """
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    from grao_lightning.callbacks.stopping import Stopped
    from grao_lightning.command.resume import restart_advice
    from grao_lightning.display.logs import configure_logging
    from grao_lightning.judge_check.settings import read_plan

    configure_logging()
    plan = read_plan(arguments)
    if plan.without_effect:
        print(f"grao: without effect here: {', '.join(plan.without_effect)}", file=sys.stderr)
    judged = judge_all(plan)
    from grao_lightning.judge_check.report import write_report

    print(write_report(plan, judged))
    print(f"written: {plan.settings.output}")
    for one in judged:
        if one.error:
            print(f"grao: scorer {one.label} failed: {one.error}", file=sys.stderr)
    for one in judged:
        if one.interrupted:
            raise Stopped(one.interrupted, advice=restart_advice(sys.argv))
    return 1 if any(one.error for one in judged) else 0


def judge_all(plan: "Plan") -> "list[Judged]":
    """Return what every scorer says; those after an interrupted one are not asked."""
    from grao_lightning.display.progress import ProgressLine
    from grao_lightning.judge_check.judging import judge

    settings = plan.settings
    judged: list[Judged] = []
    for spec, function in zip(settings.scorers, plan.functions, strict=True):
        line = ProgressLine(f"{spec.label}: pairs", sys.stderr) if sys.stderr.isatty() else None

        def progress(done: int, line: ProgressLine | None = line) -> None:
            if line is not None:
                line(done, len(plan.pairs))

        progress(0)
        judged.append(
            judge(spec, function, plan.train, plan.pairs, settings.pairs_at_once, progress)
        )
        if line is not None and judged[-1].asked < len(plan.pairs):
            print(file=sys.stderr)  # the line has not been ended
        if judged[-1].interrupted:
            break
    return judged
