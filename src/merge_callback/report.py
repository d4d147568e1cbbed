"""What a run says about itself: its metrics read back, and the picture of live and merged loss with the gain."""

import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_callback.prediction import Prediction
from merge_callback.records import AnnealRecord


@dataclass(frozen=True)
class Validation:
    """One validation of a run: optimizer steps done, live value, and what the callback said, as far as it did."""

    step: int
    live: float
    merged: float | None
    gain: float | None
    predicted: Prediction | None = None


def read_validations(metrics_file: Path, metric: str) -> list[Validation]:
    """The validations that a run's CSVLogger wrote.

    Args:
        metrics_file: The logger's ``metrics.csv``.
        metric: Name of the metric, such as ``"val_loss"``.

    Raises:
        ValueError: If the file has no such metric; the message names those it has.
    """
    with metrics_file.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if metric not in (reader.fieldnames or ()):
        raise ValueError(f"{metrics_file} has no metric {metric!r}; it has: {', '.join(reader.fieldnames or ())}")

    def number(row: dict[str, str], name: str) -> float | None:
        return float(row[name]) if row.get(name) else None

    def prediction(row: dict[str, str]) -> Prediction | None:
        name = f"annealed/{metric}"
        value, low, high = (number(row, key) for key in (name, f"{name}/low", f"{name}/high"))
        return None if value is None or low is None or high is None else Prediction(value, low, high)

    return [
        Validation(
            # Lightning's loggers count steps from zero: the row of step 74 is written when 75 are done.
            step=int(row["step"]) + 1,
            live=float(row[metric]),
            merged=number(row, f"merged/{metric}"),
            gain=number(row, f"merge_gain/{metric}"),
            predicted=prediction(row),
        )
        for row in rows
        if row[metric]
    ]


def plot_validations(
    validations: list[Validation], metric: str, title: str, anneals: Sequence[AnnealRecord] = ()
) -> Any:
    """A matplotlib figure: live, merged, predicted and annealed value over steps above, the merge's gain below.

    Args:
        validations: As `read_validations` gives them.
        metric: Name of the metric, and in parentheses its unit: label of the upper axis.
        title: Stands above the figure.
        anneals: Branches of this run that were really annealed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    merged = [validation for validation in validations if validation.merged is not None]
    upper.plot([v.step for v in validations], [v.live for v in validations], "o-", color="#888888", label="live")
    upper.plot([v.step for v in merged], [v.merged for v in merged], "o-", color="#d1495b", label="merged")
    predicted = [(v.step, v.predicted) for v in validations if v.predicted is not None]
    if predicted:
        steps, values = [step for step, _ in predicted], [p for _, p in predicted]
        band = [p.low for p in values], [p.high for p in values]
        upper.plot(steps, [p.value for p in values], "-", color="#00798c", label="annealed, as predicted")
        upper.fill_between(steps, *band, color="#00798c", alpha=0.2, linewidth=0)
    if anneals:
        ends = [(a.step, a.annealed[metric.partition(" ")[0]]) for a in anneals]
        upper.plot(*zip(*ends, strict=True), "*", color="#003d5b", markersize=11, label="annealed for real")
    upper.set_ylabel(metric)
    upper.set_title(title)
    upper.legend()
    lower.bar([v.step for v in merged], [v.gain for v in merged], width=_bar_width(validations), color="#d1495b")
    lower.axhline(0, color="black", linewidth=0.8)
    lower.set_ylabel("gain of the merge")
    lower.set_xlabel("optimizer steps")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return figure


def _bar_width(validations: list[Validation]) -> float:
    steps = [validation.step for validation in validations]
    return 0.6 * min((later - earlier for earlier, later in itertools.pairwise(steps)), default=1)
