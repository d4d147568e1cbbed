"""Tables of text: drawn by rich where it is installed, aligned columns elsewhere.

rich is no dependency of its own: where it is installed, Lightning takes another progress bar, and who adds a callback
does not ask for that.
"""

from collections.abc import Sequence
from io import StringIO
from typing import SupportsFloat

# What stands in a cell that has nothing to show.
NOTHING = "-"
# Of a terminal that nobody has widened.
WIDTH = 80


def number(value: SupportsFloat, sign: str = "") -> str:
    """Four digits after the point, or three that count where there would be nothing but zeros.

    Examples:
        >>> number(1.5), number(-0.25, "+"), number(0.0000123)
        ('1.5000', '-0.2500', '1.23e-05')
    """
    value = float(value)
    return f"{value:{sign}.3g}" if 0 < abs(value) < 1e-3 else f"{value:{sign}.4f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str, num_left: int = 1) -> str:
    """A table that fits 80 columns as far as its contents can be folded; nothing is cut.

    Args:
        header: Names of the columns. A column in which every cell is ``"-"`` is left out.
        rows: As many cells each.
        title: Stands above.
        num_left: How many columns are aligned to the left; the others are numbers.
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
    # Nothing that a user has named is taken for markup.
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
