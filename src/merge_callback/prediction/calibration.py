"""What real anneals say about a run's merges: their records joined with the run's own validations, into predictions."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from merge_callback.prediction.bias import (
    MIN_BRANCHES,
    BranchOutcome,
    Calibration,
    Prediction,
    age_weight,
    calibrate,
    forecast,
    pooled_branches,
)
from merge_callback.prediction.records import (
    AnnealRecord,
    StableValidation,
    append_record,
    completed,
    read_records,
    run_identity,
)

PRIOR = "prior"
# Decays whose spans differ by less than this factor are of one kind.
SAME_SPAN_FACTOR = 1.5


@dataclass(frozen=True)
class AnnealFit:
    """What a prediction stands on: decays of one kind, by a few words."""

    span: float
    shape: str
    source: str
    calibration: Calibration
    offset: Calibration | None

    def predict(self, now: StableValidation, metric: str) -> Prediction:
        """The annealed value for what the trunk knows now."""
        return self.calibration.predict(now.live[metric], now.merged[metric])

    def __str__(self) -> str:
        ratio = f"rho = {self.calibration.coefficient:.3f}"
        return f"a {self.shape} decay over the last {self.span:.0%} of the steps, by {self.source} ({ratio})"


class AnnealCalibration:
    """Predicts what a run would be if it were annealed now, from records of real anneals.

    Branches of the run itself count, as far as they have ended, where there are two of a kind, and with less weight
    those of other runs in the same file; below two these stand alone. Either way the trunk must have merged by the same
    rule as now, so a file serves one rule. The kind is the one whose span is nearest to that of the merge.

    Args:
        source: File of records, which may grow while the run goes on, or not be there yet; ``"prior"`` for what this
            project's own benchmark found, with the spread over its runs as interval.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.source = source
        self.records: list[AnnealRecord] = []

    def read(self) -> None:
        """Reads the file as it is now.

        Raises:
            ValueError: If a line is no record; what was read before stays.
        """
        if self.source != PRIOR:
            self.records = read_records(self.source)

    def update(self, history: Sequence[StableValidation], may_write: bool) -> str | None:
        """Reads the file again, and adds to the records of this run's branches what its validations know by now.

        Args:
            history: Validations of this run.
            may_write: Whether this process is the one that writes.

        Returns:
            What went wrong, in words; a run goes on without.
        """
        if self.source == PRIOR:
            return None
        try:
            found, run = read_records(self.source), run_identity(history)
            self.records = [completed(record, history) if record.run == run else record for record in found]
            for record, old in zip(self.records, found, strict=True):
                if record != old and may_write:
                    append_record(self.source, record)
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def basis(self, history: Sequence[StableValidation], metric: str) -> AnnealFit | None:
        """What a prediction at the newest validation can stand on; None while uncalibrated."""
        now, run = history[-1], run_identity(history)
        if self.source == PRIOR:
            return _nearest(_prior(), now)
        alike = [record for record in self.records if record.matched is not None and record.matched.rule == now.rule]
        known = [record for record in alike if record.run != run or record.step <= now.step]
        stood_on: dict[bool, list[AnnealFit]] = {True: [], False: []}
        for kind in _kinds(known):
            own = _outcomes((record for record in kind if record.run == run), metric, now.step)
            others = _outcomes((record for record in kind if record.run != run), metric, None)
            if (basis := _basis(own, others, kind)) is not None:
                stood_on[len(own) >= MIN_BRANCHES].append(basis)
        return _nearest(stood_on[True], now) or _nearest(stood_on[False], now)

    def predict(self, history: Sequence[StableValidation], metric: str) -> Prediction | None:
        """The annealed value at the newest validation, matched; None while uncalibrated."""
        basis = self.basis(history, metric)
        return basis.predict(history[-1], metric) if basis is not None and metric in history[-1].merged else None

    def forecast(self, history: Sequence[StableValidation], metric: str, span_steps: int) -> Prediction | None:
        """The value at the end of a decay over so many steps that begins now; None while there is too little to go by.

        Stands on the offset between merge and anneal of earlier branches, and on merges of the last half of the run.
        """
        basis = self.basis(history, metric)
        known = [values for values in history if metric in values.merged and values.rule == history[-1].rule]
        if basis is None or basis.offset is None or not known:
            return None
        steps, merged = [values.step for values in known], [values.merged[metric] for values in known]
        return forecast(steps, merged, basis.offset, history[-1].step + span_steps)


def _kinds(records: Iterable[AnnealRecord]) -> list[list[AnnealRecord]]:
    kinds: list[list[AnnealRecord]] = []
    for record in records:
        for kind in kinds:
            if kind[0].shape == record.shape and is_same_span(kind[0].span, record.span):
                kind.append(record)
                break
        else:
            kinds.append([record])
    return kinds


def _basis(own: list[BranchOutcome], others: list[BranchOutcome], kind: Sequence[AnnealRecord]) -> AnnealFit | None:
    outcomes = pooled_branches(own, others)
    calibration = calibrate(outcomes)
    if calibration is None:
        return None
    counted = {"of this run": len(own) if len(own) >= MIN_BRANCHES else 0, "of other runs": len(others)}
    sources = [f"{number} real anneals {whose}" for whose, number in counted.items() if number]
    span = math.exp(math.fsum(math.log(record.span) for record in kind) / len(kind))
    return AnnealFit(
        span,
        kind[0].shape,
        " and ".join(sources),
        calibration,
        calibrate(outcomes, "offset"),
    )


def _outcomes(records: Iterable[AnnealRecord], metric: str, now: int | None) -> list[BranchOutcome]:
    """With the weights of their age, if they are of one run that is now at a step."""
    return [
        replace(outcome, weight=1.0 if now is None else age_weight(record.step, now))
        for record in records
        if (outcome := record.outcome(metric)) is not None
    ]


def _nearest(bases: Sequence[AnnealFit], now: StableValidation) -> AnnealFit | None:
    """By span, on a scale of factors; among shapes the linear one, which is what a uniform merge stands for."""
    share = max(now.span_steps, 1) / now.step
    return min(bases, key=lambda b: (round(abs(math.log(b.span / share)), 1), b.shape != "linear"), default=None)


def is_same_span(span: float, other: float) -> bool:
    """Whether decays over these shares of the steps are of one kind."""
    return max(span, other) / min(span, other) < SAME_SPAN_FACTOR


@cache
def _prior() -> list[AnnealFit]:
    kinds = json.loads((files("merge_callback.prediction") / "prior.json").read_text())["kinds"]
    return [
        AnnealFit(kind["span"], kind["shape"], "the prior", Calibration(form="relative", **kind["relative"]), None)
        for kind in kinds
    ]
