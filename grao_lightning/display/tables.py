"""Tables of text: rows of cells -> Markdown that can be read as it stands."""

import math
from collections.abc import Sequence
from typing import Any

Row = list[str]
Part = tuple[str, str, list[Row]]  # title, what to know, header and rows


def markdown(parts: Sequence[Part]) -> str:
    """Return parts one below the other; an empty note is left out."""
    lines: list[str] = []
    for title, note, (header, *rows) in parts:
        lines += [f"### {title}", "", *([note, ""] if note else [])]
        table = [[_cell(cell) for cell in row] for row in (header, *rows)]
        # The last column may hold an error's long message: nothing stands behind it to align.
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        widths[-1] = 0
        first, *others = (_row(row, widths) for row in table)
        lines += [first, "|" + "|".join("-" * max(3, width + 2) for width in widths) + "|"]
        lines += [*others, ""]
    return "\n".join(lines)


def percent(share: Sequence[float], sign: str = "") -> str:
    """Return a share and the ends of its interval in percent, nothing where it is NaN.

    Args:
        share: Its value, low and high; what follows is not looked at.
        sign: "+" to show that of positive values too.

    >>> percent((0.5, 0.25, 0.75))
    '50.0 [25.0, 75.0]'
    """
    if math.isnan(share[0]):
        return ""
    value, low, high = (f"{100 * part:{sign}.1f}" for part in share[:3])
    return f"{value} [{low}, {high}]"


def without_nan(content: Any) -> Any:
    """Return content with null for NaN, which JSON has not."""
    if isinstance(content, dict):
        return {name: without_nan(part) for name, part in content.items()}
    if isinstance(content, list):
        return [without_nan(part) for part in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def _cell(cell: Any) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "| " + " | ".join(padded) + " |"
