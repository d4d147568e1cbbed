"""Text tables of aligned columns, and numbers in them."""

import math
from collections.abc import Sequence
from typing import SupportsFloat

# Content of an empty cell.
NOTHING = "-"
# Columns of a terminal by default.
WIDTH = 80
_GAP = "  "


def number(value: SupportsFloat, sign: str = "") -> str:
    """Formats a number with four decimals, or with three significant digits if its magnitude is below 0.001.

    Args:
        value: The number.
        sign: Sign option of the format, such as ``"+"``.

    Examples:
        >>> number(1.5), number(-0.25, "+"), number(0.0000123), number(float("nan"), "+")
        ('1.5000', '-0.2500', '1.23e-05', 'nan')
    """
    value = float(value)
    if math.isnan(value):
        return "nan"
    return f"{value:{sign}.3g}" if 0 < abs(value) < 1e-3 else f"{value:{sign}.4f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str, num_left: int = 1) -> str:
    """Returns a table as text. If it is wider than 80 columns, the first cell of a row stands on a line above it.

    Args:
        header: Names of the columns. A column in which every cell is ``"-"`` is left out.
        rows: The cells of each row, as many as there are columns.
        title: Printed above the table.
        num_left: Number of leading columns that hold text and are aligned to the left. The others hold numbers.

    Examples:
        >>> print(text_table(["metric", "live", "merged"], [["loss", "1.5", "1.25"]], title="At step 5"))
        At step 5
        metric  live  merged
        ------  ----  ------
        loss     1.5    1.25
    """
    shown = [place for place in range(len(header)) if any(row[place] != NOTHING for row in rows)]
    header, *rows = ([line[place] for place in shown] for line in (header, *rows))
    num_left = sum(place < num_left for place in shown)
    lines = _aligned(header, rows, num_left)
    if len(lines[0]) > WIDTH and len(header) > 1:
        # Indented below the first cells. A cell that repeats the one above is left out.
        head, below, *under = _aligned(["", *header[1:]], [["", *row[1:]] for row in rows], num_left)
        firsts = [row[0] for row in rows]
        lines = [header[0], head, below]
        for place, line in enumerate(under):
            lines += [firsts[place]] if place == 0 or firsts[place] != firsts[place - 1] else []
            lines.append(line)
    return "\n".join([title, *(line.rstrip() for line in lines)])


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """Returns the lines of a table, all of the same length."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    sides = ["<" if place < num_left else ">" for place in range(len(widths))]
    cells = [header, ["-" * width for width in widths], *rows]
    return [_GAP.join(f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True)) for line in cells]
