"""What scorers said -> figures -> tables, JSON, CSV and a picture."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from grao_lightning.display.tables import Part, Row, markdown, percent, without_nan
from grao_lightning.files import write_whole
from grao_lightning.judge_check.analysis import Agreement, Figures, agreement, figures_of
from grao_lightning.judge_check.judging import Judged
from grao_lightning.judge_check.plots import draw_check
from grao_lightning.judge_check.settings import Plan
from grao_lightning.metrics.outcomes import Estimate, wilson_interval
from grao_lightning.rewards.preference import length_alone

_NO_BIAS = "none, by construction"


@dataclass
class Check:
    """Everything a report shows.

    Attributes:
        plan: What was asked for.
        judged: What every scorer said.
        figures: By scorer; those that scored no pair are left out.
        agreements: By two scorers of these; one that sees the chosen answer would agree with
            another as often as that one is right, and is left out.
        guess: Accuracy of guessing by length alone, learned from the train split; None without
            pairs there.
        people_prefer_longer: Share of the pairs of different length whose chosen answer is longer.
    """

    plan: Plan
    judged: list[Judged]
    figures: dict[str, Figures]
    agreements: dict[tuple[str, str], Agreement]
    guess: Estimate | None
    people_prefer_longer: Estimate


def write_report(plan: Plan, judged: list[Judged]) -> str:
    """Write report.md, results.json, pairs.csv and report.png; return the tables as text."""
    folder = Path(plan.settings.output)
    check = gather(plan, judged)
    write_whole(folder / "pairs.csv", _rows(check))
    content = without_nan(_plain(check))
    results = json.dumps(content, indent=1, allow_nan=False, default=str)
    write_whole(folder / "results.json", results + "\n")
    text = markdown(list(_parts(check)))
    write_whole(folder / "report.md", text)
    if check.figures:
        seeing = {one.label for one in judged if one.sees_chosen}
        draw_check(check.figures, check.agreements, check.guess, folder / "report.png", seeing)
    return text


def gather(plan: Plan, judged: list[Judged]) -> Check:
    """Return the figures of what the scorers said."""
    longer_by = plan.pairs.longer_by
    scored = [one for one in judged if one.asked]
    return Check(
        plan,
        judged,
        figures={
            one.label: figures_of(one.differences[: one.asked], longer_by[: one.asked])
            for one in scored
        },
        agreements={
            (left.label, right.label): agreement(left.differences, right.differences)
            for left, right in combinations([one for one in scored if not one.sees_chosen], 2)
        },
        guess=(
            length_alone(plan.train[1:], (plan.pairs.chosen, plan.pairs.rejected))
            if plan.train[0]
            else None
        ),
        people_prefer_longer=wilson_interval(
            int((longer_by > 0).sum()), int((longer_by != 0).sum())
        ),
    )


def _parts(check: Check) -> Iterator[Part]:
    number = len(check.plan.pairs)
    if check.figures:
        yield (
            "Accuracy",
            f"{number:,} validation pairs. Accuracy: share of the judged pairs in which the chosen "
            "answer is preferred, a tie counting as half. A pair without a score is missing and "
            "counts nowhere else. In brackets: 95 % intervals (Wilson), pairs taken as independent."
            + _caveat(check),
            _accuracy_table(check),
        )
        equal = int((check.plan.pairs.longer_by == 0).sum())
        yield (
            "Length",
            f"In characters; {equal:,} pairs of equal length are left out. People preferred the "
            f"longer answer in {percent(check.people_prefer_longer)} % of the others. A scorer "
            "that goes by length is accurate on one side alone. Ties count as half. "
            "Correlation: Spearman's, of differences in score with differences in length, every "
            "pair counted both ways round.",
            _length_table(check),
        )
    if check.agreements:
        yield (
            "Agreement",
            "Over the pairs that both scorers decide: ties and missing ones are left out. Cohen's "
            "kappa takes off what two scorers of such accuracies agree by chance: 0 = their errors "
            "have nothing in common.",
            _agreement_table(check.agreements),
        )
    telling = [one for one in check.judged if one.statistics]
    if telling:
        yield "What the scorers tell of themselves", "", _statistics_table(telling)
    failed = [[one.label, _stopped(one, number), one.error] for one in check.judged if one.error]
    asked = {one.label for one in check.judged}
    failed += [
        [spec.label, "not begun", ""]
        for spec in check.plan.settings.scorers
        if spec.label not in asked
    ]
    if failed:
        yield (
            "Failed scorers",
            "Their figures above, if any, are those of the pairs before.",
            [["scorer", "stopped", "error"], *failed],
        )


def _caveat(check: Check) -> str:
    seeing = [one.label for one in check.judged if one.sees_chosen and one.asked]
    if not seeing:
        return ""
    return (
        f" Of no meaning is the accuracy of {', '.join(seeing)}: such a scorer reads the reference "
        "answer, which is the chosen answer itself. It is left out of the agreement."
    )


def _accuracy_table(check: Check) -> list[Row]:
    rows = [
        [
            *("scorer", "kind", "judged", "missing %", "accuracy %", "ties %"),
            *("position bias", "time a pair"),
        ]
    ]
    for one in check.judged:
        if one.label not in check.figures:
            continue
        figures = check.figures[one.label]
        kind = "pairwise" if one.pairwise else "pointwise"
        rows.append(
            [
                one.label,
                f"{kind}, {one.unit}" if one.unit else kind,
                f"{figures.judged:,}",
                percent(figures.missing),
                percent(figures.accuracy) + (" (sees the chosen)" if one.sees_chosen else ""),
                percent(figures.ties),
                _position_bias(one),
                _time(one.seconds_per_pair),
            ]
        )
    if check.guess is not None:
        learned = f"{len(check.plan.train[0]):,} train pairs"
        where = "" if check.plan.held_out else ", the same ones"
        number = f"{len(check.plan.pairs):,}"
        guess = percent(check.guess)
        rows.append(["length alone", f"of {learned}{where}", number, "", guess, "", _NO_BIAS, ""])
    return rows


def _position_bias(one: Judged) -> str:
    if not one.pairwise:
        return _NO_BIAS  # it never sees two answers at once
    # One that asks in a single order has none to tell of.
    total, count = one.statistics.get("position_bias", (0, 0))
    return _statistic(total, count, is_share=True) or "not told"


def _length_table(check: Check) -> list[Row]:
    rows = [
        [
            *("scorer", "prefers the longer %", "people, same pairs %"),
            *("accuracy %, chosen longer", "accuracy %, chosen shorter", "correlation"),
        ]
    ]
    for label, one in check.figures.items():
        rows.append(
            [
                label,
                percent(one.prefers_longer),
                percent(one.people_prefer_longer),
                f"{percent(one.accuracy_chosen_longer)} of {one.num_chosen_longer:,}".strip(),
                f"{percent(one.accuracy_chosen_shorter)} of {one.num_chosen_shorter:,}".strip(),
                _number(one.length_correlation, "+.2f"),
            ]
        )
    return rows


def _agreement_table(agreements: Mapping[tuple[str, str], Agreement]) -> list[Row]:
    rows = [["scorer", "and", "both decide", "agree %", "kappa"]]
    for (left, right), one in agreements.items():
        rows.append([left, right, f"{one.pairs:,}", percent(one.share), _number(one.kappa, "+.2f")])
    return rows


def _statistics_table(judged: Sequence[Judged]) -> list[Row]:
    rows = [["scorer", "figure", "value"]]
    for one in judged:
        for name, (total, count) in one.statistics.items():
            share = name.endswith("_rate") or name in ("position_bias", "inconsistency")
            rows.append([one.label, name, _statistic(total, count, is_share=share)])
    return rows


def _statistic(total: float, count: float | None, *, is_share: bool) -> str:
    """Return a mean, a share with its interval, or without a count the total; else nothing."""
    if count is None:
        return f"{total:,.6g}"
    if count == 0:
        return ""
    if is_share and 0 <= total <= count and float(count).is_integer():
        return f"{percent(wilson_interval(total, int(count)))} % of {count:,.0f}"
    return f"{total / count:.4g}, mean of {count:,.0f}"


def _stopped(one: Judged, number: int) -> str:
    return f"after {one.asked:,} of {number:,} pairs"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"


def _plain(check: Check) -> dict[str, Any]:
    """Return the figures as JSON takes them, NaN excepted."""

    def plain(content: Any) -> Any:
        if isinstance(content, tuple) and hasattr(content, "_asdict"):
            return {name: plain(part) for name, part in content._asdict().items()}
        return content

    scorers = {}
    for one in check.judged:
        figures = check.figures.get(one.label)
        scorers[one.label] = {
            "function": one.spec.function,
            "pairwise": one.pairwise,
            "unit": one.unit,
            "sees_chosen": one.sees_chosen,
            **({name: plain(part) for name, part in vars(figures).items()} if figures else {}),
            "statistics": {
                name: {"sum": total, "count": count}
                for name, (total, count) in one.statistics.items()
            },
            "seconds_per_pair": one.seconds_per_pair,
            "fit_seconds": one.fit_seconds,
            "error": one.error,
        }
    return {
        "pairs": len(check.plan.pairs),
        "train_pairs": len(check.plan.train[0]),
        "held_out": check.plan.held_out,
        "length_alone": plain(check.guess),
        "people_prefer_longer": plain(check.people_prefer_longer),
        "scorers": scorers,
        "agreement": [
            {"between": list(between), **plain(one)} for between, one in check.agreements.items()
        ],
        "config": check.plan.config,
    }


def _rows(check: Check) -> str:
    """Return the pairs as CSV, with every score; an empty cell is a missing one."""
    pairs = check.plan.pairs
    columns: dict[str, Sequence[Any]] = {"pair": range(1, len(pairs) + 1)}
    for one in check.judged:
        sides = ("verdict",) if one.pairwise else ("chosen", "rejected")
        for side, scores in zip(sides, (one.chosen, one.rejected), strict=False):
            columns[f"{one.label} {side}"] = [
                "" if math.isnan(score) else score for score in scores.tolist()
            ]
    columns |= {
        "chosen_characters": list(map(len, pairs.chosen)),
        "rejected_characters": list(map(len, pairs.rejected)),
        "prompt": pairs.prompts,
        "chosen": pairs.chosen,
        "rejected": pairs.rejected,
    }
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return out.getvalue()
