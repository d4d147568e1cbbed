"""How well predictions of real anneals did: each predicted from the ones before it, or from other runs. Pure."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from merge_callback.prediction.bias import (
    MIN_BRANCHES,
    BranchOutcome,
    Prediction,
    age_weight,
    calibrate,
    pooled_branches,
)
from merge_callback.prediction.predictor import is_same_span
from merge_callback.prediction.records import AnnealRecord

Form = Literal["ratio", "offset", "relative"]


@dataclass(frozen=True)
class Case:
    """One metric of one real anneal, with the trunk's values that belong to it."""

    run: str
    step: int
    span: float
    shape: str
    outcome: BranchOutcome

    def is_like(self, other: "Case") -> bool:
        """Whether both decays are of one kind: the same shape, over about the same share of the steps."""
        return self.shape == other.shape and is_same_span(self.span, other.span)


@dataclass(frozen=True)
class Assessed:
    """A case, and what was predicted for it without having seen it."""

    case: Case
    prediction: Prediction

    @property
    def error(self) -> float:
        """Predicted minus annealed."""
        return self.prediction.value - self.case.outcome.annealed

    @property
    def is_inside(self) -> bool:
        """Whether the interval held the annealed value."""
        return self.prediction.low <= self.case.outcome.annealed <= self.prediction.high


@dataclass(frozen=True)
class Summary:
    """Errors of several predictions, in the metric's unit."""

    num_cases: int
    mean_absolute: float
    bias: float
    worst: float
    inside: float


def cases_of(records: Iterable[AnnealRecord], metric: str) -> list[Case]:
    """The matched cases among some records that have the metric."""
    return [
        Case(record.run, record.step, record.span, record.shape, outcome)
        for record in records
        if (outcome := record.outcome(metric)) is not None
    ]


def from_earlier(cases: Sequence[Case], form: Form = "ratio", *, weighted: bool = True) -> list[Assessed]:
    """Predicts every case from those of its own run and kind that ended before it, where there are two.

    Args:
        cases: Of one or several runs.
        form: As in `merge_callback.prediction.bias.Calibration`.
        weighted: Whether earlier ones count less, as in a run's own predictions.
    """

    def weight(case: Case, other: Case) -> float:
        if other.run != case.run or other.step >= case.step:
            return 0.0
        return age_weight(other.step, case.step) if weighted else 1.0

    return _assess(cases, weight, form)


def from_other_runs(
    cases: Sequence[Case], is_source: Callable[[Case], bool] = lambda case: True, form: Form = "ratio"
) -> list[Assessed]:
    """Predicts every case from those of its kind in other runs.

    Args:
        cases: Of several runs.
        is_source: Which cases may be learnt from.
        form: As in `merge_callback.prediction.bias.Calibration`.
    """
    return _assess(cases, lambda case, other: float(other.run != case.run and is_source(other)), form)


def from_earlier_and_others(cases: Sequence[Case], form: Form = "ratio") -> list[Assessed]:
    """Predicts every case as a run does that is given the records of other runs too: see `bias.pooled_branches`.

    Cases with fewer than two earlier ones in their own run are left out, as by `from_earlier`.

    Args:
        cases: Of several runs.
        form: As in `merge_callback.prediction.bias.Calibration`.
    """
    assessed = []
    for case in cases:
        alike = [other for other in cases if other.is_like(case)]
        earlier = [other for other in alike if other.run == case.run and other.step < case.step]
        own = [replace(other.outcome, weight=age_weight(other.step, case.step)) for other in earlier]
        if len(own) >= MIN_BRANCHES:
            known = pooled_branches(own, [other.outcome for other in alike if other.run != case.run])
            assessed += _assessed(case, known, form)
    return assessed


def summarise(assessed: Sequence[Assessed]) -> Summary:
    """Mean absolute error, signed bias, worst absolute error, and share of intervals that held; NaN without cases."""
    errors = [each.error for each in assessed]
    if not errors:
        return Summary(0, math.nan, math.nan, math.nan, math.nan)
    mean_absolute = math.fsum(map(abs, errors)) / len(errors)
    inside = sum(each.is_inside for each in assessed) / len(errors)
    return Summary(len(errors), mean_absolute, math.fsum(errors) / len(errors), max(map(abs, errors)), inside)


def _assess(cases: Sequence[Case], weight: Callable[[Case, Case], float], form: Form) -> list[Assessed]:
    """Each case by the others of its kind that have a weight for it."""
    assessed = []
    for case in cases:
        weighed = [(other, weight(case, other)) for other in cases if other.is_like(case)]
        known = [replace(other.outcome, weight=counts) for other, counts in weighed if counts]
        assessed += _assessed(case, known, form)
    return assessed


def _assessed(case: Case, known: Sequence[BranchOutcome], form: Form) -> list[Assessed]:
    """The case with its prediction; nothing while that is uncalibrated."""
    calibration = calibrate(known, form)
    if calibration is None:
        return []
    return [Assessed(case, calibration.predict(case.outcome.live, case.outcome.merged))]
