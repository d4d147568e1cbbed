"""Validates a grid of merges of checkpoints on disk, to find out which is best.

The config is that of `merge-callback train`: its model, data and trainer validate every merge. Each merge adds a line
to a CSV file, and merges in that file are not validated again. A table and heat maps show all merges.

  merge-callback sweep --config-dir conf --config-name train +sweep=grid \\
      'sweep.checkpoints=runs/points/*.ckpt' 'sweep.num_snapshots=[3,6,10]' 'sweep.every=[1,2]'
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from merge_callback.apps.merge import find_checkpoints
from merge_callback.apps.validate import check_mode, chosen_metric, prepare_validation, validated
from merge_callback.apps.wrong_call import WrongCallError, wrong_calls
from merge_callback.checkpoints.alike import alike, refuse_averages, steps_of
from merge_callback.checkpoints.read import open_checkpoint
from merge_callback.checkpoints.stored import StoredCheckpoint
from merge_callback.merging.rules import Rule, resolve_rule
from merge_callback.utilities.checks import check_installed
from merge_callback.utilities.tables import NOTHING, number, text_table
from merge_callback.validation.logged import safe_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from merge_callback.apps.grid import LIVE, Cell, CellFile, Grid

# Config entries that values depend on. Other entries of the trainer, such as folders, may differ from run to run.
_DECISIVE = ("model", "data", "datamodule", "seed", "sweep.newest")
_DECISIVE_OF_TRAINER = ("limit_val_batches", "fast_dev_run", "overfit_batches", "precision", "plugins")


def sweep_table(values: Mapping[Cell, float], metric: str, mode: Literal["min", "max"]) -> str:
    """Returns a text table of all merges, best first, each with its gain over the newest checkpoint in it."""
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
    """Plots number of checkpoints against interval, one map for each rule and span.

    The title gives the value of the newest checkpoint alone.

    Raises:
        ModuleNotFoundError: If matplotlib, an extra, is not installed.
    """
    from merge_callback.apps.figures import plot_heat_maps

    panels: dict[str, dict[tuple[int, int], float]] = {}
    title = ""
    for cell, value in values.items():
        if cell.rule == LIVE:
            title = f"{metric} of merges up to step {cell.end}; live {number(value)}"
            continue
        label = cell.rule if cell.span_steps is None else f"{cell.rule}, last {cell.span_steps} steps"
        panels.setdefault(label, {})[cell.num_snapshots, cell.every] = value
    return plot_heat_maps(panels, "maximum number of checkpoints", "interval, in checkpoints", title)


def run(config: DictConfig) -> None:
    """Validates the merges that have no line in the file yet, and shows all merges."""
    if "sweep" not in config:
        raise WrongCallError("the config has no entry 'sweep'; give +sweep=grid 'sweep.checkpoints=...'")
    asked = config.sweep
    with wrong_calls():
        check_installed("matplotlib", "dashboards")
        grid = Grid(
            _rules(asked.rules),
            *(list(asked[name]) for name in ("num_snapshots", "every", "span_steps", "ends")),
        )
        check_mode("sweep.mode", asked.mode)
        opened = [open_checkpoint(Path(path)) for path in find_checkpoints(asked.checkpoints)]
        refuse_averages(opened)
        opened = alike(opened)
        checkpoints = dict(zip(steps_of(opened, asked.steps), opened, strict=True))
        cells = grid.cells(list(checkpoints))
        folder = Path(asked.output)
        file = CellFile(folder / "cells.csv", _fingerprints(config, grid, checkpoints))
        found = {cell: file[cell] for cell in cells}
        wanted = asked.metric or next((name for metrics in found.values() for name in metrics), None)
        # The model may log a metric that it did not log when the file was written.
        missing = [cell for cell, metrics in found.items() if wanted not in metrics]
        sys.stdout.write(f"{len(cells)} merges, of which {len(cells) - len(missing)} are there already\n")
        if missing:
            fit, seed = prepare_validation(config), config.get("seed") or 0
            for cell in tqdm(missing, desc="Validating merges"):
                chosen = [checkpoints[step] for step in cell.steps]
                found[cell] = validated(fit, chosen, grid.coefficients(cell), asked.newest, seed)
                # Raises after the first merge if the metric is not logged, before hours are spent.
                wanted = chosen_metric(list(found[cell]), wanted, "sweep.metric")
                file.add(cell, found[cell])
        metric = str(wanted)
        by_cell = {cell: metrics[metric] for cell, metrics in found.items()}
    sys.stdout.write(f"{sweep_table(by_cell, metric, asked.mode)}\nValues: {file.path}\n")
    for end in sorted({cell.end for cell in by_cell}):
        picture = folder / f"{safe_name(metric)}-{end}.png"
        heat_maps({cell: value for cell, value in by_cell.items() if cell.end == end}, metric).savefig(picture)
        sys.stdout.write(f"Picture: {picture}\n")


def _rules(asked: Any) -> dict[str, Rule]:
    given = (
        asked if OmegaConf.is_dict(asked) else {name: name for name in ([asked] if isinstance(asked, str) else asked)}
    )
    return {
        name: resolve_rule(instantiate(rule) if OmegaConf.is_config(rule) else rule) for name, rule in given.items()
    }


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
