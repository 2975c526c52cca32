"""Figures -> Markdown, HTML, CSV, JSON and pictures."""

import base64
import csv
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grao_lightning.compare.plots import draw_curves, draw_shares, draw_study
from grao_lightning.compare.results import Figures, FinishedRun
from grao_lightning.display.tables import Part, Row, markdown, percent, without_nan
from grao_lightning.files import write_whole

NUM_ANSWERS = 10


@dataclass
class Comparison:
    """Everything a report shows.

    Attributes:
        against: The method that the others are compared with.
        cases: Figures by case and method.
        studies: Figures by study and entry.
        swept: By method and case, each trial's settings with its figure; the first is the best.
        metric: What the sweep chose by.
        answers: The first seed's runs by case and method, for answers side by side.
        failed: Errors by run.
        minutes: Summed over runs.
    """

    against: str
    cases: dict[str, dict[str, Figures]]
    studies: dict[str, dict[str, Figures]]
    swept: dict[tuple[str, str], list[tuple[dict[str, Any], float]]]
    metric: str
    answers: dict[str, dict[str, FinishedRun]]
    failed: dict[str, str] = field(default_factory=dict)
    minutes: float = 0.0


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write results.json, results.csv, studies.csv, report.md, report.html and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    content = without_nan(_plain(comparison))
    write_whole(folder / "results.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    _write_csv(folder / "results.csv", "case", comparison.cases)
    _write_csv(folder / "studies.csv", "study", comparison.studies)
    pictures = _draw(comparison, folder)
    parts = _sections(comparison)
    write_whole(folder / "report.md", markdown(parts))
    answers = {case: side_by_side(runs, NUM_ANSWERS) for case, runs in comparison.answers.items()}
    write_whole(folder / "report.html", _page(parts, pictures, answers))


def method_table(methods: Mapping[str, Figures], against: str) -> list[Row]:
    """Return header and rows of the table of one case."""
    header = [
        "method",
        "RAS % [95 % interval]",
        "seeds",
        "NAG %",
        f"RAS minus {against}",
        "p (Holm)",
        "steps to 90 % of best",
        "tokens to it",
        "length",
        "s/step",
    ]
    rows = [header]
    for name, one in methods.items():
        difference, p = "", ""
        if one.difference is not None:
            difference = percent(one.difference, "+")
            p = _p_value(one.p_adjusted)
        rows.append(
            [
                name,
                percent(one.ras),
                " / ".join(f"{100 * seed:.1f}" for seed in one.ras_by_seed),
                percent(one.nag, "+"),
                difference,
                p,
                _count(one.steps_to_level),
                _count(one.tokens_to_level),
                f"{one.length:.1f}",
                f"{one.seconds_per_step:.3g}",
            ]
        )
    first = next(iter(methods.values()))
    rows.append(
        [
            "base (reference answer's length)",
            f"{100 * first.base_ras:.1f}",
            *[""] * 6,
            f"{first.base_length:.1f} ({first.reference_answer_length:.1f})",
            "",
        ]
    )
    return rows


def study_table(entries: Mapping[str, Figures]) -> list[Row]:
    """Return header and rows of a study."""
    rows = [["", "RAS % [95 % interval]", "seeds", "NAG %", "length"]]
    for label, one in entries.items():
        rows.append(
            [
                label,
                percent(one.ras),
                " / ".join(f"{100 * seed:.1f}" for seed in one.ras_by_seed),
                f"{100 * one.nag.value:+.1f}",
                f"{one.length:.1f}",
            ]
        )
    return rows


def side_by_side(runs: Mapping[str, FinishedRun], number: int) -> list[dict[str, Any]]:
    """Return the first prompts with every method's answer and reward.

    Args:
        runs: By method; all met the same prompts.
        number: At most so many prompts.
    """
    if not runs:
        return []
    rows = zip(*(run.answers[:number] for run in runs.values()), strict=False)
    shown = []
    for answers in rows:
        first = answers[0]
        texts = [("reference answer", first["reference_answer"], first["reference_answer_reward"])]
        if "base_completion" in first:
            texts.append(("untrained base", first["base_completion"], first["base_reward"]))
        texts += [
            (name, row["completion"], row["reward"])
            for name, row in zip(runs, answers, strict=True)
        ]
        shown.append({"prompt": first["prompt"], "answers": texts})
    return shown


def _sections(comparison: Comparison) -> list[Part]:
    """Return (title, what to know, table) of each part."""
    parts = []
    for case, methods in comparison.cases.items():
        first = next(iter(methods.values()))
        parts.append(
            (
                f"Methods, {case}",
                f"{first.prompts} validation prompts, the same for all; intervals cover new prompts"
                + (f" and new seeds, of which {first.seeds} ran." if first.seeds > 1 else "."),
                method_table(methods, comparison.against),
            )
        )
    for name, entries in comparison.studies.items():
        parts.append((f"Study: {name}", "", study_table(entries)))
    if comparison.swept:
        rows = [["method", "case", *_numbered(comparison.swept)]]
        for (method, case), trials in comparison.swept.items():
            cells = [f"{_settings(settings)}: {100 * value:.1f}" for settings, value in trials]
            rows.append([method, case, *cells])
        parts.append(
            (
                "Sweep",
                f"{comparison.metric} % of each trial on seeds that no table uses, best first.",
                rows,
            )
        )
    if comparison.failed:
        rows = [["run", "error"], *([name, error] for name, error in comparison.failed.items())]
        parts.append(("Failed runs", "They are left out of the tables.", rows))
    return parts


def _numbered(swept: Mapping[Any, Sequence[Any]]) -> list[str]:
    most = max(len(trials) for trials in swept.values())
    return [f"trial {number + 1}" for number in range(most)]


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.rpartition('.')[2]} {value:g}"
        if isinstance(value, (int, float))
        else f"{name.rpartition('.')[2]} {value}"
        for name, value in settings.items()
    )


