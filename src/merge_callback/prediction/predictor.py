"""Predicts annealed metrics from a run's own validations and records of real anneals."""

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from merge_callback.prediction.bias import (
    MIN_BRANCHES,
    BranchOutcome,
    Calibration,
    Prediction,
    age_weight,
    calibrate,
    curvature_gain,
    pooled_branches,
)
from merge_callback.prediction.records import AnnealRecord, RecordsFile, append_record, completed
from merge_callback.prediction.validations import StableValidation, read_validation, run_identity

PRIOR = "prior"
# Decays whose spans differ by less than this factor are of one kind.
SAME_SPAN_FACTOR = 1.5


@dataclass(frozen=True)
class AnnealFit:
    """The bias of the merge for one kind of decay, fitted on real decays of that kind."""

    span: float
    shape: str
    source: str
    calibration: Calibration

    def predict(self, now: StableValidation, metric: str) -> Prediction:
        """Returns the predicted annealed value of a metric from its live and merged values now."""
        return self.calibration.predict(now.live[metric], now.merged[metric])

    def __str__(self) -> str:
        ratio = f"rho = {self.calibration.coefficient:.3f}"
        return f"a {self.shape} decay over the last {self.span:.0%} of the steps, by {self.source} ({ratio})"


class AnnealPredictor:
    """Predicts the metrics that a run would have if it were annealed now.

    Predictions are fitted on branches of one kind: the same decay shape, and about the same span. The kind is the one
    whose span is nearest to that of the merge. If the run has at least two finished branches of the kind, these are
    used, and those of other runs in the file count less. Otherwise those of other runs are used alone. All of them must
    have been merged by the same rule as now, so a file serves one rule.

    Args:
        calibration: File of records. It may grow while the run goes on, and need not exist yet. ``"prior"`` uses the
            results of this project's benchmark, with the spread over its runs as the interval. None predicts nothing.
    """

    def __init__(self, calibration: str | os.PathLike[str] | None = None) -> None:
        self.calibration = calibration
        # Validations in which the primary merge was evaluated, in the same stable phase as the live model. Others,
        # such as skipped ones, are absent.
        self.history: list[StableValidation] = []
        # By metric, from the latest validation at a constant rate; kept while the rate decays.
        self.predictions: dict[str, Prediction] = {}
        # By metric, the fit of each prediction; not saved, so empty after a resume until the next validation.
        self.fits: dict[str, AnnealFit] = {}
        self._file = RecordsFile(calibration) if calibration is not None and not self.is_prior else None
        self._records: list[AnnealRecord] = []
        # The first validation, and the identity of the run that it makes.
        self._first: StableValidation | None = None
        self._run: str | None = None

    @property
    def run(self) -> str | None:
        """`run_identity` of the history."""
        first = self.history[0] if self.history else None
        if first is not self._first:
            self._first, self._run = first, run_identity(self.history)
        return self._run

    @property
    def is_prior(self) -> bool:
        """Whether predictions use the project's benchmark instead of records."""
        return self.calibration == PRIOR

    def read(self) -> list[str]:
        """Reads the file of records, and returns what is wrong with some of its lines, which are left out.

        Raises:
            ValueError: If the file has lines, but none is a record.
        """
        if self._file is None:
            return []
        self._records, problems = self._file.read()
        if problems and not self._records:
            raise ValueError(f"calibration={str(self.calibration)!r} holds no records of anneals: {problems[0]}")
        return problems

    def learn(self, validation: StableValidation, losses: Collection[str], *, may_write: bool) -> list[str]:
        """Adds a validation at a constant rate to the history and updates the predictions.

        Also reads the records again, and fills in missing values of this run's branches from its validations.

        Args:
            validation: Live and merged values.
            losses: Names of the metrics where less is better.
            may_write: Whether this process writes to the file of records.

        Returns:
            Why some records could not be read or written, in words; empty if all went well.
        """
        self.history.append(validation)
        if self.calibration is None:
            return []
        problems = self._update(may_write=may_write)
        self.fits = {metric: fit for metric in validation.merged if (fit := self.fit(metric, losses)) is not None}
        self.predictions = {metric: fit.predict(validation, metric) for metric, fit in self.fits.items()}
        return problems

    @property
    def own_anneals(self) -> list[AnnealRecord]:
        """The real anneals of this run that have begun by now."""
        return [each for each in self._records if each.run == self.run and each.start_step <= self.history[-1].step]

    def curvature_gain(self, metric: str, coefficients: Mapping[int, float], step: int) -> float | None:
        """Returns `bias.curvature_gain` at this step; None unless the merge and each snapshot in it were validated."""
        if not self.history or self.history[-1].step != step or metric not in self.history[-1].merged:
            return None
        losses = {known.step: known.live[metric] for known in self.history if metric in known.live}
        return curvature_gain(coefficients, losses, self.history[-1].merged[metric])

    def forget_since(self, step: int) -> None:
        """Drops the validations at that step and later."""
        self.history = [known for known in self.history if known.step < step]

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [asdict(values) for values in self.history],
            "predictions": {metric: asdict(prediction) for metric, prediction in self.predictions.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`; predictions only if ``calibration`` is not None."""
        self.history = [read_validation(values) for values in state["history"]]
        if self.calibration is not None:
            self.predictions = {metric: Prediction(**kept) for metric, kept in state["predictions"].items()}

    def _update(self, *, may_write: bool) -> list[str]:
        if self._file is None:
            return []
        try:
            found, problems = self._file.read()
            self._records = [completed(each, self.history) if each.run == self.run else each for each in found]
            for record, old in zip(self._records, found, strict=True):
                if record != old and may_write:
                    append_record(self._file.path, record)
        except OSError as error:
            return [str(error)]
        return problems

    def fit(self, metric: str, losses: Collection[str]) -> AnnealFit | None:
        """Returns the fit for predictions at the newest validation; None if there are too few branches."""
        now, run = self.history[-1], self.run
        if self.is_prior:
            # The benchmark behind the prior covers only losses, and runs whose merge was better than the live model.
            is_like_them = metric in losses and now.merged[metric] < now.live[metric]
            return _prior_for(now) if is_like_them else None
        alike = [each for each in self._records if each.matched is not None and each.matched.rule == now.rule]
        known = [each for each in alike if each.run != run or each.step <= now.step]
        fits: dict[bool, list[AnnealFit]] = {True: [], False: []}
        for kind in _kinds(known):
            own = _outcomes((each for each in kind if each.run == run), metric, now.step)
            others = _outcomes((each for each in kind if each.run != run), metric, None)
            if (fit := _fitted(own, others, kind)) is not None:
                fits[len(own) >= MIN_BRANCHES].append(fit)
        return _nearest(fits[True], now) or _nearest(fits[False], now)


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


def _fitted(own: list[BranchOutcome], others: list[BranchOutcome], kind: Sequence[AnnealRecord]) -> AnnealFit | None:
    outcomes = pooled_branches(own, others)
    calibration = calibrate(outcomes)
    if calibration is None:
        return None
    counted = {"of this run": len(own) if len(own) >= MIN_BRANCHES else 0, "of other runs": len(others)}
    sources = [f"{number} real anneals {whose}" for whose, number in counted.items() if number]
    span = math.exp(math.fsum(math.log(record.span) for record in kind) / len(kind))
    return AnnealFit(span, kind[0].shape, " and ".join(sources), calibration)


def _outcomes(records: Iterable[AnnealRecord], metric: str, now: int | None) -> list[BranchOutcome]:
    """Returns one metric of each record. If ``now`` is given, older branches count less (`bias.age_weight`)."""
    return [
        replace(outcome, weight=1.0 if now is None else age_weight(record.step, now))
        for record in records
        if (outcome := record.outcome(metric)) is not None
    ]


def _nearest(fits: Sequence[AnnealFit], now: StableValidation) -> AnnealFit | None:
    """Returns the fit with the nearest span on a log scale. Prefers linear decays: a uniform merge stands for one."""
    return min(fits, key=lambda b: (round(abs(math.log(b.span / now.share)), 1), b.shape != "linear"), default=None)


def is_same_span(span: float, other: float) -> bool:
    """Returns True if two decay spans, as shares of the steps, differ by less than `SAME_SPAN_FACTOR`."""
    return max(span, other) / min(span, other) < SAME_SPAN_FACTOR


def _prior_for(now: StableValidation) -> AnnealFit | None:
    """Returns the nearest fit of the prior. If the run is unlike those that it comes from, its source says so."""
    fit = _nearest(_prior(), now)
    if fit is None:
        return None
    source = fit.source
    if not now.is_like_adam:
        source += f", which comes from runs with AdamW and not {now.optimizer}"
    if not is_same_span(fit.span, now.share):
        source += f", whose windows are {'longer' if fit.span > now.share else 'shorter'} than this one"
    return replace(fit, source=source)


@cache
def _prior() -> list[AnnealFit]:
    kinds = json.loads((files("merge_callback.prediction") / "prior.json").read_text())["kinds"]
    return [
        AnnealFit(kind["span"], kind["shape"], "the prior", Calibration(form="relative", **kind["relative"]))
        for kind in kinds
    ]
