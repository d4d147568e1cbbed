"""Which merge of the checkpoints on disk is best: a Hydra app that validates a grid of them.

    python -m merge_callback.sweep --config-dir conf --config-name train +sweep=grid \\
        'sweep.checkpoints=runs/trunk/*.ckpt' 'sweep.num_snapshots=[3,6,10]' 'sweep.every=[1,2]'

The config is that of `merge_callback.train`: its ``model``, ``data`` and ``trainer`` validate every merge. One line a
merge is added to a CSV file; what stands there is not run again. A table and heat maps show all of them.
"""

import csv
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from merge_callback.arguments import check_count, check_installed, check_optional_count, named_merges, safe_name
from merge_callback.files import complete_or_absent
from merge_callback.merge import check_alike, find_checkpoints, steps_of
from merge_callback.offline import check_mode, chosen_metric, prepare_validation, validated
from merge_callback.rules import Rule, merge_coefficients
from merge_callback.shadow import is_average
from merge_callback.stored import StoredCheckpoint, open_checkpoint
from merge_callback.tables import NOTHING, number, text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is asked for, and the steps that this comes to; the last one tells whether values are still those of the files.
CELL_COLUMNS = ("end", "rule", "num_snapshots", "every", "span_steps", "steps", "fingerprint")
# Entries of the config that values depend on. Others of the trainer's, such as folders, may differ from run to run.
_DECISIVE = ("model", "data", "datamodule", "seed", "sweep.newest")
_DECISIVE_OF_TRAINER = ("limit_val_batches", "fast_dev_run", "overfit_batches", "precision", "plugins")
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
        with complete_or_absent(self.path) as unfinished, unfinished.open("w", newline="") as file:
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


def sweep_table(values: Mapping[Cell, float], metric: str, mode: Literal["min", "max"]) -> str:
    """All merges, the best first, each beside the newest checkpoint that it contains."""
    live = {cell.end: value for cell, value in values.items() if cell.rule == LIVE}
    sign = 1 if mode == "min" else -1
    rows = []
    for cell, value in sorted(values.items(), key=lambda item: sign * item[1] if math.isfinite(item[1]) else math.inf):
        span = NOTHING if cell.span_steps is None else str(cell.span_steps)
        gain = NOTHING if cell.rule == LIVE else number(sign * (live[cell.end] - value), "+")
        used = f"{len(cell.steps)} from {cell.steps[0]}"
        rows.append(
            [cell.rule, str(cell.end), str(cell.num_snapshots), str(cell.every), span, used, number(value), gain]
        )
    header = ["rule", "end", "N", "every", "span", "checkpoints", metric, "gain"]
    return text_table(header, rows, title=f"{len(rows)} merges, the best {metric} first")


def heat_maps(values: Mapping[Cell, float], metric: str) -> "Figure":
    """Number of checkpoints against interval, one map for each rule and span; the newest checkpoint in the title.

    Raises:
        ModuleNotFoundError: If matplotlib, an extra, is not installed.
    """
    from merge_callback.figures import plot_heat_maps

    panels: dict[str, dict[tuple[int, int], float]] = {}
    title = ""
    for cell, value in values.items():
        if cell.rule == LIVE:
            title = f"{metric} of merges up to step {cell.end}; live {number(value)}"
            continue
        label = cell.rule if cell.span_steps is None else f"{cell.rule}, last {cell.span_steps} steps"
        panels.setdefault(label, {})[cell.num_snapshots, cell.every] = value
    return plot_heat_maps(panels, "checkpoints at most", "one of so many", title)


@hydra.main(version_base="1.3", config_path=None)
def main(config: DictConfig) -> None:
    """Validates the merges that have no line yet, and shows all."""
    if "sweep" not in config:
        sys.exit("merge_callback.sweep: the config has no entry 'sweep'; give +sweep=grid sweep.checkpoints=...")
    asked = config.sweep
    try:
        check_installed("matplotlib", "dashboards")
        grid = Grid(
            _rules(asked.rules),
            *(list(asked[name]) for name in ("num_snapshots", "every", "span_steps", "ends")),
        )
        check_mode("sweep.mode", asked.mode)
        opened = [open_checkpoint(Path(path)) for path in find_checkpoints(asked.checkpoints)]
        check_alike(opened)
        checkpoints = dict(zip(steps_of(opened, asked.steps), opened, strict=True))
        cells = grid.cells(list(checkpoints))
        folder = Path(asked.output)
        file = CellFile(folder / "cells.csv", _fingerprints(config, grid, checkpoints))
        found = {cell: file[cell] for cell in cells}
        wanted = asked.metric or next((name for metrics in found.values() for name in metrics), None)
        # A metric may have been added to the model since.
        missing = [cell for cell, metrics in found.items() if wanted not in metrics]
        sys.stdout.write(f"{len(cells)} merges, of which {len(cells) - len(missing)} are there already\n")
        if missing:
            run, seed = prepare_validation(config), config.get("seed") or 0
            for cell in tqdm(missing, desc="Validating merges"):
                chosen = [checkpoints[step] for step in cell.steps]
                found[cell] = validated(run, chosen, grid.coefficients(cell), asked.newest, seed)
                # Before hours are spent on it.
                wanted = chosen_metric(list(found[cell]), wanted, "sweep.metric")
                file.add(cell, found[cell])
        metric = str(wanted)
        by_cell = {cell: metrics[metric] for cell, metrics in found.items()}
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"merge_callback.sweep: {error}")
    sys.stdout.write(sweep_table(by_cell, metric, asked.mode))
    sys.stdout.write(f"Values: {file.path}\n")
    for end in sorted({cell.end for cell in by_cell}):
        picture = folder / f"{safe_name(metric)}-{end}.png"
        heat_maps({cell: value for cell, value in by_cell.items() if cell.end == end}, metric).savefig(picture)
        sys.stdout.write(f"Picture: {picture}\n")


def _rules(asked: Any) -> dict[str, Rule]:
    given = (
        asked if OmegaConf.is_dict(asked) else {name: name for name in ([asked] if isinstance(asked, str) else asked)}
    )
    made = {name: instantiate(rule) if OmegaConf.is_config(rule) else rule for name, rule in given.items()}
    rules: dict[str, Rule] = {}
    for name, rule in named_merges(made).items():
        if is_average(rule):
            raise ValueError(f"sweep.rules must be rules over checkpoints, but {name!r} averages over every step")
        rules[name] = rule
    return rules


def _fingerprints(config: DictConfig, grid: Grid, checkpoints: Mapping[int, StoredCheckpoint]) -> Callable[[Cell], str]:
    names = (*_DECISIVE, *(f"trainer.{name}" for name in _DECISIVE_OF_TRAINER))
    found = [OmegaConf.select(config, name) for name in names]
    decisive = [OmegaConf.to_container(each, resolve=True) if OmegaConf.is_config(each) else each for each in found]
    stats = {step: checkpoint.path.stat() for step, checkpoint in checkpoints.items()}

    def fingerprint(cell: Cell) -> str:
        files = [(str(checkpoints[s].path), stats[s].st_size, stats[s].st_mtime_ns) for s in cell.steps]
        made_of = json.dumps([decisive, files, grid.coefficients(cell)])
        return hashlib.sha256(made_of.encode()).hexdigest()[:16]

    return fingerprint


if __name__ == "__main__":
    main()
