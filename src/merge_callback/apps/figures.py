"""Draws the figures of the commands: runs with merges and anneals, predictions and their errors, sweeps, landscapes."""

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import ParamSpec

import numpy as np
from matplotlib import rc_context, rcParams, style
from matplotlib.figure import Figure

from merge_callback.apps.runs import Validation
from merge_callback.prediction.assessment import Assessed
from merge_callback.prediction.bias import HUGE
from merge_callback.prediction.planning import Option
from merge_callback.prediction.records import AnnealRecord
from merge_callback.prediction.validations import StableValidation
from merge_callback.validation.figures import ANNEALED, FORECAST, LIVE, MERGED, PREDICTED

_P = ParamSpec("_P")


def _literally(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Draws names as they are: in those of metrics and files, a dollar sign does not begin a formula."""

    @wraps(draw)
    def drawn(*arguments: _P.args, **named: _P.kwargs) -> Figure:
        with rc_context({"text.parse_math": False}):
            return draw(*arguments, **named)

    return drawn


@_literally
def plot_validations(
    validations: Sequence[Validation], metric: str, title: str, anneals: Sequence[AnnealRecord] = ()
) -> Figure:
    """Plots live, merged, predicted and annealed values over steps, and below them their gains over the live values.

    Args:
        validations: As `merge_callback.apps.runs.read_validations` returns them.
        metric: Name of the metric, with its unit in parentheses; labels the upper axis.
        title: Title of the figure.
        anneals: Records of branches of this run that were really annealed.
    """
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
    live = {v.step: v.live for v in validations}
    merged = {v.step: v.merged for v in validations if v.merged is not None}
    predicted = {v.step: v.predicted for v in validations if v.predicted is not None}
    upper.plot(live.keys(), live.values(), "o-", color=LIVE, markersize=4, label="live")
    upper.plot(merged.keys(), merged.values(), "o-", color=MERGED, markersize=4, label="merged")
    # The sign of the gains shows whether lower is better.
    sign = -1 if any(v.gain * (v.live - v.merged) < 0 for v in validations if v.gain and v.merged is not None) else 1
    gains = {step: sign * (live[step] - value) for step, value in merged.items()}
    lower.plot(gains.keys(), gains.values(), "o-", color=MERGED, markersize=4)
    if predicted:
        upper.plot(
            predicted.keys(), [p.value for p in predicted.values()], color=PREDICTED, label="annealed, predicted"
        )
        lower.plot(predicted.keys(), [sign * (live[step] - p.value) for step, p in predicted.items()], color=PREDICTED)
        highs = [sign * (live[step] - p.low) for step, p in predicted.items()]
        lows = [sign * (live[step] - p.high) for step, p in predicted.items()]
        lower.fill_between(list(predicted), lows, highs, color=PREDICTED, alpha=0.2, linewidth=0)
    pairs = [(v.forecast_end, v.forecast) for v in validations]
    foretold = {end: made for end, made in pairs if end is not None and made is not None}
    if foretold:
        values = [made.value for made in foretold.values()]
        upper.plot(foretold.keys(), values, "--", color=FORECAST, label="forecast, before its decay began")
        lows, highs = [made.low for made in foretold.values()], [made.high for made in foretold.values()]
        upper.fill_between(list(foretold), lows, highs, color=FORECAST, alpha=0.15, linewidth=0)
    name = metric.partition(" ")[0]
    ends = {a.step: a.annealed[name] for a in anneals if name in a.annealed}
    if ends:
        upper.plot(ends.keys(), ends.values(), "*", color=ANNEALED, markersize=10, label="annealed for real")
        below = {step: sign * (live[step] - value) for step, value in ends.items() if step in live}
        lower.plot(below.keys(), below.values(), "*", color=ANNEALED, markersize=10)
    upper.set(ylabel=metric, title=title)
    upper.legend()
    lower.axhline(0, color=rcParams["axes.edgecolor"], linewidth=0.8)
    lower.set(ylabel="better than the live model", xlabel="optimizer steps")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return figure


@_literally
def plot_plan(history: Sequence[StableValidation], metric: str, options: Sequence[Option]) -> Figure:
    """Plots live and merged values so far, and at the end of every decay its forecast with the interval.

    Args:
        history: Validations of the run, ascending.
        metric: Name of the metric.
        options: The decays.
    """
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    known = [
        each for each in history if all(abs(values.get(metric, math.nan)) < HUGE for values in (each.live, each.merged))
    ]
    steps = [each.step for each in known]
    axes.plot(steps, [each.live[metric] for each in known], "o-", color=LIVE, markersize=4, label="live")
    axes.plot(steps, [each.merged[metric] for each in known], "o-", color=MERGED, markersize=4, label="merged")
    told = [(each.decay, each.forecast.prediction) for each in options if each.forecast is not None]
    shapes = dict.fromkeys(decay.shape for decay, _ in told)
    for place, (marker, shape) in enumerate(zip("osD^v", shapes, strict=False)):
        of_shape = [(decay, made) for decay, made in told if decay.shape == shape]
        color = f"C{place + 2}"
        for decay, made in of_shape:
            path = [known[-1].live[metric], made.value]
            axes.plot([decay.start, decay.end], path, ":", color=color, linewidth=0.8)
        halves = [made.high - made.value for _, made in of_shape]
        ends, values = [decay.end for decay, _ in of_shape], [made.value for _, made in of_shape]
        label = f"after a {shape} decay"
        axes.errorbar(ends, values, halves, fmt=marker, color=color, capsize=3, label=label)
    axes.set(xlabel="optimizer steps", ylabel=metric, title="If the rate decayed")
    if known:
        # The beginning of a run is much higher than all that matters here.
        late = [each.live[metric] for each in known if 2 * each.step >= known[-1].step]
        bottom = min([each.merged[metric] for each in known] + [made.low for _, made in told])
        axes.set_ylim(bottom - 0.05 * (max(late) - bottom), max(late) + 0.05 * (max(late) - bottom))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


@_literally
def plot_predicted_against_actual(assessed: Mapping[str, Sequence[Assessed]], metric: str) -> Figure:
    """Plots predicted against annealed values with their intervals, and the diagonal on which they agree.

    Args:
        assessed: Label -> predictions with the values after real anneals.
        metric: Name of the metric, for both axes.
    """
    figure = Figure(figsize=(6, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    actual = [each.case.outcome.annealed for each in itertools.chain(*assessed.values())]
    for marker, (label, several) in zip(itertools.cycle("osD^v"), assessed.items(), strict=False):
        x = [each.case.outcome.annealed for each in several]
        half = [
            [each.prediction.value - each.prediction.low for each in several],
            [each.prediction.high - each.prediction.value for each in several],
        ]
        y = [each.prediction.value for each in several]
        axes.errorbar(x, y, half, fmt=marker, markersize=4, elinewidth=0.6, alpha=0.7, label=label)
    if actual:
        low, high = min(actual), max(actual)
        reach = 0.05 * (high - low) or 0.05 * abs(low)
        # Shows whole intervals, unless they are much wider than the range of annealed values.
        predictions = [each.prediction for each in itertools.chain(*assessed.values())]
        bottom = max(min(low, *(each.low for each in predictions)), 2 * low - high - reach)
        top = min(max(high, *(each.high for each in predictions)), 2 * high - low + reach)
        axes.set(xlim=(low - reach, high + reach), ylim=(bottom - reach, top + reach))
        # The corner below the diagonal is empty.
        axes.legend(loc="lower right")
    axes.axline((min(actual, default=0.0),) * 2, slope=1, color=rcParams["axes.edgecolor"], linewidth=0.8)
    axes.set(xlabel=f"{metric}, annealed for real", ylabel=f"{metric}, predicted", aspect="equal")
    axes.grid(alpha=0.3)
    return figure


@_literally
def plot_errors(errors: Mapping[str, Mapping[str, Sequence[float]]], unit: str, what: str) -> Figure:
    """Plots the absolute error of each prediction as a dot, and the mean of each group and series as a bar.

    Args:
        errors: Group (place on the horizontal axis) -> series (colour) -> errors.
        unit: Unit of the errors.
        what: Meaning of the groups; labels the horizontal axis.
    """
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(itertools.chain.from_iterable(errors.values())))
    for place, name in enumerate(names):
        shift = (place - (len(names) - 1) / 2) * 0.8 / len(names)
        at = [(x + shift, abs(e)) for x, group in enumerate(errors.values()) for e in group.get(name, ())]
        if at:
            axes.plot(*zip(*at, strict=True), ".", color=f"C{place}", alpha=0.4)
        groups = [(x, group[name]) for x, group in enumerate(errors.values()) if group.get(name)]
        means = [(x + shift, sum(map(abs, several)) / len(several)) for x, several in groups]
        if means:
            axes.plot(*zip(*means, strict=True), "_", color=f"C{place}", markersize=22, markeredgewidth=2.5, label=name)
    axes.set_xticks(range(len(errors)), list(errors))
    axes.set(xlabel=what, ylabel=f"absolute error ({unit}); bars: mean")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside upper center", ncols=len(names))
    return figure


@_literally
def plot_heat_maps(
    panels: Mapping[str, Mapping[tuple[int, int], float]], horizontal: str, vertical: str, title: str
) -> Figure:
    """Plots values over pairs of numbers as heat maps with one colour scale; each cell shows its value.

    Args:
        panels: Title of a map -> (horizontal, vertical) -> value; pairs may be missing.
        horizontal: Meaning of the first numbers; labels the horizontal axis.
        vertical: Meaning of the second numbers; labels the vertical axis.
        title: Title of the figure.
    """
    everything = [value for values in panels.values() for value in values.values()]
    columns = sorted({pair[0] for values in panels.values() for pair in values})
    rows = sorted({pair[1] for values in panels.values() for pair in values})
    num_across = min(3, max(1, len(panels)))
    num_down = max(1, -(-len(panels) // num_across))
    width, height = num_across * (1.5 + 0.8 * len(columns)), 1 + num_down * (1.2 + 0.6 * len(rows))
    figure = Figure(figsize=(max(6, width), height), dpi=120, layout="constrained")
    figure.suptitle(title)
    for (label, values), axes in zip(
        panels.items(), figure.subplots(num_down, num_across, squeeze=False).flat, strict=False
    ):
        grid = [[values.get((column, row), np.nan) for column in columns] for row in rows]
        axes.imshow(grid, cmap="viridis", vmin=min(everything), vmax=max(everything), aspect="auto", origin="lower")
        for (column, row), value in values.items():
            is_dark = value < (min(everything) + max(everything)) / 2
            place = columns.index(column), rows.index(row)
            axes.text(*place, f"{value:.4g}", ha="center", va="center", color="white" if is_dark else "black")
        axes.set_xticks(range(len(columns)), list(map(str, columns)))
        axes.set_yticks(range(len(rows)), list(map(str, rows)))
        axes.set(title=label, xlabel=horizontal, ylabel=vertical)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    return figure


@_literally
def plot_line(values: Mapping[float, float], marks: Mapping[str, float], metric: str) -> Figure:
    """Plots a metric along a line through checkpoints.

    Args:
        values: Distance from the first checkpoint -> value.
        marks: Name of a checkpoint -> its distance.
        metric: Label of the axis.
    """
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(list(values), list(values.values()), ".-", color=PREDICTED)
    for name, at in marks.items():
        nearest = min(values, key=lambda x: abs(x - at))
        axes.plot(at, values[nearest], "o", color=MERGED, markersize=7)
        axes.annotate(name, (at, values[nearest]), (0, 9), textcoords="offset points", ha="center")
    axes.set(xlabel="distance from the first, in weights", ylabel=metric)
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    return figure


@_literally
def plot_plane(
    values: Mapping[tuple[float, float], float], marks: Mapping[str, tuple[float, float]], metric: str
) -> Figure:
    """Plots contours of a metric on a plane through checkpoints, with the same scale on both axes.

    Args:
        values: Place -> value, on a full grid.
        marks: Name -> place of a point to mark.
        metric: Label of the colours.
    """
    columns, rows = sorted({x for x, _ in values}), sorted({y for _, y in values})
    grid = np.array([[values[x, y] for x in columns] for y in rows])
    height = 1 + 5.5 * (rows[-1] - rows[0]) / (columns[-1] - columns[0])
    figure = Figure(figsize=(7, min(max(height, 3.0), 9.0)), dpi=120, layout="constrained")
    axes = figure.subplots()
    # Levels at quantiles: most of the plane may have far higher values than the part between the checkpoints.
    levels = np.unique(np.quantile(grid[np.isfinite(grid)], np.linspace(0, 1, 16)))
    drawn = axes.contourf(columns, rows, grid, levels=levels, cmap="viridis")
    axes.contour(columns, rows, grid, levels=levels, colors="black", linewidths=0.3)
    figure.colorbar(drawn, label=metric)
    for name, place in marks.items():
        axes.plot(*place, "o", color="white", markeredgecolor="black", markersize=8)
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "alpha": 0.8, "linewidth": 0}
        axes.annotate(name, place, (0, 10), textcoords="offset points", ha="center", color="black", bbox=box)
    axes.set(xlabel="distance in weights", ylabel="distance in weights", aspect="equal")
    return figure


def picture(figure: Figure, transparent: bool = False) -> bytes:
    """Returns the figure as the bytes of a PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", transparent=transparent)
    return content.getvalue()


def light_and_dark(draw: Callable[[], Figure]) -> tuple[bytes, bytes]:
    """Returns a figure as two PNGs with transparent backgrounds, for light and for dark pages."""
    light = picture(draw(), transparent=True)
    with style.context("dark_background"):
        return light, picture(draw(), transparent=True)