def _p_value(p: float | None) -> str:
    if p is None or math.isnan(p):
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _count(value: float | None) -> str:
    return "never" if value is None else f"{value:,.0f}"


def _plain(comparison: Comparison) -> dict[str, Any]:
    def tables(groups: Mapping[str, Mapping[str, Figures]]) -> dict[str, Any]:
        return {
            name: {label: one.plain() for label, one in rows.items()}
            for name, rows in groups.items()
        }

    return {
        "against": comparison.against,
        "metric": comparison.metric,
        "cases": tables(comparison.cases),
        "studies": tables(comparison.studies),
        "sweep": [
            {"method": method, "case": case, "settings": settings, "value": value}
            for (method, case), trials in comparison.swept.items()
            for settings, value in trials
        ],
        "failed": comparison.failed,
        "minutes_of_all_runs": comparison.minutes,
    }


def _write_csv(file: Path, kind: str, groups: Mapping[str, Mapping[str, Figures]]) -> None:
    names = (
        *("reward", "length", "base_length", "reference_answer_length", "base_ras"),
        *("sampled_tokens", "seconds_per_step", "steps_to_level", "tokens_to_level"),
        *("seeds", "prompts"),
    )
    ends = ("value", "low", "high")
    out = io.StringIO()
    writer = csv.writer(out)
    estimates = [f"{name}_{end}" for name in ("ras", "nag", "difference") for end in ends]
    writer.writerow([kind, "name", *estimates, "p_adjusted", *names, "settings"])
    for group, rows in groups.items():
        for label, one in rows.items():
            cells = [
                "" if part is None else getattr(part, end)
                for part in (one.ras, one.nag, one.difference)
                for end in ends
            ]
            rest = [getattr(one, name) for name in ("p_adjusted", *names)]
            writer.writerow([group, label, *cells, *rest, json.dumps(one.settings)])
    write_whole(file, out.getvalue())


def _draw(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Draw every picture; return their files by the title of the part they belong to."""
    pictures = {}
    for case, methods in comparison.cases.items():
        file = folder / f"curves-{_slug(case)}.png"
        draw_curves(case, methods, file)
        pictures[f"Methods, {case}"] = file
        shares = folder / f"shares-{_slug(case)}.png"
        if draw_shares(case, methods, shares):
            pictures[f"Methods, {case} (terms)"] = shares
    for name, entries in comparison.studies.items():
        file = folder / f"study-{_slug(name)}.png"
        draw_study(name, entries, file)
        pictures[f"Study: {name}"] = file
    return pictures


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _page(
    parts: Sequence[Part],
    pictures: Mapping[str, Path],
    answers: Mapping[str, list[dict[str, Any]]],
) -> str:
    body: list[str] = ["<h1>Comparison</h1>"]
    for title, note, (header, *rows) in parts:
        body += [f"<h2>{_text(title)}</h2>", f"<p>{_text(note)}</p>", "<table>"]
        body += [_html_row(header, "th"), *(_html_row(row) for row in rows), "</table>"]
        for key in (title, f"{title} (terms)"):
            if key in pictures:
                data = base64.b64encode(pictures[key].read_bytes()).decode()
                body += [f'<img alt="{_text(key)}" src="data:image/png;base64,{data}">']
    for case, prompts in answers.items():
        if prompts:
            body += [
                f"<h2>Answers side by side, {_text(case)}</h2><p>First seed, with rewards.</p>"
            ]
        for shown in prompts:
            body += [f"<h3 class=prompt>{_text(shown['prompt'].strip())}</h3>", "<table>"]
            for name, text, reward in shown["answers"]:
                score = "missing" if reward is None else f"{reward:.3f}"
                body += [_html_row((name, score, text.strip()))]
            body += ["</table>"]
    return _FRAME.replace("BODY", "\n".join(body))


def _html_row(cells: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"


def _text(value: Any) -> str:
    return html.escape(str(value)).replace("\n", "<br>")


_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>GRAO Lightning: comparison</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto }
table { border-collapse: collapse; margin: .5rem 0 1rem }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .6rem }
th, td { text-align: left; vertical-align: top }
th { border-bottom: 2px solid #888 }
img { max-width: 100%; display: block; margin: 1rem 0 }
h3.prompt { font-size: 1rem; font-weight: 600; background: #f3f3f3; padding: .4rem .6rem }
</style></head><body>
BODY
</body></html>
"""
