"""Figures of a report; needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path

from grao_lightning.compare.results import Figures
from grao_lightning.display.pictures import new_figure, save_figure


def draw_curves(case: str, methods: Mapping[str, Figures], file: Path) -> None:
    """Draw RAS against steps and against sampled tokens, a band from the least seed to the best."""
    figure, axes = new_figure(2, (11, 4))
    for axis, along in zip(axes, ("steps", "tokens"), strict=True):
        for name, one in methods.items():
            positions = one.curve[along]
            if along == "tokens" and not one.sampled_tokens:
                axis.axhline(100 * one.ras.value, linestyle=":", color=_colour(methods, name))
                continue
            keys = ("ras", "lowest", "highest")
            percent = {key: [100 * value for value in one.curve[key]] for key in keys}
            axis.plot(positions, percent["ras"], label=name, color=_colour(methods, name))
            axis.fill_between(
                positions,
                percent["lowest"],
                percent["highest"],
                alpha=0.15,
                color=_colour(methods, name),
            )
        axis.set_xlabel("optimiser steps" if along == "steps" else "sampled tokens")
        axis.set_ylabel("RAS %, validation prompts")
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3)
    axes[0].legend()
    if any(not one.sampled_tokens for one in methods.values()):
        axes[1].set_title("dotted: the end of a method that samples nothing", fontsize=9)
    save_figure(figure, f"{case}: mean of the seeds, band from the least to the best", file)


def draw_shares(case: str, methods: Mapping[str, Figures], file: Path) -> bool:
    """Draw the shares of the objective's terms; return whether a method has any."""
    having = {name: one for name, one in methods.items() if one.shares}
    if not having:
        return False
    figure, axes = new_figure(len(having), (5.5 * len(having), 3.6))
    for axis, (name, one) in zip(axes, having.items(), strict=True):
        for term in ("exploration", "imitation", "regularizer"):
            axis.plot(one.shares["steps"], one.shares[term], label=term, linewidth=1)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("optimiser steps")
        axis.set_ylabel("share of the summed magnitudes")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    axes[0].legend()
    save_figure(figure, f"{case}: terms of the objective", file)
    return True


def draw_study(name: str, entries: Mapping[str, Figures], file: Path) -> None:
    """Draw RAS of a study's entries with their intervals and, as dots, their seeds."""
    figure, (axis,) = new_figure(1, (7.5, 1.2 + 0.42 * len(entries)))
    labels = list(entries)[::-1]
    for row, label in enumerate(labels):
        one = entries[label]
        value, low, high = (100 * part for part in one.ras[:3])
        axis.barh(row, value, color="tab:blue", alpha=0.5)
        axis.plot([low, high], [row, row], color="black", linewidth=1.2)
        axis.plot([100 * seed for seed in one.ras_by_seed], [row] * one.seeds, "k.", markersize=4)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_xlim(0, 100)
    axis.set_xlabel("RAS %; line: 95 % interval, dots: seeds")
    axis.grid(alpha=0.3, axis="x")
    save_figure(figure, name, file)


def _colour(methods: Mapping[str, Figures], name: str) -> str:
    return f"C{list(methods).index(name) % 10}"
