"""Figures of reports, as files; needs matplotlib."""

from pathlib import Path
from typing import Any

_DPI = 130


def new_figure(number: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """Return a figure and its axes side by side.

    Args:
        number: Of axes.
        size: Width and height in inches.
    """
    # Not pyplot: it would choose a window system, and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def save_figure(figure: Any, title: str, file: Path) -> None:
    """Write a figure with a title over all of it."""
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=_DPI)
