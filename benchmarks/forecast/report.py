"""Tables and pictures of the forecast benchmark, from its records.

    python benchmarks/forecast/report.py

Writes benchmarks/forecast/REPORT.md with its picture, and the table of docs/predicting.md and the README between their
marks. Read trunks.py first.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_callback.prediction.records import read_records
from merge_callback.prediction.river import Decay, composition
from merge_callback.prediction.validations import FurtherMerge, StableValidation

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from trunks import FIRST_QUARTER

FOLDER = Path(__file__).parent
RECORDS = FOLDER / "records"
METRIC = "val_loss"


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


def validations(trunk: Mapping[str, Any]) -> list[StableValidation]:
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
            )
        )
    return found


def outcomes(run: str) -> list[Outcome]:
    """All anneals of a trunk."""
    trunk = json.loads((RECORDS / run / "trunk.json").read_text())
    known = validations(trunk)
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
