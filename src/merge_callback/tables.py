"""Tables of text: drawn by rich where it is installed, aligned columns elsewhere.

rich is no dependency of its own: where it is installed, Lightning takes another progress bar, and who adds a callback
does not ask for that.
"""

from collections.abc import Sequence
from io import StringIO

# What stands in a cell that has nothing to show.
NOTHING = "-"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str, num_left: int = 1) -> str:
    """A table that fits 80 columns as far as its contents can be folded.

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
        from rich.table import Table
    except ModuleNotFoundError:
        return _aligned([header, *rows], title, num_left)
    table = Table(title=title)
    for place, name in enumerate(header):
        is_number = place >= num_left
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for row in rows:
        table.add_row(*row)
    with StringIO() as text:
        Console(file=text, width=80).print(table, markup=False)
        return text.getvalue()


def _aligned(lines: Sequence[Sequence[str]], title: str, num_left: int) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<" if place < num_left else ">" for place in range(len(widths))]
    text = ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([title, *text]) + "\n"
