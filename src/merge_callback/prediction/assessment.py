"""Measures prediction errors: each real anneal is predicted from earlier ones, or from other runs. Pure functions."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """One metric of one real anneal, with the matching live and merged values of the stable run."""

    run: str
    step: int
    span: float
    shape: str
    outcome: BranchOutcome

    def is_like(self, other: "Case") -> bool:
        """Returns True if both decays have the same shape and about the same span, as a share of the steps."""
        return self.shape == other.shape and is_same_span(self.span, other.span)


@dataclass(frozen=True)
class Assessed:
    """A case and its prediction, which was made without the case itself."""

    case: Case
    prediction: Prediction

    @property
    def error(self) -> float:
        """The predicted minus the annealed value."""
        return self.prediction.value - self.case.outcome.annealed

    @property
    def is_inside(self) -> bool:
        """Whether the annealed value lies in the predicted interval."""
        return self.prediction.low <= self.case.outcome.annealed <= self.prediction.high


@dataclass(frozen=True)
class Summary:
    """Errors of several predictions in the metric's unit; ``inside`` is the share of intervals that held the value."""

    num_cases: int
    mean_absolute: float
    bias: float
    worst: float
    inside: float


def cases_of(records: Iterable[AnnealRecord], metric: str) -> list[Case]:
    """Returns a case for each record that has the metric and matched values of the stable run."""
    return [
        Case(record.run, record.step, record.span, record.shape, outcome)
        for record in records
        if (outcome := record.outcome(metric)) is not None
    ]


def errors_by_span(assessed: Mapping[str, Sequence[Assessed]]) -> dict[str, dict[str, list[float]]]:
    """Groups errors by the length of the decay, in per cent of the steps at its end, the shortest first.

    Args:
        assessed: Label -> predictions of that kind.

    Returns:
        Length, such as ``"10%"`` -> label -> errors.
    """
    spans = sorted(each.case.span for several in assessed.values() for each in several)
    found: dict[str, dict[str, list[float]]] = {f"{span:.0%}": {label: [] for label in assessed} for span in spans}
    for label, several in assessed.items():
        for each in several:
            found[f"{each.case.span:.0%}"][label].append(each.error)
    return found


def from_earlier(cases: Sequence[Case], form: Form = "ratio", *, weighted: bool = True) -> list[Assessed]:
    """Predicts every case from the earlier cases of the same run and kind. Cases with fewer than two are left out.

    Args:
        cases: Cases of one or several runs.
        form: Form of the fit, as in `merge_callback.prediction.bias.Calibration`.
        weighted: Whether older cases count less (`merge_callback.prediction.bias.age_weight`), as in a live run.
    """

    def weight(case: Case, other: Case) -> float:
        if other.run != case.run or other.step >= case.step:
            return 0.0
        return age_weight(other.step, case.step) if weighted else 1.0

    return _assess(cases, weight, form)


def from_other_runs(
    cases: Sequence[Case], is_source: Callable[[Case], bool] = lambda case: True, form: Form = "ratio"
) -> list[Assessed]:
    """Predicts every case from the cases of the same kind in other runs.

    Args:
        cases: Cases of several runs.
        is_source: Returns True for the cases that may be used for the fit; all by default.
        form: Form of the fit, as in `merge_callback.prediction.bias.Calibration`.
    """
    return _assess(cases, lambda case, other: float(other.run != case.run and is_source(other)), form)


def from_earlier_and_others(cases: Sequence[Case], form: Form = "ratio") -> list[Assessed]:
    """Predicts every case from earlier cases of its run together with those of other runs: see `bias.pooled_branches`.

    As in `from_earlier`, cases with fewer than two earlier ones in their own run are left out.

    Args:
        cases: Cases of several runs.
        form: Form of the fit, as in `merge_callback.prediction.bias.Calibration`.
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
    """Returns mean absolute error, mean error, worst absolute error and interval coverage; NaN without cases."""
    errors = [each.error for each in assessed]
    if not errors:
        return Summary(0, math.nan, math.nan, math.nan, math.nan)
    mean_absolute = math.fsum(map(abs, errors)) / len(errors)
    inside = sum(each.is_inside for each in assessed) / len(errors)
    return Summary(len(errors), mean_absolute, math.fsum(errors) / len(errors), max(map(abs, errors)), inside)


def _assess(cases: Sequence[Case], weight: Callable[[Case, Case], float], form: Form) -> list[Assessed]:
    """Predicts each case from the cases of its kind whose weight for it is not zero."""
    assessed = []
    for case in cases:
        weighed = [(other, weight(case, other)) for other in cases if other.is_like(case)]
        known = [replace(other.outcome, weight=counts) for other, counts in weighed if counts]
        assessed += _assessed(case, known, form)
    return assessed


def _assessed(case: Case, known: Sequence[BranchOutcome], form: Form) -> list[Assessed]:
    """Returns a list with the predicted case, or an empty list if there are too few branches for a fit."""
    calibration = calibrate(known, form)
    if calibration is None:
        return []
    return [Assessed(case, calibration.predict(case.outcome.live, case.outcome.merged))]
