"""Bias fits, and predictions against hand-worked numbers and against simulated errors."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_callback.prediction.bias import (
    BranchOutcome,
    calibrate,
    gain_ratio,
    pooled_branches,
    recovered_share,
)

values = st.floats(0.5, 3.0)
gains = st.floats(0.01, 0.3)


def test_the_first_measurement_of_the_field_recovers_nine_tenths():
    # Live 1.5056, merged 1.4081, annealed 1.3967.
    outcome = BranchOutcome(1.5056, 1.4081, 1.3967)
    assert round(recovered_share(outcome), 2) == 0.90
    assert gain_ratio(outcome) == pytest.approx(0.1089 / 0.0975)


def test_without_a_change_there_is_no_ratio():
    assert math.isnan(recovered_share(BranchOutcome(1.0, 1.0, 1.0)))
    assert math.isnan(gain_ratio(BranchOutcome(1.0, 1.0, 0.5)))


@given(st.lists(st.tuples(values, gains), min_size=2, max_size=8), st.floats(0.5, 2.0), values, gains)
def test_a_bias_that_is_a_ratio_is_found_and_predicted_exactly(branches, ratio, live, gain):
    calibration = calibrate([BranchOutcome(value, value - g, value - ratio * g) for value, g in branches])
    prediction = calibration.predict(live, live - gain)
    assert calibration.coefficient == pytest.approx(ratio)
    assert prediction.value == pytest.approx(live - ratio * gain)
    assert prediction.high - prediction.low < 1e-9


@given(st.lists(st.tuples(values, gains), min_size=2, max_size=8), st.floats(-0.1, 0.1))
def test_a_bias_that_is_an_offset_is_found_and_predicted_exactly(branches, offset):
    calibration = calibrate([BranchOutcome(v, v - g, v - g - offset) for v, g in branches], "offset")
    assert calibration.coefficient == pytest.approx(offset)
    assert calibration.predict(9.0, 1.0).value == pytest.approx(1 - offset)


def test_where_more_is_better_the_same_fit_holds():
    losses = [BranchOutcome(1.5, 1.4, 1.38), BranchOutcome(1.3, 1.25, 1.23)]
    scores = [BranchOutcome(-c.live, -c.merged, -c.annealed) for c in losses]
    below, above = calibrate(losses).predict(1.2, 1.1), calibrate(scores).predict(-1.2, -1.1)
    assert (above.value, above.low, above.high) == pytest.approx((-below.value, -below.high, -below.low))


@pytest.mark.parametrize("form", ["ratio", "offset", "relative"])
@pytest.mark.parametrize("outcomes", [[], [BranchOutcome(1.5, 1.4, 1.3)], [BranchOutcome(1.5, 1.4, math.nan)] * 3])
def test_below_two_branches_it_is_uncalibrated(form, outcomes):
    assert calibrate(outcomes, form) is None


def test_merges_that_changed_nothing_calibrate_nothing():
    assert calibrate([BranchOutcome(1.5, 1.5, 1.4)] * 3) is None
    assert calibrate([BranchOutcome(1.5, 1.5, 1.4)] * 3, "relative") is None


def test_the_interval_is_students_around_the_fit():
    # Gains of one, ratios of 1 and 3: a ratio of 2, residuals of 1, deviation sqrt(2); t(0.95, 1) = 6.3138.
    calibration = calibrate([BranchOutcome(2.0, 1.0, 1.0), BranchOutcome(4.0, 3.0, 1.0)])
    prediction = calibration.predict(2.0, 1.0)
    assert prediction.value == 0.0
    assert prediction.high == pytest.approx(6.3138 * math.sqrt(2) * math.sqrt(1.5), rel=1e-4)
    assert prediction.low == -prediction.high


@pytest.mark.parametrize("form", ["ratio", "offset", "relative"])
@pytest.mark.parametrize("num_branches", [2, 4, 10])
@pytest.mark.sample(2)
def test_nine_intervals_of_ten_hold_the_real_value(form, num_branches):
    random = np.random.default_rng(0)
    held = []
    for _ in range(2000):
        steps = random.uniform(0.05, 0.15, num_branches + 1)
        errors = random.normal(0, 0.01, num_branches + 1) * (steps if form == "relative" else 1)
        bias = 0.01 if form == "offset" else 0.1 * steps
        *earlier, last = [
            BranchOutcome(1.5, 1.5 - g, 1.5 - g - b + e)
            for g, b, e in zip(steps, np.broadcast_to(bias, steps.shape), errors, strict=True)
        ]
        prediction = calibrate(earlier, form).predict(last.live, last.merged)
        held.append(prediction.low <= last.annealed <= prediction.high)
    assert 0.88 < np.mean(held) < 0.92


def test_a_wider_level_gives_a_wider_interval():
    calibration = calibrate(
        [BranchOutcome(1.5, 1.4, 1.38), BranchOutcome(1.3, 1.25, 1.24), BranchOutcome(1.2, 1.1, 1.09)]
    )
    narrow, wide = (calibration.predict(1.0, 0.9, level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_a_branch_that_counts_twice_is_one_that_is_there_twice_but_for_the_number_of_branches():
    one, other = BranchOutcome(1.5, 1.4, 1.38), BranchOutcome(1.3, 1.25, 1.22)
    twice = calibrate([one, other, other])
    weighted = calibrate([one, BranchOutcome(1.3, 1.25, 1.22, weight=2.0)])
    assert weighted.coefficient == pytest.approx(twice.coefficient)
    assert weighted.num_branches == 2
    # The same mean squared residual, with one degree of freedom of two instead of two of three.
    assert weighted.deviation == pytest.approx(math.sqrt(2 / 1.5) * twice.deviation)
    # The coefficient is as uncertain as that of so many squared gains that all count alike: (.1^2 + 2 .05^2)^2 / ...
    assert weighted.weight == pytest.approx(0.015**2 / (0.1**2 + 4 * 0.05**2))


def test_intervals_hold_where_branches_count_differently_but_err_alike():
    random = np.random.default_rng(0)
    held = []
    for _ in range(2000):
        gains, errors = random.uniform(0.05, 0.15, 9), random.normal(0, 0.01, 9)
        all_of_them = [BranchOutcome(1.5, 1.5 - g, 1.5 - 1.1 * g + e) for g, e in zip(gains, errors, strict=True)]
        *earlier, last = all_of_them
        known = pooled_branches(earlier[:4], earlier[4:])
        assert [each.weight for each in known] == [1.0] * 4 + [0.5] * 4
        prediction = calibrate(known).predict(last.live, last.merged)
        held.append(prediction.low <= last.annealed <= prediction.high)
    assert 0.88 < np.mean(held) < 0.92
