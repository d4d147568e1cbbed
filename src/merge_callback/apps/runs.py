"""Reads back the metrics that a run's CSVLogger wrote."""

import csv
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
    span_steps: float | None = None
    seconds: float | None = None


VALIDATION_HEADER = ["step", "live", "merged", "gain", "annealed (predicted)"]


def validation_cells(validation: Validation) -> list[str]:
    """Returns a table row for `VALIDATION_HEADER`; a dash stands for a value that was not logged."""
    predicted = validation.predicted.value if validation.predicted is not None else None
    values = [validation.live, validation.merged, validation.gain, predicted]
    cells = [
        NOTHING if value is None else number(value, sign) for value, sign in zip(values, ["", "", "+", ""], strict=True)
    ]
    return [str(validation.step), *cells]


def read_validations(metrics_file: Path, metric: str) -> list[Validation]:
    """Reads the validations that a run's CSVLogger wrote.

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
            span_steps=number(row, "merge/span_steps"),
            seconds=number(row, "merge/seconds"),
        )
        for row in rows
        if row[metric]
    ]


def merged_metrics(metrics_file: Path) -> list[str]:
    """Returns the names of the metrics that have merged values in a ``metrics.csv``."""
    with metrics_file.open(newline="") as file:
        names = csv.DictReader(file).fieldnames or ()
    return [name.removeprefix("merged/") for name in names if name.startswith("merged/")]
