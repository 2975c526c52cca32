"""``grao compare``: a plan -> runs -> a report."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grao_lightning.callbacks.stopping import Stopped
from grao_lightning.command.help import OneLine
from grao_lightning.command.resume import restart_advice
from grao_lightning.compare.plan import Plan, Run, Settings, read_plan
from grao_lightning.display.progress import ProgressLine
from grao_lightning.faults import UserError, extra_fault

if TYPE_CHECKING:  # numpy, which `--help` need not wait for
    from grao_lightning.compare.report import Comparison
    from grao_lightning.compare.results import FinishedRun
    from grao_lightning.compare.runs import Progress


def compare_command(arguments: Sequence[str]) -> int:
    """Run ``grao compare`` with its arguments; return the exit status.

    Raises:
        UserError: The plan has faults, or nothing has finished yet to report.
    """
    parser = argparse.ArgumentParser(
        prog="grao compare",
        formatter_class=OneLine,
        description="Run several methods on the same prompts, side by side, and write a report: "
        "tables with intervals, curves, studies. Started again, it goes on where it was cut off.",
    )
    parser.add_argument("--config", required=True, help="plan, like configs/compare_keywords.yaml")
    parser.add_argument("--output", help="folder of runs and report, instead of the plan's")
    parser.add_argument("--jobs", type=int, help="runs side by side, instead of the plan's")
    parser.add_argument(
        "--report_only", action="store_true", help="report on what has finished, run nothing"
    )
    options = parser.parse_args(arguments)
    # Before anything runs, not after hours at the report.
    fault = extra_fault("grao compare", ("matplotlib", "scipy"), "compare")
    if fault:
        raise UserError(fault)
    plan = read_plan(options.config, options.output, options.jobs)
    try:
        return _compare(plan, report_only=options.report_only)
    except Stopped as stopped:
        stopped.advice = f"; finished runs are kept, the others go on{restart_advice(sys.argv)}"
        raise


def _compare(plan: Plan, *, report_only: bool) -> int:
    failed = {} if report_only else carry_out_plan(plan)
    from grao_lightning.compare.report import write_report

    for name, error in failed.items():
        print(f"grao: run {name} failed: {error}", file=sys.stderr)
    comparison = gather(plan, failed)
    write_report(comparison, plan.output)
    print((plan.output / "report.md").read_text())
    print(f"written: {plan.output / 'report.html'}")
    return 1 if failed else 0


def carry_out_plan(plan: Plan) -> dict[str, str]:
    """Carry out every run of a plan, the sweep first; return errors by run."""
    from grao_lightning.compare.runs import carry_out

    plan.output.mkdir(parents=True, exist_ok=True)
    trials = [run for group in plan.trials().values() for seeds in group for run in seeds]
    failed = carry_out(trials, plan.output, plan.jobs, _line("sweep")) if trials else {}
    chosen = _best(swept(plan))
    rest = [run for runs in plan.table(chosen).values() for run in runs]
    for name in plan.studies:
        rest += [run for runs in plan.study(name, chosen).values() for run in runs]
    keep = plan.keep_checkpoints
    return failed | carry_out(rest, plan.output, plan.jobs, _line("runs"), keep_checkpoints=keep)


def swept(plan: Plan) -> dict[tuple[str, str], list[tuple[Settings, float]]]:
    """Return of each (method, case) that is swept its trials with their figure, best first."""
    found = {}
    for (method, case), trials in plan.trials().items():
        assert plan.sweep is not None
        scored = []
        for settings, runs in zip(plan.sweep.trials[method], trials, strict=True):
            finished = _finished(plan, runs)
            if len(finished) == len(runs):
                values = [run.summary[plan.sweep.metric]["value"] for run in finished]
                scored.append((settings, sum(values) / len(values)))
        found[method, case] = sorted(scored, key=lambda trial: -trial[1])
    return found


def _best(
    trials: dict[tuple[str, str], list[tuple[Settings, float]]],
) -> dict[tuple[str, str], Settings]:
    """Return the best trial's settings of each (method, case) that has a finished one."""
    return {key: ranked[0][0] for key, ranked in trials.items() if ranked}


def gather(plan: Plan, failed: dict[str, str]) -> "Comparison":
    """Return the `Comparison` of all that has finished.

    Raises:
        UserError: Nothing has.
    """
    from grao_lightning.compare.report import Comparison
    from grao_lightning.compare.results import compare_methods, figures_of

    trials = swept(plan)
    chosen = _best(trials)
    by_case: dict[str, dict[str, Any]] = {case: {} for case in plan.cases}
    settings: dict[tuple[str, str], Settings] = {}
    for (method, case), runs in plan.table(chosen).items():
        finished = _finished(plan, runs)
        if finished:
            by_case[case][method] = finished
            settings[method, case] = runs[0].settings
    by_case = {case: runs for case, runs in by_case.items() if runs}
    if not by_case:
        raise UserError(f"output: no run in {plan.output} has finished; nothing to report")
    cases = {}
    for case, of_methods in by_case.items():
        cases[case] = {
            method: figures_of(runs, settings[method, case]) for method, runs in of_methods.items()
        }
        compare_methods(of_methods, cases[case], plan.against)
    studies = {}
    for name in plan.studies:
        entries = {
            label: figures_of(finished, runs[0].settings)
            for label, runs in plan.study(name, chosen).items()
            if (finished := _finished(plan, runs))
        }
        if entries:
            studies[name] = entries
    return Comparison(
        against=plan.against,
        cases=cases,
        studies=studies,
        swept=trials,
        metric=plan.sweep.metric if plan.sweep else "ras",
        answers={
            case: {method: runs[0] for method, runs in of_methods.items()}
            for case, of_methods in by_case.items()
        },
        failed=failed,
        minutes=_minutes(plan),
    )


def _finished(plan: Plan, runs: Sequence[Run]) -> "list[FinishedRun]":
    from grao_lightning.compare.results import FinishedRun
    from grao_lightning.compare.runs import folder_of, is_finished

    return [
        FinishedRun(folder_of(run, plan.output)) for run in runs if is_finished(run, plan.output)
    ]


def _minutes(plan: Plan) -> float:
    files = (plan.output / "runs").glob("*/finished.json")
    return sum(json.loads(file.read_text())["seconds"] for file in files) / 60


def _line(what: str) -> "Progress":
    """Return what says on one line how far the runs are."""
    line = ProgressLine(what, sys.stdout)

    def write(finished: int, number: int, running: list[str]) -> None:
        line(finished, number, ", ".join(name.rpartition("-")[0] for name in running))

    return write
