"""Draws a merge as a figure for loggers."""

import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from merge_callback.merging.rules import decay_from_coefficients

# Colours that differ clearly on a white and on a black background.
LIVE, MERGED, PREDICTED, ANNEALED = "#888888", "#d1495b", "#0f97ad", "#d9902f"


def plot_merge(coefficients: Mapping[int, float]) -> Figure:
    """Plots the coefficients of a merge and, below, the learning-rate decay that it corresponds to.

    Args:
        coefficients: Snapshot step -> coefficient, oldest first, as `MergeCallback.coefficients` gives them.
    """
    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps, values = list(coefficients), list(coefficients.values())
    gap = min((newer - older for older, newer in itertools.pairwise(steps)), default=1)
    upper.bar(steps, values, width=0.8 * gap, color=MERGED)
    # A multiplier applies to the updates since the previous snapshot.
    lower.step(steps, decay_from_coefficients(values), where="pre", color=PREDICTED)
    upper.set(ylabel="coefficient", title=f"{len(steps)} snapshots up to step {steps[-1]}")
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
