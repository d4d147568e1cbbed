"""A grid of merges of checkpoints, and the file of their metrics."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from merge_callback.merging.rules import Rule, merge_coefficients
from merge_callback.utilities.checks import check_count, check_optional_count
from merge_callback.utilities.csv_cells import cell_of_text, text_of_cell
from merge_callback.utilities.files import atomic_write

# The requested merge, the steps of its checkpoints, and a fingerprint that shows whether its values are up to date.
CELL_COLUMNS = ("end", "rule", "num_snapshots", "every", "span_steps", "steps", "fingerprint")
# Stands in place of a rule for the newest checkpoint alone.
LIVE = "live"


@dataclass(frozen=True)
class Cell:
    """One merge of the grid: up to ``num_snapshots`` checkpoints at an interval, all within a span.

    Args:
        end: Step of the newest checkpoint of the merge.
        rule: Name of the rule.
        num_snapshots: Maximum number of checkpoints.
        every: Interval, in checkpoints: n takes every n-th one, counted back from the newest.
        span_steps: Takes only checkpoints from this many last optimizer steps; None sets no limit.
        steps: Steps of the checkpoints that result from these, oldest first.
    """

    end: int
    rule: str
    num_snapshots: int
    every: int
    span_steps: int | None
    steps: tuple[int, ...]

    @property
    def columns(self) -> dict[str, str]:
        """The columns of this cell in the file."""
        span = "" if self.span_steps is None else str(self.span_steps)
        return {
            "end": str(self.end),
            "rule": self.rule,
            "num_snapshots": str(self.num_snapshots),
            "every": str(self.every),
            "span_steps": span,
            "steps": " ".join(map(str, self.steps)),
        }


@dataclass(frozen=True)
class Grid:
    """All combinations of some rules, numbers, intervals, spans and ends; see `Cell`.

    Args:
        rules: Name -> rule.
        num_snapshots: Maximum numbers of checkpoints.
        every: Intervals, in checkpoints.
        span_steps: Spans in optimizer steps; None sets no limit.
        ends: Steps at which merges end; None is the newest checkpoint.

    Raises:
        ValueError: If a list is empty or holds an invalid value.
    """

    rules: Mapping[str, Rule]
    num_snapshots: Sequence[int] = (10,)
    every: Sequence[int] = (1,)
    span_steps: Sequence[int | None] = (None,)
    ends: Sequence[int | None] = (None,)

    def __post_init__(self) -> None:
        for name in ("rules", "num_snapshots", "every", "span_steps", "ends"):
            if not getattr(self, name):
                raise ValueError(f"sweep.{name} must list at least one value, got {getattr(self, name)!r}")
        if LIVE in self.rules:
            raise ValueError(f"no rule may be called {LIVE!r}, which stands for the newest checkpoint alone")
        for name, values in (("num_snapshots", self.num_snapshots), ("every", self.every)):
            for value in values:
                check_count(f"sweep.{name}", value)
        for span_steps in self.span_steps:
            check_optional_count("sweep.span_steps", span_steps)

    def cells(self, steps: Sequence[int]) -> list[Cell]:
        """Returns the merges that can be made from checkpoints of these steps.

        For each end, the newest checkpoint alone comes first. Combinations with too few checkpoints are left out. If
        several combinations give the same merge, only the first is kept.

        Raises:
            ValueError: If no checkpoint has the step of an end.
        """
        cells: dict[tuple[str, tuple[int, ...]], Cell] = {}
        for asked in self.ends:
            end = max(steps) if asked is None else asked
            if end not in steps:
                raise ValueError(f"sweep.ends must be steps of checkpoints, got {end}; there are {sorted(steps)}")
            cells.setdefault((LIVE, (end,)), Cell(end, LIVE, 1, 1, None, (end,)))
            newest_first = sorted((step for step in steps if step <= end), reverse=True)
            for rule, num, every, span in product(self.rules, self.num_snapshots, self.every, self.span_steps):
                spread = newest_first[::every]
                chosen = [step for step in spread if span is None or end - step < span][:num]
                # As many checkpoints as requested, or all that lie within the span.
                is_whole = len(chosen) == num or len(chosen) < len(spread)
                if is_whole and len(chosen) > 1:
                    key = (rule, tuple(reversed(chosen)))
                    cells.setdefault(key, Cell(end, rule, num, every, span, key[1]))
        return list(cells.values())

    def coefficients(self, cell: Cell) -> list[float]:
        """Returns the coefficients of a cell's checkpoints, oldest first."""
        return [1.0] if cell.rule == LIVE else merge_coefficients(self.rules[cell.rule], cell.steps)


class CellFile:
    """A CSV file of merges and their metrics. Every write is atomic.

    Args:
        path: Path of the file, which need not exist yet.
        fingerprint: Returns a digest of all that a merge's values depend on. Rows with another digest are kept but
            ignored.

    Raises:
        ValueError: If the file does not come from a sweep.
    """

    def __init__(self, path: Path, fingerprint: Callable[[Cell], str]) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self._rows: list[dict[str, str]] = []
        self._read()

    def __getitem__(self, cell: Cell) -> dict[str, float]:
        """Returns the metrics of a merge; empty if the file does not hold the merge."""
        columns = self._columns(cell)
        for row in reversed(self._rows):
            if all(row[name] == value for name, value in columns.items()):
                return {name: float(value) for name, value in row.items() if name not in CELL_COLUMNS and value}
        return {}

    def add(self, cell: Cell, metrics: Mapping[str, float]) -> None:
        """Adds the row of a merge, and keeps rows that another process has added in the meantime.

        Raises:
            ValueError: If a metric has the name of a column.
        """
        if taken := [name for name in metrics if name in CELL_COLUMNS]:
            raise ValueError(f"the validation logs {taken[0]!r}, which is a column of {self.path}; rename the metric")
        self._read()
        self._rows.append(self._columns(cell) | {name: repr(value) for name, value in metrics.items()})
        names = dict.fromkeys([*CELL_COLUMNS, *(name for row in self._rows for name in row)])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as unfinished, unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(names), restval="")
            writer.writeheader()
            writer.writerows({name: cell_of_text(text) for name, text in row.items()} for row in self._rows)

    def _read(self) -> None:
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            rows = csv.DictReader(file, restval="")
            self._rows = [{name: text_of_cell(cell) for name, cell in row.items() if name} for row in rows]
        if self._rows and (missing := [name for name in CELL_COLUMNS if name not in self._rows[0]]):
            raise ValueError(f"{self.path} does not come from a sweep: it has no column {missing[0]}")

    def _columns(self, cell: Cell) -> dict[str, str]:
        return cell.columns | {"fingerprint": self.fingerprint(cell)}
