"""Predicts annealed values from merged ones: gains, bias fits on real anneals, intervals, forecasts. Pure functions.

An anneal is a real decay of the learning rate; a branch is an anneal that starts from a checkpoint of the stable run. A
merge approximates the result of an anneal with a regular bias. For a metric with live value ``L``, merged value ``M``
and annealed value ``A``, the *gain ratio* is ``rho = (L - A) / (L - M)``: how much more the anneal gains than the
merge. The *recovered share* is ``1 / rho``: the part of the anneal's gain that the merge has. An anneal is predicted as
``L - rho (L - M)``, with ``rho`` from earlier anneals. The signs cancel, so this also holds for metrics where more is
better.

**What the intervals assume.** The errors of the earlier branches and the next error are independent draws from one
normal distribution, of the same size in the metric's unit. The interval then follows Student's distribution, and is
wide after two branches. Within one run the bias changes as training goes on. Older branches therefore count less, in
the fit and in the size of the next error (`age_weight`). Branches of other runs together count as much as a few of the
run's own (`pooled_branches`). An interval does not cover changes of the training itself, such as new data.

*Matched* values belong to a window that ends where the decay ends. *Forecast* values belong to a window that ends where
the decay begins. A fit on one kind says nothing about the other, and this file never mixes them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import stdtrit

# What nobody measures; sums of squares of smaller values are finite.
HUGE = 1e100
# Share of the cases that an interval should contain.
LEVEL = 0.9
# Fewer branches give no estimate of the error.
MIN_BRANCHES = 2
# All branches of other runs together count as this many of the run's own.
OTHER_RUNS_WEIGHT = 2.0


@dataclass(frozen=True)
class BranchOutcome:
    """One metric of one branch: live, merged and annealed value, and the weight of the branch in a fit."""

    live: float
    merged: float
    annealed: float
    weight: float = 1.0

    @property
    def is_finite(self) -> bool:
        """Whether all three values are finite, and not so large that their squares are not."""
        return all(abs(value) < HUGE for value in (self.live, self.merged, self.annealed))


@dataclass(frozen=True)
class Prediction:
    """A predicted value and its interval, which should contain the real value in nine cases of ten by default."""

    value: float
    low: float
    high: float


def curvature_gain(coefficients: Mapping[int, float], losses: Mapping[int, float], merged: float) -> float | None:
    """Returns the weighted mean loss of the merged snapshots minus the loss of the merge.

    To second order around a minimum it is ``1/2 * sum_(i<j) c_i c_j (x_i - x_j)' H (x_i - x_j)``. So it is positive if
    the snapshots lie around a minimum rather than on one slope. It says nothing about the latest snapshot. For the
    uniform merge this is the second-order expansion of arXiv 2505.12082 ("theoretical analysis").

    Args:
        coefficients: Snapshot step -> coefficient, summing to one.
        losses: Step -> live loss.
        merged: Loss of the merge.

    Returns:
        The gain in units of the loss; None if the loss of a snapshot with a coefficient is unknown.

    Examples:
        >>> curvature_gain({10: 0.5, 20: 0.5}, {10: 1.5, 20: 1.25}, merged=1.0)
        0.375
    """
    used = {step: value for step, value in coefficients.items() if value}
    if not used or any(step not in losses for step in used):
        return None
    return sum(value * losses[step] for step, value in used.items()) - merged


def recovered_share(outcome: BranchOutcome) -> float:
    """Returns the share of the decay's gain that the merge has; NaN if the decay changed nothing.

    Examples:
        >>> recovered_share(BranchOutcome(live=1.5, merged=1.125, annealed=1.0))
        0.75
    """
    change = outcome.live - outcome.annealed
    return (outcome.live - outcome.merged) / change if change else math.nan


def gain_ratio(outcome: BranchOutcome) -> float:
    """Returns ``rho``, the decay's gain divided by the merge's; NaN if the merge changed nothing.

    Examples:
        >>> gain_ratio(BranchOutcome(live=1.5, merged=1.25, annealed=1.0))
        2.0
    """
    change = outcome.live - outcome.merged
    return (outcome.live - outcome.annealed) / change if change else math.nan


def age_weight(step: int, now: int) -> float:
    """Returns the weight of a branch that ended at ``step`` in a prediction at step ``now`` of the same run.

    The weight is ``(step / now) ** 2``. In the benchmark, predictions of late branches from those of the first quarter
    were the largest source of error.

    Examples:
        >>> age_weight(500, now=1000)
        0.25
    """
    return (step / now) ** 2


def pooled_branches(own: Sequence[BranchOutcome], others: Sequence[BranchOutcome]) -> list[BranchOutcome]:
    """Returns the branches for a fit: the run's own earlier ones, and those of other runs with less weight.

    A run has few branches of its own. In the benchmark both kinds together predicted better than either alone. With
    fewer than two branches of its own, only those of other runs are used, with full weight.

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
    """The bias of the merge, fitted on earlier branches, and the scatter of the branches around the fit.

    Args:
        form: ``"ratio"``: the decay gains ``coefficient`` times as much as the merge; the error does not depend on the
            gain. ``"offset"``: the decay ends ``coefficient`` below the merge. ``"relative"``: as ``"ratio"``, but the
            error is proportional to the gain, so the fit can be used for another run.
        coefficient: Gain ratio, or offset in the metric's unit.
        deviation: Standard deviation of the branches around the fit; for ``"relative"``, of the gain ratio.
        num_branches: Number of branches in the fit.
        weight: Sum of the squared regressors, from which the uncertainty of the coefficient follows. If branches have
            different weights: the sum for equally weighted branches that would give the same uncertainty.
    """

    form: Literal["ratio", "offset", "relative"]
    coefficient: float
    deviation: float
    num_branches: int
    weight: float

    def predict(self, live: float, merged: float, level: float = LEVEL) -> Prediction:
        """Returns the predicted annealed value and the interval that contains it in a share ``level`` of cases."""
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
        outcomes: One metric of each branch. All are either matched or forecast, of one span and shape. Branches with a
            NaN are left out.
        form: Form of the fit, as in `Calibration`.

    Returns:
        The fit; None with fewer than two branches, or if no merge differs from its live model.

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
    # math.fsum rounds once, so results do not depend on the vector units of the machine.
    norm = math.fsum(weights * regressors**2)
    if len(targets) < MIN_BRANCHES or norm == 0:
        return None
    coefficient = math.fsum(weights * (regressors * targets)) / norm
    residuals = targets - coefficient * regressors
    variance = math.fsum(weights * residuals**2) / math.fsum(weights) * len(targets) / (len(targets) - 1)
    weight = norm**2 / math.fsum(weights**2 * regressors**2)
    return Calibration(form, coefficient, math.sqrt(variance), len(targets), weight)


def _students(level: float, freedom: int) -> float:
    return float(stdtrit(freedom, (1 + level) / 2))
