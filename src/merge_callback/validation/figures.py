"""Draws a merge as a figure for loggers."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from merge_callback.merging.decays import decay_from_coefficients

# Colours that differ clearly on a white and on a black background.
LIVE, MERGED, PREDICTED, ANNEALED, FORECAST = "#888888", "#d1495b", "#0f97ad", "#d9902f", "#6a9a3b"


def plot_merge(coefficients: Mapping[int, float], intervals: Sequence[Sequence[int]] = ()) -> Figure:
    """Plots the coefficients of a merge and, below, the learning-rate decay that it corresponds to.

    Args:
        coefficients: Snapshot step -> coefficient, oldest first, as `MergeCallback.coefficients` gives them.
        intervals: First and last step of each snapshot that is a mean over steps; empty for points.
    """
    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps, values = list(coefficients), list(coefficients.values())
    multipliers = decay_from_coefficients(values)
    if intervals:
        begins, lengths = [first - 1 for first, _ in intervals], [last - first + 1 for first, last in intervals]
        upper.bar(begins, values, width=lengths, align="edge", color=MERGED, edgecolor="white")
        # Across an interval the multiplier falls in a straight line.
        lower.plot([*begins, steps[-1]], [*multipliers, 0.0], color=PREDICTED)
    else:
        gap = min((newer - older for older, newer in itertools.pairwise(steps)), default=1)
        upper.bar(steps, values, width=0.8 * gap, color=MERGED)
        # A multiplier applies to the updates since the previous snapshot.
        lower.step(steps, multipliers, where="pre", color=PREDICTED)
    what = "means" if intervals else "snapshots"
    upper.set(ylabel="coefficient", title=f"{len(steps)} {what} up to step {steps[-1]}")
    lower.set(ylabel="implied learning rate", xlabel="optimizer steps")
    lower.set_ylim(bottom=min(0.0, *lower.get_ylim()))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return figure


def pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """Returns the pixels of the figure as RGB values, ``[height, width, 3]``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
