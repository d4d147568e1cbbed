"""Real decays of the forecast benchmark's records, with what was known when they began, and what the package says."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trunks import FIRST_QUARTER, TRUNKS

from merge_callback.prediction.bias import Prediction
from merge_callback.prediction.forecasts import NoForecastError, forecast
from merge_callback.prediction.records import read_records
from merge_callback.prediction.river import Decay, composition
from merge_callback.prediction.validations import FurtherMerge, StableValidation

RECORDS = Path(__file__).parent / "records"
METRIC = "val_loss"
# What the package knows of a run. Of SGD it would say nothing, so the report does not tell it.
OPTIMIZERS = {"muon": "Muon, AdamW"}


@dataclass(frozen=True)
class Outcome:
    """One real anneal, and what was known when it began."""

    run: str
    decay: Decay
    is_late: bool
    annealed: float
    history: tuple[StableValidation, ...]

    @property
    def span(self) -> float:
        """Its length as a share of the steps at its end, as planned."""
        return round(self.decay.span, 2)


def validations(trunk: Mapping[str, Any], optimizer: str = "") -> list[StableValidation]:
    """Those of a trunk that had merges, as the callback keeps them."""
    found = []
    for each in trunk["validations"]:
        if not each["coefficients"]:
            continue
        steps, step = each["snapshots"], each["step"]
        made = {name: composition(steps, c, step, 1, 1.0) for name, c in each["coefficients"].items()}
        found.append(
            StableValidation(
                step=step,
                span_steps=steps[-1] - steps[0],
                live={METRIC: each["live"]},
                merged={METRIC: each["merged/val_loss"]},
                rule="sma",
                composition=made["sma"],
                further=(FurtherMerge(made["wma"], {METRIC: each["merged_wma/val_loss"]}),),
                optimizer=optimizer,
            )
        )
    return found


def outcomes(run: str) -> list[Outcome]:
    """All anneals of a trunk."""
    trunk = json.loads((RECORDS / run / "trunk.json").read_text())
    known = validations(trunk, OPTIMIZERS.get(run, ""))
    return [
        Outcome(
            run=run,
            decay=Decay(record.start_step, record.span_steps, record.shape),
            is_late=record.start_step > FIRST_QUARTER * trunk["num_steps"],
            annealed=record.annealed[METRIC],
            history=tuple(each for each in known if each.step <= record.start_step),
        )
        for record in read_records(RECORDS / run / "anneals.jsonl")
    ]


def all_outcomes() -> list[Outcome]:
    """Those of all trunks that have records."""
    runs = [name for name in TRUNKS if (RECORDS / name / "anneals.jsonl").exists()]
    return [each for run in runs for each in outcomes(run)]


def by_river(outcome: Outcome, *, with_ring: bool = True) -> Prediction | None:
    """The forecast of the package, of ring and history or of the history alone; None where it refuses."""
    history = outcome.history
    if not with_ring:
        history = tuple(replace(each, further=()) for each in history)
    try:
        return forecast(history, METRIC, outcome.decay).prediction
    except NoForecastError:
        return None
