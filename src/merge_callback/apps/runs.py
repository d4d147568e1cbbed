"""Reads back the metrics that a run's CSVLogger wrote."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_callback.prediction.bias import Prediction
from merge_callback.utilities.tables import NOTHING, number


@dataclass(frozen=True)
class Validation:
    """One validation of a run: optimizer steps done, live value, and what the callback logged; None if nothing."""

    step: int
    live: float
    merged: float | None
    gain: float | None
    predicted: Prediction | None = None
    # Of a decay that begins here, and the step at which it would end.
    forecast: Prediction | None = None
    forecast_end: float | None = None
    span_steps: float | None = None
    seconds: float | None = None


def validation_table(validations: Sequence[Validation]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of a table of validations. Predictions and forecasts have a column if there are any.

    A dash stands for a value that was not logged.
    """
    header, rows = ["step", "live", "merged", "gain"], []
    signs = ["", "", "+", "", ""]
    kinds = {"annealed (predicted)": "predicted", "if annealed now (forecast)": "forecast"}
    shown = {name: kind for name, kind in kinds.items() if any(getattr(each, kind) for each in validations)}
    for each in validations:
        found = [getattr(each, kind) for kind in shown.values()]
        values = [each.live, each.merged, each.gain, *(None if made is None else made.value for made in found)]
        cells = [NOTHING if value is None else number(value, sign) for value, sign in zip(values, signs, strict=False)]
        rows.append([str(each.step), *cells])
    return [*header, *shown], rows


def read_validations(metrics_file: Path, metric: str) -> list[Validation]:
    """Reads the validations that a run's CSVLogger wrote; of several callbacks those of the default or first one.

    Args:
        metrics_file: The logger's ``metrics.csv``.
        metric: Name of the metric, such as ``"val_loss"``.

    Raises:
        ValueError: If the file has no such metric; the message names those it has.
    """
    with metrics_file.open(newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or ()
        if metric not in names:
            raise ValueError(f"{metrics_file} has no metric {metric!r}; it has: {', '.join(names)}")
        rows = [row for row in reader if row[metric]]
    label = _label(names)

    def number(row: dict[str, str], name: str) -> float | None:
        return float(row[name]) if row.get(name) else None

    def prediction(row: dict[str, str], kind: str) -> Prediction | None:
        name = f"{kind}{label}/{metric}"
        value, low, high = (number(row, key) for key in (name, f"{name}/low", f"{name}/high"))
        return None if value is None or low is None or high is None else Prediction(value, low, high)

    return [
        Validation(
            # Lightning's loggers count steps from zero: the row of step 74 is written when 75 are done.
            step=int(row["step"]) + 1,
            live=float(row[metric]),
            merged=number(row, f"merged{label}/{metric}"),
            gain=number(row, f"merge_gain{label}/{metric}"),
            predicted=prediction(row, "annealed"),
            forecast=prediction(row, "forecast"),
            forecast_end=number(row, f"merge{label}/forecast_end"),
            span_steps=number(row, f"merge{label}/span_steps"),
            seconds=number(row, f"merge{label}/seconds"),
        )
        for row in rows
    ]


def merged_metrics(metrics_file: Path) -> list[str]:
    """Returns the names of the metrics that have merged values in a ``metrics.csv``."""
    with metrics_file.open(newline="") as file:
        names = csv.DictReader(file).fieldnames or ()
    prefix = f"merged{_label(names)}/"
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _label(names: Sequence[str]) -> str:
    """Returns the label of the callback to read: the default one if it is there, else the first one.

    A callback's name begins the labels of its further merges, so the shortest label of all is one of a primary merge.
    """
    labels = [found[1] for name in names if (found := re.match(r"merged(_[^/]*)?/", name))]
    return min((label or "" for label in labels), key=len, default="")
