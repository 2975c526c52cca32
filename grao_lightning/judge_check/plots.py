"""The picture of a judge check; needs matplotlib."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from grao_lightning.display.pictures import new_figure, save_figure
from grao_lightning.judge_check.analysis import Agreement, Figures
from grao_lightning.metrics.outcomes import Estimate

_PANEL, _ROW, _AROUND = 4.2, 0.45, 2.0  # inches
_SIDES = (("longer", "tab:green", "^", -0.14), ("shorter", "tab:red", "v", 0.14))


def draw_check(
    figures: Mapping[str, Figures],
    agreements: Mapping[tuple[str, str], Agreement],
    guess: Estimate | None,
    file: Path,
    seeing: Collection[str] = (),
) -> None:
    """Draw every scorer's accuracy, its accuracy by length, and who agrees with whom.

    Args:
        figures: By scorer.
        agreements: By two scorers; none where there is one scorer alone.
        guess: Accuracy of guessing by length alone.
        file: To be written.
        seeing: Scorers whose accuracy means nothing, since they see which answer is the chosen one.
    """
    labels = list(figures)
    rows = max(3, len(labels))
    panels = 3 if agreements else 2
    named = [
        f"{label}{' (sees the chosen)' if label in seeing else ''}  {row}"
        for row, label in enumerate(labels, start=1)
    ]
    names = 0.09 * max(map(len, named))
    figure, axes = new_figure(panels, (names + _PANEL * panels, _AROUND + _ROW * rows))
    _draw_accuracy(axes[0], list(figures.values()), guess)
    _draw_lengths(axes[1], list(figures.values()))
    if agreements:
        _draw_agreement(axes[2], labels, agreements)
    for axis in axes:  # a scorer has one row in all panels, and the number of its row as a column
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.set_yticks(range(len(labels)), [""] * len(labels))
    axes[0].set_yticks(range(len(labels)), named)
    for axis in axes[:2]:
        axis.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.3 / (_ROW * rows)),
            fontsize=9,
            frameon=False,
            ncols=2,
            columnspacing=1,
            handletextpad=0.3,
        )
    most = max(one.pairs for one in figures.values())
    save_figure(figure, f"{most:,} validation pairs; lines: 95 % intervals", file)


def _draw_accuracy(axis: Any, scorers: Sequence[Figures], guess: Estimate | None) -> None:
    if guess is not None:
        axis.axvspan(100 * guess.low, 100 * guess.high, color="tab:grey", alpha=0.2, linewidth=0)
        axis.axvline(100 * guess.value, color="tab:grey", linestyle="--", label="length alone")
    axis.axvline(50, color="black", linewidth=0.8, label="chance")
    for row, one in enumerate(scorers):
        _draw_estimate(axis, row, one.accuracy, "tab:blue", "o")
        if one.judged:
            axis.annotate(
                f"{100 * one.accuracy.value:.1f}",
                (100 * one.accuracy.value, row),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    axis.set_title("accuracy %", fontsize=10)
    _finish(axis)


def _draw_lengths(axis: Any, scorers: Sequence[Figures]) -> None:
    axis.axvline(50, color="black", linewidth=0.8)
    for side, colour, marker, offset in _SIDES:
        for row, one in enumerate(scorers):
            estimate = getattr(one, f"accuracy_chosen_{side}")
            label = f"chosen is {side}" if row == 0 else None
            _draw_estimate(axis, row + offset, estimate, colour, marker, label)
    axis.set_title("accuracy % by length", fontsize=10)
    _finish(axis)


def _draw_agreement(
    axis: Any, labels: Sequence[str], agreements: Mapping[tuple[str, str], Agreement]
) -> None:
    number = len(labels)
    values = [[math.nan] * number for _ in labels]
    for (left, right), one in agreements.items():
        row, column = labels.index(left), labels.index(right)
        values[row][column] = values[column][row] = 100 * one.share.value
    axis.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto", alpha=0.6)
    for row in range(number):
        for column in range(number):
            value = values[row][column]
            if not math.isnan(value):
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9)
    axis.set_xticks(range(number), [str(column + 1) for column in range(number)])
    axis.set_title("agreement % where both decide", fontsize=10)


def _draw_estimate(
    axis: Any, row: float, estimate: Estimate, colour: str, marker: str, label: str | None = None
) -> None:
    value, low, high = (100 * part for part in estimate)
    axis.plot([low, high], [row, row], color=colour, linewidth=1.5)
    axis.plot([value], [row], color=colour, marker=marker, linestyle="none", label=label)


def _finish(axis: Any) -> None:
    axis.set_xlim(-3, 103)
    axis.set_xticks(range(0, 101, 25))
    axis.grid(alpha=0.3, axis="x")
