"""Shows the loss between checkpoints: on the line through some of them, or on the plane through three.

Every point on a line or plane through checkpoints is a weighted sum of them, with weights that sum to one. So it is
made and validated like any merge. Points beyond the checkpoints have weights below zero or above one. The config is
that of `merge-callback train`.

  merge-callback landscape --config-dir conf --config-name train +landscape=line \\
      'landscape.checkpoints={live: a.ckpt, merged: merged.ckpt}'
  merge-callback landscape --config-dir conf --config-name train +landscape=plane \\
      'landscape.checkpoints={first: a.ckpt, second: b.ckpt, third: c.ckpt}'
"""

import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from merge_callback.apps.validate import check_mode, chosen_metric, prepare_validation, validated
from merge_callback.apps.wrong_call import WrongCallError, wrong_calls
from merge_callback.checkpoints.alike import alike
from merge_callback.checkpoints.merged_tensors import TAKEN_FROM_NEWEST
from merge_callback.checkpoints.read import open_checkpoint
from merge_callback.checkpoints.stored import StoredCheckpoint
from merge_callback.live.names import fits
from merge_callback.merging.combine import CHUNK_NUMEL
from merge_callback.utilities.checks import check_count, check_installed
from merge_callback.utilities.files import atomic_write
from merge_callback.utilities.tables import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Place:
    """A point among checkpoints: where it lies, in distances between weights, and the checkpoints' coefficients."""

    x: float
    y: float
    coefficients: tuple[float, ...]


