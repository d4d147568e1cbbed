"""A grid of merges of checkpoints, and the file of what was found for them."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from merge_callback.merging.rules import Rule, merge_coefficients
from merge_callback.utilities.checks import check_count, check_optional_count
from merge_callback.utilities.files import atomic_write

# What is asked for, and the steps that this comes to; the last one tells whether values are still those of the files.
CELL_COLUMNS = ("end", "rule", "num_snapshots", "every", "span_steps", "steps", "fingerprint")
# The newest checkpoint alone.
LIVE = "live"


@dataclass(frozen=True)
class Cell:
    """One merge of the grid: up to ``num_snapshots`` checkpoints, every so many, not older than the span.

    Args:
        end: Step of the newest checkpoint of the merge.
        rule: Name of the rule.
        num_snapshots: How many at most.
        every: One of so many checkpoints is taken, counted back from the newest.
        span_steps: Only those from the last so many optimizer steps; None for no such limit.
        steps: Of the checkpoints that this comes to, oldest first.
    """

    end: int
    rule: str
    num_snapshots: int
    every: int
    span_steps: int | None
    steps: tuple[int, ...]

    @property
    def columns(self) -> dict[str, str]:
        """How it stands in the file."""
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
    """All combinations of these; see `Cell`.

    Args:
        rules: Name -> rule.
        num_snapshots: Numbers of checkpoints.
        every: Intervals, in checkpoints.
        span_steps: Spans in optimizer steps; None is no limit.
        ends: Steps at which merges end; None is the newest checkpoint.

    Raises:
        ValueError: If a list is empty or holds what makes no sense.
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
        """The merges that can be made of checkpoints of those steps, after the newest checkpoint of each end.

        Combinations that there are too few checkpoints for are left out; of those that come to the same merge, the
        first stays.

        Raises:
            ValueError: If there is no checkpoint of the step of an end.
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
                # As many as asked for, or all that the span holds.
                is_whole = len(chosen) == num or len(chosen) < len(spread)
                if is_whole and len(chosen) > 1:
                    key = (rule, tuple(reversed(chosen)))
                    cells.setdefault(key, Cell(end, rule, num, every, span, key[1]))
        return list(cells.values())

    def coefficients(self, cell: Cell) -> list[float]:
        """Of the checkpoints of a cell, oldest first."""
        return [1.0] if cell.rule == LIVE else merge_coefficients(self.rules[cell.rule], cell.steps)


class CellFile:
    """A CSV file of merges and their metrics, whole at any time.

    Args:
        path: The file, which need not be there.
        fingerprint: Of all that a merge's values come from; lines with another one stay, and do not count.

    Raises:
        ValueError: If the file is another one.
    """

    def __init__(self, path: Path, fingerprint: Callable[[Cell], str]) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self._rows: list[dict[str, str]] = []
        self._read()

    def __getitem__(self, cell: Cell) -> dict[str, float]:
        """Metrics of a merge; none if it is not there."""
        columns = self._columns(cell)
        for row in reversed(self._rows):
            if all(row[name] == value for name, value in columns.items()):
                return {name: float(value) for name, value in row.items() if name not in CELL_COLUMNS and value}
        return {}

    def add(self, cell: Cell, metrics: Mapping[str, float]) -> None:
        """Writes one more line, beside those that another process may have written meanwhile.

        Raises:
            ValueError: If a metric is called as a column is.
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
            writer.writerows(self._rows)

    def _read(self) -> None:
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            self._rows = list(csv.DictReader(file))
        if self._rows and (missing := [name for name in CELL_COLUMNS if name not in self._rows[0]]):
            raise ValueError(f"{self.path} is no file of a sweep: it has no column {missing[0]}")

    def _columns(self, cell: Cell) -> dict[str, str]:
        return cell.columns | {"fingerprint": self.fingerprint(cell)}
