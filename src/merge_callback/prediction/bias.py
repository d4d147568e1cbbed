"""From a merge to the annealed value: gains, bias fits on real anneals, predictions with intervals, forecasts. Pure.

A merge is a biased proxy of what a real decay of the learning rate would give, with a regular bias. For a metric with
live value ``L``, merged value ``M`` and annealed value ``A``, the *gain ratio* ``rho = (L - A) / (L - M)`` says how
much more a decay gains than the merge, and the *recovered share* ``1 / rho`` how much of it the merge recovers. A decay
is predicted as ``L - rho (L - M)``, with ``rho`` from earlier decays. Signs cancel, so this holds for metrics where
more is better too.

**What the intervals assume.** Errors of the earlier branches are taken as independent draws from one normal
distribution, of the same size in the metric's own unit, and the next error as another draw; the interval is then
Student's, and wide after two branches. Within one run the bias changes as training goes on, so that earlier branches
count less (`age_weight`), in the fit and in what is expected of the next error; branches of other runs add what a few
of the run's own would (`pooled_branches`). An interval knows nothing of a training that changes its character.

*Matched* values belong to a window that ends with the decay, *forecast* values to one that ends where it begins. A fit
on the one says nothing about the other; nothing here mixes them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from scipy.special import stdtrit

if TYPE_CHECKING:
    from torch import Tensor

# Share of the cases that an interval is meant to hold.
LEVEL = 0.9
# Fewer branches say nothing about the size of the error.
MIN_BRANCHES = 2
# How many branches of its own a run's neighbours are worth to it, all together.
OTHER_RUNS_WEIGHT = 2.0
# A forecast looks at merges of this last share of the steps, and needs so many of them.
FORECAST_SHARE = 0.5
MIN_FORECAST_POINTS = 4


Value = TypeVar("Value", float, "Tensor")


@dataclass(frozen=True)
class BranchOutcome:
    """One metric of one branch: values of the live model, the merge and the real decay, and how much they count."""

    live: float
    merged: float
    annealed: float
    weight: float = 1.0

    @property
    def is_finite(self) -> bool:
        """Whether all three are numbers."""
        return all(map(math.isfinite, (self.live, self.merged, self.annealed)))


@dataclass(frozen=True)
class Prediction:
    """A predicted value, and the interval that is meant to hold the real one in nine cases of ten."""

    value: float
    low: float
    high: float


def gain(live: Value, other: Value, higher_is_better: bool = False) -> Value:
    """How much better another value is than the live one.

    Examples:
        >>> gain(1.5, 1.25), gain(0.5, 0.75, higher_is_better=True)
        (0.25, 0.25)
    """
    return other - live if higher_is_better else live - other


def curvature_gain(coefficients: Mapping[int, float], losses: Mapping[int, float], merged: float) -> float | None:
    """How far the loss of a merge lies below the mean loss of what was merged; None if a loss is not known.

    In second order around a minimum that is ``1/2 * sum_(i<j) c_i c_j (x_i - x_j)' H (x_i - x_j)``, so it is positive
    where the snapshots lie around a minimum rather than on one slope, and says nothing about the latest snapshot. For
    the uniform merge this is the second-order expansion of arXiv 2505.12082 ("theoretical analysis").

    Args:
        coefficients: By snapshot step, summing to one.
        losses: Live loss by step.
        merged: Loss of the merge.

    Examples:
        >>> curvature_gain({10: 0.5, 20: 0.5}, {10: 1.5, 20: 1.25}, merged=1.0)
        0.375
    """
    used = {step: value for step, value in coefficients.items() if value}
    if not used or any(step not in losses for step in used):
        return None
    return sum(value * losses[step] for step, value in used.items()) - merged


def recovered_share(outcome: BranchOutcome) -> float:
    """Share of a decay's gain that the merge has; NaN where the decay changed nothing.

    Examples:
        >>> recovered_share(BranchOutcome(live=1.5, merged=1.125, annealed=1.0))
        0.75
    """
    change = outcome.live - outcome.annealed
    return (outcome.live - outcome.merged) / change if change else math.nan


def gain_ratio(outcome: BranchOutcome) -> float:
    """``rho``: the decay's gain over the merge's; NaN where the merge changed nothing.

    Examples:
        >>> gain_ratio(BranchOutcome(live=1.5, merged=1.25, annealed=1.0))
        2.0
    """
    change = outcome.live - outcome.merged
    return (outcome.live - outcome.annealed) / change if change else math.nan


def age_weight(step: int, now: int) -> float:
    """How much a branch that ended at a step counts for a prediction at a later one of the same run.

    The square of the share of the steps that were done then: in the benchmark, what branches of the first quarter teach
    about later ones was the largest source of error.

    Examples:
        >>> age_weight(500, now=1000)
        0.25
    """
    return (step / now) ** 2


def pooled_branches(own: Sequence[BranchOutcome], others: Sequence[BranchOutcome]) -> list[BranchOutcome]:
    """What a prediction is fitted on: a run's own earlier branches, and with less weight those of other runs.

    A run's own branches are few; in the benchmark both together did better than either alone. Below two of its own the
    others stand alone.

    Examples:
        >>> branch = BranchOutcome(1.5, 1.4, 1.39)
        >>> [each.weight for each in pooled_branches([branch] * 2, [branch] * 8)]
        [1.0, 1.0, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25]
    """
    if len(own) < MIN_BRANCHES:
        return list(others)
    return [*own, *(replace(other, weight=OTHER_RUNS_WEIGHT / len(others)) for other in others)]


@dataclass(frozen=True)
class Calibration:
    """What earlier branches say about the next: the bias of the merge, and how far they scatter around it.

    Args:
        form: ``"ratio"``: the decay gains ``coefficient`` times what the merge gains; the error has one size, whatever
            the gain. ``"offset"``: the decay ends ``coefficient`` below the merge. ``"relative"``: as ``"ratio"``, with
            an error in proportion to the gain, so that it can be carried over to another run.
        coefficient: Gain ratio, or offset in the metric's unit.
        deviation: Standard deviation of the branches around the fit; of the gain ratio for ``"relative"``.
        num_branches: How many branches it was fitted on.
        weight: Sum of the squared regressors, for the uncertainty of the coefficient itself; of branches that count
            differently, that of as many alike as would leave it as uncertain.
    """

    form: Literal["ratio", "offset", "relative"]
    coefficient: float
    deviation: float
    num_branches: int
    weight: float

    def predict(self, live: float, merged: float, level: float = LEVEL) -> Prediction:
        """The annealed value for a live and a merged one, with the interval that holds it in this share of cases."""
        regressor, base = (1.0, merged) if self.form == "offset" else (live - merged, live)
        value = base - self.coefficient * regressor
        scale = abs(regressor) * math.sqrt(1 + 1 / self.weight)
        if self.form != "relative":
            scale = math.sqrt(1 + regressor**2 / self.weight) if self.weight else math.inf
        half = _students(level, self.num_branches - 1) * self.deviation * scale if self.deviation else 0.0
        return Prediction(value, value - half, value + half)


def calibrate(
    outcomes: Iterable[BranchOutcome], form: Literal["ratio", "offset", "relative"] = "ratio"
) -> Calibration | None:
    """Fits the bias of the merge on earlier branches, by weighted least squares.

    Args:
        outcomes: One metric of each branch, all of one alignment, span and shape. Those with a NaN are left out.
        form: As in `Calibration`.

    Returns:
        None below two branches, or if no merge differs from its live model: uncalibrated.

    Examples:
        >>> branches = [BranchOutcome(1.50, 1.40, 1.39), BranchOutcome(1.40, 1.32, 1.31)]
        >>> calibration = calibrate(branches)
        >>> round(calibration.coefficient, 2), round(calibration.predict(live=1.3, merged=1.2).value, 2)
        (1.11, 1.19)
        >>> calibrate(branches[:1]) is None
        True
    """
    used = [outcome for outcome in outcomes if outcome.is_finite]
    targets = np.array([c.merged - c.annealed if form == "offset" else c.live - c.annealed for c in used])
    regressors = np.array([1.0 if form == "offset" else c.live - c.merged for c in used])
    weights = np.array([c.weight for c in used])
    if form == "relative":
        is_moved = regressors != 0
        targets, weights = targets[is_moved] / regressors[is_moved], weights[is_moved]
        regressors = np.ones_like(targets)
    # Sums without rounding: the same on every machine, whatever its vector units.
    norm = math.fsum(weights * regressors**2)
    if len(targets) < MIN_BRANCHES or norm == 0:
        return None
    coefficient = math.fsum(weights * (regressors * targets)) / norm
    residuals = targets - coefficient * regressors
    variance = math.fsum(weights * residuals**2) / math.fsum(weights) * len(targets) / (len(targets) - 1)
    weight = norm**2 / math.fsum(weights**2 * regressors**2)
    return Calibration(form, coefficient, math.sqrt(variance), len(targets), weight)


def forecast(
    steps: Sequence[int], merged: Sequence[float], bias: Calibration, step: int, level: float = LEVEL
) -> Prediction | None:
    """Predicts a decay that has not begun: the value at its end, some steps from now.

    Extrapolates the merged curve as ``a + b log(step)``, fitted by least squares over the last half of the steps so
    far, to the end of the decay, and takes off the offset between merge and anneal that earlier branches had. The
    interval adds the scatter of the curve around the fit to that of the offset; it trusts the form, so it means little
    for a decay much longer than the steps it is fitted on.

    Args:
        steps: Optimizer steps of the validations so far, ascending.
        merged: The matched merge's value at each of them.
        bias: A calibration of form ``"offset"``, fitted on matched values of earlier branches.
        step: Optimizer steps at the end of the decay.
        level: Share of cases that the interval is meant to hold.

    Returns:
        None with fewer than four validations in the last half of the steps.

    Raises:
        ValueError: If the calibration is of another form.
    """
    if bias.form != "offset":
        raise ValueError(f"bias must be a calibration of form 'offset', got {bias.form!r}")
    points = [
        (math.log(at), value)
        for at, value in zip(steps, merged, strict=True)
        if at >= FORECAST_SHARE * steps[-1] and at > 0 and math.isfinite(value)
    ]
    if len(points) < MIN_FORECAST_POINTS:
        return None
    logs, values = np.array(points).T
    design = np.column_stack([np.ones_like(logs), logs])
    fitted, *_ = np.linalg.lstsq(design, values, rcond=None)
    residuals = values - design @ fitted
    at_end = np.array([1.0, math.log(step)])
    freedom = len(points) - 2
    scatter = float(residuals @ residuals) / freedom * (1 + float(at_end @ np.linalg.pinv(design.T @ design) @ at_end))
    of_curve = _students(level, freedom) * math.sqrt(scatter)
    of_bias = bias.predict(0.0, 0.0, level)
    half = math.hypot(of_curve, of_bias.high - of_bias.value)
    value = float(at_end @ fitted) - bias.coefficient
    return Prediction(value, value - half, value + half)


def _students(level: float, freedom: int) -> float:
    return float(stdtrit(freedom, (1 + level) / 2))
