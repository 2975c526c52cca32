"""Tables and plot of what `against_trl` kept.

``python -m tests.benchmarks.figure RESULTS.json CURVES.json --plot FILE.png --readme README.md``
puts the tables between the README's two benchmark comments. ``python -m tests.benchmarks.figure
RESULTS.json --front FILE.png --page docs/benchmarks.md`` draws memory against speed instead.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tests.benchmarks.report import PHASES

_MARKS = "<!-- benchmark -->", "<!-- end of benchmark -->"
Results = dict[str, Any]


def comparison_table(results: Results) -> str:
    """Return the main comparison as Markdown."""
    lines = [
        "| | s/step | sample | update | tokens/s | peak MB | faster per token | memory | limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for row in (result["trl"], *result.get("trl_slower", ()), *result["ours"]):
            seconds = row["seconds"]
            lines.append(
                f"| {name}: {_who(row)} | {seconds['step']:.1f} | {seconds['sample']:.1f} "
                f"| {seconds['update']:.1f} | {row['tokens'] / seconds['step']:.0f} "
                f"| {row['peak_mb']} | {row['time_ratio_per_token']:.2f} "
                f"| {row['memory_ratio']:.2f} | {row['share_of_limit']:.0%} |"
            )
    return "\n".join(lines)


def front_points(result: Results) -> list[Results]:
    """Return every point of one precision that was measured, TRL's first."""
    trl = [result["trl"], *result.get("trl_slower", ()), *result["sweep"]]
    return [*trl, *result["front"]]


def front_table(results: Results) -> str:
    """Return memory and time along the sizes of a micro-batch as Markdown."""
    lines = ["| | s/step | peak MB | of TRL's fastest |", "|---|---|---|---|"]
    for name, result in results.items():
        for row in front_points(result) if result.get("front") else ():
            lines.append(
                f"| {name}: {_who(row, fronted=True)} | {row['seconds']['step']:.1f} "
                f"| {row['peak_mb']} | {row['peak_mb'] / result['trl']['peak_mb']:.2f} |"
            )
    return "\n".join(lines)


def plot_front(results: Results, file: Path) -> None:
    """Draw memory against the time of a step, both programs, a panel for each precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kept = {name: result for name, result in results.items() if result.get("front")}
    figure, panels = plt.subplots(
        1, len(kept), figsize=(5 * len(kept), 4), layout="constrained", squeeze=False
    )
    for axes, (name, result) in zip(panels[0], kept.items(), strict=True):
        for who in ("trl", "ours"):
            rows = [row for row in front_points(result) if row["contender"] == who]
            at = [(row["seconds"]["step"], row["peak_mb"]) for row in rows]
            axes.scatter(*zip(*at, strict=True), label={"trl": "TRL 1.16"}.get(who, who))
            for row, point in zip(rows, at, strict=True):
                axes.annotate(
                    _size(row), point, fontsize=6, xytext=(3, 3), textcoords="offset points"
                )
        axes.axhline(result["trl"]["peak_mb"], color="grey", linewidth=1)
        axes.set(
            title=name, xlabel="seconds a step", ylabel="peak MB", ylim=(0, None), xscale="log"
        )
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def curve_table(curves: Results) -> str:
    """Return the curves as Markdown, the smallest lead named."""
    lines = [
        "| | TRL s/step | ours | faster | TRL peak MB | ours | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in curves.items():
        trl, (ours, *_) = result["trl"], result["ours"]
        lines.append(
            f"| {name} (prompt {result['prompts'][0]}) | {trl['seconds']['step']:.1f} "
            f"| {ours['seconds']['step']:.1f} | {ours['time_ratio_per_token']:.2f} "
            f"| {trl['peak_mb']} | {ours['peak_mb']} | {ours['memory_ratio']:.2f} |"
        )
    least = min(curves, key=lambda name: _lead(curves[name]))
    lines.append(f"\nThe smallest lead is {_lead(curves[least]):.2f} times, at {least}.")
    return "\n".join(lines)


def plot(results: Results, curves: Results, file: Path) -> None:
    """Draw phases of the main comparison and the lead along each size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes: dict[str, list[tuple[int, float]]] = {}
    for name, result in curves.items():
        axis, value = name.rsplit(" ", 1)
        at = result["prompts"][0] if axis == "prompt tokens" else int(value)
        sizes.setdefault(axis, []).append((at, _lead(result)))
    figure, (bars, *leads) = plt.subplots(
        1,
        1 + len(sizes),
        figsize=(13, 4),
        width_ratios=[2, *[1] * len(sizes)],
        layout="constrained",
    )
    rows = [
        (f"{name}\n{_who(row)}", row["seconds"])
        for name, result in results.items()
        for row in (result["trl"], *result.get("trl_slower", ()), *result["ours"])
    ]
    left = [0.0] * len(rows)
    for phase in PHASES:
        widths = [seconds[phase] for _, seconds in rows]
        bars.barh([label for label, _ in rows], widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    bars.invert_yaxis()
    bars.tick_params(axis="y", labelsize=6)
    bars.set_xlabel("seconds a step")
    bars.legend(fontsize=7)
    for axes, (axis, points) in zip(leads, sizes.items(), strict=True):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="o")
        axes.axhline(1, color="grey", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0)
        axes.set_xlabel(axis)
    if leads:
        leads[0].set_ylabel("times faster than TRL")
    figure.savefig(file, dpi=110)


def _who(row: Results, *, fronted: bool = False) -> str:
    settings = row["settings"]
    if row["contender"] == "trl":
        recomputing = ", recomputing" if settings.get("gradient_checkpointing") else ""
        return f"TRL, micro-batch {settings['per_device_train_batch_size']}{recomputing}"
    if not settings:
        return "ours"
    tokens = f"{settings['micro_batch_tokens']} tokens"
    if settings.get("gradient_checkpointing"):
        return f"ours, {tokens}, recomputing" if fronted else "ours, lean"
    return f"ours, {tokens}"


def _size(row: Results) -> str:
    settings = row["settings"]
    size = settings.get("per_device_train_batch_size") or settings["micro_batch_tokens"]
    return f"{size}{' recomputing' if settings.get('gradient_checkpointing') else ''}"


def _lead(result: Results) -> float:
    lead: float = result["ours"][0]["time_ratio_per_token"]
    return lead


def main() -> None:
    """Write the tables and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("curves", type=Path, nargs="?")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--front", type=Path)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    if options.front:
        plot_front(results, options.front)
        _put(options.page, front_table(results))
        return
    curves = json.loads(options.curves.read_text())
    plot(results, curves, options.plot)
    _put(options.readme, f"{comparison_table(results)}\n\n{curve_table(curves)}")


def _put(page: Path, tables: str) -> None:
    """Write tables between the two comments of a page."""
    pattern = re.compile(f"({_MARKS[0]}).*?({_MARKS[1]})", re.S)
    page.write_text(pattern.sub(lambda m: f"{m[1]}\n\n{tables}\n\n{m[2]}", page.read_text()))


if __name__ == "__main__":
    main()