def corners(sides: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Returns two or three points with the given distances: the first at the origin, the second on the x axis.

    Raises:
        ValueError: If two points are the same, or three lie on one line.

    Examples:
        >>> corners([[0, 3, 4], [3, 0, 5], [4, 5, 0]])
        [(0.0, 0.0), (3.0, 0.0), (0.0, 4.0)]
    """
    for (i, one), j in itertools.product(enumerate(sides), range(len(sides))):
        if i < j and one[j] == 0:
            raise ValueError(f"checkpoints {i + 1} and {j + 1} have the same weights")
    found = [(0.0, 0.0), (float(sides[0][1]), 0.0)]
    if len(sides) == 3:
        base, left, right = sides[0][1], sides[0][2], sides[1][2]
        x = (base**2 + left**2 - right**2) / (2 * base)
        square = left**2 - x**2
        if square <= 1e-8 * left**2:
            raise ValueError("the three checkpoints lie on one line; landscape.kind=line shows the loss along it")
        found.append((x, math.sqrt(square)))
    return found


def line(sides: Sequence[Sequence[float]], num_points: int, margin: float) -> list[Place]:
    """Returns points on the path from checkpoint to checkpoint; x is the length of the path so far.

    Args:
        sides: Distances between checkpoints.
        num_points: Number of points on each piece of the path, both ends included.
        margin: How far to continue beyond the first and the last checkpoint, as a share of the path's length.
    """
    lengths = [sides[i][i + 1] for i in range(len(sides) - 1)]
    if 0 in lengths:
        raise ValueError(f"checkpoints {lengths.index(0) + 1} and {lengths.index(0) + 2} have the same weights")
    found: dict[float, Place] = {}
    begin = 0.0
    for piece, length in enumerate(lengths):
        # Positions on this piece, from zero to one.
        shares = [place / (num_points - 1) for place in range(num_points)]
        if margin and piece == 0:
            shares.insert(0, -margin * sum(lengths) / length)
        if margin and piece == len(lengths) - 1:
            shares.append(1 + margin * sum(lengths) / length)
        for share in shares:
            values = [0.0] * len(sides)
            values[piece], values[piece + 1] = 1 - share, share
            found[begin + share * length] = Place(begin + share * length, 0.0, tuple(values))
        begin += length
    return [found[x] for x in sorted(found)]


def plane(sides: Sequence[Sequence[float]], num_points: int, margin: float) -> list[Place]:
    """Returns a grid of points on the plane through three checkpoints, row by row.

    Args:
        sides: Distances between the checkpoints.
        num_points: Number of points along each axis.
        margin: Margin around the triangle, as a share of its width and height.
    """
    if len(sides) != 3:
        raise ValueError(f"a plane goes through three checkpoints, got {len(sides)}")
    points = corners(sides)
    axes = []
    for values in zip(*points, strict=True):
        reach = margin * (max(values) - min(values))
        low, high = min(values) - reach, max(values) + reach
        axes.append([low + (high - low) * place / (num_points - 1) for place in range(num_points)])
    return [Place(x, y, barycentric(points, x, y)) for y in axes[1] for x in axes[0]]


def barycentric(points: Sequence[tuple[float, float]], x: float, y: float) -> tuple[float, float, float]:
    """Returns the weights of three corners, summing to one, whose weighted sum is a given point.

    Args:
        points: The corners, as `corners` returns them.
        x: First coordinate of the point.
        y: Second coordinate of the point.
    """
    third = y / points[2][1]
    second = (x - third * points[2][0]) / points[1][0]
    return 1 - second - third, second, third


def distances(opened: Sequence[StoredCheckpoint]) -> list[list[float]]:
    """Returns the Euclidean distances between the weights of checkpoints; batch norm tensors do not count."""
    square = [[0.0] * len(opened) for _ in opened]
    for name, tensor in opened[0].tensors.items():
        is_merged = tensor.dtype.is_floating_point or tensor.dtype.is_complex
        if not is_merged or fits(name, TAKEN_FROM_NEWEST):
            continue
        wide = torch.promote_types(tensor.dtype, torch.float64)
        stored = [each.tensors[name].permute(tensor.outermost_first) for each in opened]
        for start in range(0, tensor.numel, CHUNK_NUMEL):
            parts = [each[start : start + CHUNK_NUMEL].to(wide) for each in stored]
            for (i, one), (j, other) in itertools.combinations(enumerate(parts), 2):
                square[i][j] += float((one - other).abs().square().sum())
    for i, j in itertools.combinations(range(len(opened)), 2):
        square[j][i] = square[i][j]
    return [[math.sqrt(each) for each in row] for row in square]


def run(config: DictConfig) -> None:
    """Validates every point, and writes the record and the picture."""
    if "landscape" not in config:
        raise WrongCallError("the config has no entry 'landscape'; give +landscape=line or +landscape=plane")
    asked = config.landscape
    with wrong_calls():
        check_installed("matplotlib", "dashboards")
        kinds = {"line": line, "plane": plane}
        if asked.kind not in kinds:
            raise ValueError(f"landscape.kind must be 'line' or 'plane', got {asked.kind!r}")
        check_mode("landscape.mode", asked.mode)
        check_count("landscape.num_points", asked.num_points, minimum=2)
        if not asked.margin >= 0:
            raise ValueError(f"landscape.margin must be >= 0, got {asked.margin}")
        if not OmegaConf.is_dict(asked.checkpoints) or len(asked.checkpoints) < 2:
            raise ValueError("landscape.checkpoints must be a mapping of at least two names to checkpoints")
        opened = alike([open_checkpoint(Path(path)) for path in asked.checkpoints.values()])
        sides = distances(opened)
        places = kinds[asked.kind](sides, asked.num_points, asked.margin)
        fit = prepare_validation(config, asked.limit_batches)
        found: list[dict[str, float]] = []
        for place in tqdm(places, desc="Validating points"):
            found.append(validated(fit, opened, place.coefficients, asked.newest, config.get("seed") or 0))
            metric = chosen_metric(list(found[-1]), asked.metric, "landscape.metric")
    folder = Path(asked.output)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "kind": asked.kind,
        "metric": metric,
        "checkpoints": {name: str(path) for name, path in asked.checkpoints.items()},
        "distances": sides,
        "limit_batches": asked.limit_batches,
        "points": [asdict(place) | {"metrics": _finite(of)} for place, of in zip(places, found, strict=True)],
    }
    with atomic_write(folder / f"{asked.kind}.json") as unfinished:
        unfinished.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    choose = min if asked.mode == "min" else max
    finite = [point for point in record["points"] if point["metrics"][metric] is not None]
    if not finite:
        sys.exit(f"{metric} is NaN or infinite at every point; see {folder / asked.kind}.json")
    draw(record).savefig(folder / f"{asked.kind}.png")
    best = choose(finite, key=lambda point: point["metrics"][metric])
    parts = zip(asked.checkpoints, best["coefficients"], strict=True)
    made_of = ", ".join(f"{value:.2f} {name}" for name, value in parts)
    sys.stdout.write(f"Best {metric}: {number(best['metrics'][metric])} at {made_of}\n")
    sys.stdout.write(f"Record: {folder / asked.kind}.json\nPicture: {folder / asked.kind}.png\n")


def draw(record: Mapping[str, Any]) -> "Figure":
    """Plots a record: a curve along a line, or contours on a plane, with the checkpoints marked.

    Raises:
        ModuleNotFoundError: If matplotlib, an extra, is not installed.
    """
    from merge_callback.apps.figures import plot_line, plot_plane

    metric, names, sides = record["metric"], list(record["checkpoints"]), record["distances"]
    known = {(point["x"], point["y"]): point["metrics"][metric] for point in record["points"]}
    values = {place: math.nan if value is None else value for place, value in known.items()}
    if record["kind"] == "line":
        at = itertools.accumulate((sides[i][i + 1] for i in range(len(names) - 1)), initial=0.0)
        return plot_line({x: value for (x, _), value in values.items()}, dict(zip(names, at, strict=True)), metric)
    points = corners(sides)
    marks = dict(zip(names, points, strict=True))
    marks["their mean"] = (sum(x for x, _ in points) / 3, sum(y for _, y in points) / 3)
    return plot_plane(values, marks, metric)


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
