"""Text tables, drawn by rich if it is installed and as aligned columns otherwise.

rich is not a dependency: if it is installed, Lightning uses another progress bar, and adding a callback should not
change that.
"""

from collections.abc import Sequence
from io import StringIO
from typing import SupportsFloat

# Content of an empty cell.
NOTHING = "-"
# Columns of a terminal by default.
WIDTH = 80


def number(value: SupportsFloat, sign: str = "") -> str:
    """Formats a number with four decimals, or with three significant digits if its magnitude is below 0.001.

    Args:
        value: The number.
        sign: Sign option of the format, such as ``"+"``.

    Examples:
        >>> number(1.5), number(-0.25, "+"), number(0.0000123)
        ('1.5000', '-0.2500', '1.23e-05')
    """
    value = float(value)
    return f"{value:{sign}.3g}" if 0 < abs(value) < 1e-3 else f"{value:{sign}.4f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str, num_left: int = 1) -> str:
    """Returns a table as text. Long cells are folded to fit 80 columns; nothing is cut off.

    Args:
        header: Names of the columns. A column in which every cell is ``"-"`` is left out.
        rows: The cells of each row, as many as there are columns.
        title: Printed above the table.
        num_left: Number of leading columns that hold text and are aligned to the left. The others hold numbers.
    """
    shown = [place for place in range(len(header)) if any(row[place] != NOTHING for row in rows)]
    header = [header[place] for place in shown]
    rows = [[row[place] for place in shown] for row in rows]
    num_left = sum(place < num_left for place in shown)
    try:
        from rich.console import Console
        from rich.measure import Measurement
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        return _aligned([header, *rows], title, num_left)
    # Names from the user may contain brackets, which rich would read as markup.
    table = Table(title=Text(title))
    for place, name in enumerate(header):
        is_number = place >= num_left
        table.add_column(Text(name), justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    with StringIO() as text:
        console = Console(file=text, width=WIDTH)
        needed = Measurement.get(console, console.options.update(width=10 * WIDTH), table).minimum
        Console(file=text, width=max(WIDTH, needed)).print(table)
        return text.getvalue()


def _aligned(lines: Sequence[Sequence[str]], title: str, num_left: int) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<" if place < num_left else ">" for place in range(len(widths))]
    text = ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([title, *text]) + "\n"
