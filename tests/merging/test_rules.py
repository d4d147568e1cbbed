import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_callback.merging.decays import DECAY_SHAPES, coefficients_from_decay, decay_from_coefficients
from merge_callback.merging.intervals import Intervals, covered
from merge_callback.merging.rules import (
    RULES,
    decay,
    ema,
    merge_coefficients,
    qam,
    required_span,
    resolve_rule,
    rule_label,
    sma,
    wma,
)
from merge_callback.merging.windows import Extrapolate, Window
from tests.helpers import reference

uneven_steps = st.lists(st.integers(1, 1000), min_size=1, max_size=20).map(
    lambda gaps: [sum(gaps[: i + 1]) for i in range(len(gaps))]
)
rule_names = st.sampled_from(sorted(RULES))
EVEN = list(range(100, 1100, 100))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sma", [0.1] * 10),
        ("wma", [i / 55 for i in range(1, 11)]),
        ("ema", [0.8**9] + [0.2 * 0.8 ** (9 - i) for i in range(1, 10)]),
        ("linear", [0.1] * 10),
        ("1-sqrt", [0.316, 0.131, 0.101, 0.085, 0.075, 0.068, 0.062, 0.058, 0.054, 0.051]),
        ("cosine", [0.025, 0.071, 0.111, 0.139, 0.155, 0.155, 0.139, 0.111, 0.071, 0.025]),
    ],
)
def test_ten_even_snapshots_get_the_published_weights(rule, expected):
    assert merge_coefficients(rule, EVEN) == pytest.approx(expected, abs=1e-3)


@given(rule_names, uneven_steps)
def test_every_rule_agrees_with_its_float64_twin(rule, steps):
    assert merge_coefficients(rule, steps) == pytest.approx(reference.coefficients(rule, steps), abs=1e-12)


@pytest.mark.parametrize("number", [1, 2, 7])
def test_the_rules_themselves_give_weights_that_sum_to_one(number):
    steps = [3, 5, 6, 20, 21, 30, 31][:number]
    made = {"sma": sma, "wma": wma, "ema": ema(), "qam": qam(), **{shape: decay(shape) for shape in DECAY_SHAPES}}
    assert made.keys() == RULES.keys()
    for name, rule in made.items():
        assert list(rule(steps)) == pytest.approx(reference.coefficients(name, steps), abs=1e-12)


@given(rule_names, uneven_steps)
def test_coefficients_sum_to_one_and_are_not_negative(rule, steps):
    coefficients = merge_coefficients(rule, steps)
    assert len(coefficients) == len(steps)
    assert math.fsum(coefficients) == pytest.approx(1, abs=1e-12)
    assert min(coefficients) >= 0


@given(rule_names, uneven_steps)
def test_coefficients_and_implied_decay_are_inverse(rule, steps):
    coefficients = merge_coefficients(rule, steps)
    multipliers = decay_from_coefficients(coefficients)
    assert multipliers[0] == pytest.approx(1, abs=1e-12)
    assert all(newer <= older for older, newer in itertools.pairwise(multipliers))
    assert coefficients_from_decay(multipliers) == pytest.approx(coefficients, abs=1e-12)
    assert decay_from_coefficients(coefficients_from_decay(multipliers)) == pytest.approx(multipliers, abs=1e-12)


@given(rule_names, uneven_steps, st.integers(0, 2**32))
def test_a_merge_is_the_run_with_its_updates_decayed(rule, steps, seed):
    randomness = random.Random(seed)
    updates = [randomness.gauss(0, 1) for _ in range(min(steps[-1], 200))]
    steps = sorted({max(1, step * len(updates) // steps[-1]) for step in steps})
    merged, walked = reference.decayed_sum(updates, steps, merge_coefficients(rule, steps))
    assert merged == pytest.approx(walked, abs=1e-9)


@pytest.mark.parametrize("shape", ["linear", "1-sqrt", "cosine"])
def test_between_two_snapshots_the_decay_has_its_value_at_the_middle_of_the_gap(shape):
    steps = [100, 150, 400, 500]
    start, end = 75, 550
    shapes = {
        "linear": lambda u: 1 - u,
        "1-sqrt": lambda u: 1 - u**0.5,
        "cosine": lambda u: (1 + math.cos(math.pi * u)) / 2,
    }
    expected = [1.0] + [shapes[shape]((middle - start) / (end - start)) for middle in (125, 275, 450)]
    assert decay_from_coefficients(merge_coefficients(shape, steps)) == pytest.approx(expected)


def test_a_uniform_merge_of_ten_is_a_linear_decay_in_nine_stairs():
    assert decay_from_coefficients(merge_coefficients("sma", EVEN)) == pytest.approx([1 - i / 10 for i in range(10)])


def test_one_minus_sqrt_favours_the_oldest_snapshot_and_wma_the_newest():
    assert merge_coefficients("1-sqrt", EVEN).index(max(merge_coefficients("1-sqrt", EVEN))) == 0
    assert merge_coefficients("wma", EVEN).index(max(merge_coefficients("wma", EVEN))) == 9


def test_paper_rules_ignore_the_spacing_and_decay_rules_follow_it():
    uneven = [100, 110, 120, 400]
    for name in ("sma", "wma", "ema"):
        assert merge_coefficients(name, uneven) == merge_coefficients(name, [1, 2, 3, 4])
    linear = merge_coefficients("linear", uneven)
    assert linear == pytest.approx([10 / 445, 10 / 445, 145 / 445, 280 / 445])


@given(st.floats(0.01, 1), st.integers(1, 20))
def test_the_ema_of_equal_values_is_that_value(alpha, number):
    average = None
    for _ in range(number):
        average = 1.0 if average is None else alpha * 1.0 + (1 - alpha) * average
    assert sum(ema(alpha)(range(number))) == pytest.approx(average)


@given(rule_names, st.integers(1, 10**6))
def test_a_window_of_one_is_the_latest_snapshot(rule, step):
    assert merge_coefficients(rule, [step]) == [1.0]


@given(rule_names, uneven_steps, st.integers(1, 5000))
def test_a_window_by_steps_uses_what_lies_less_than_its_span_behind_the_newest(rule, steps, span_steps):
    coefficients = merge_coefficients(Window(rule, span_steps=span_steps), steps)
    inside = [step for step in steps if steps[-1] - step < span_steps]
    assert coefficients[: len(steps) - len(inside)] == [0.0] * (len(steps) - len(inside))
    assert coefficients[len(steps) - len(inside) :] == merge_coefficients(rule, inside)


@given(uneven_steps, st.floats(0.001, 1))
def test_a_window_by_share_is_a_window_by_steps_of_that_share(steps, span):
    inside = [step for step in steps if steps[-1] - step < span * steps[-1]]
    expected = [0.0] * (len(steps) - len(inside)) + [1 / len(inside)] * len(inside)
    assert merge_coefficients(Window(span=span), steps) == pytest.approx(expected)


def test_a_share_of_no_training_is_the_newest_snapshot():
    assert Window(span=0.1)([0]) == [1.0]


def test_a_span_of_n_intervals_holds_n_snapshots():
    assert [c > 0 for c in Window(span_steps=500)(EVEN)] == [False] * 5 + [True] * 5


def test_a_plain_function_is_a_rule_and_is_normalised():
    assert merge_coefficients(lambda steps: [2.0] * len(steps), EVEN) == pytest.approx([0.1] * 10)


def test_a_rule_may_extrapolate_with_negative_coefficients():
    assert merge_coefficients(lambda steps: [-0.5, 1.5], [1, 2]) == [-0.5, 1.5]


def test_scrambled_steps_change_nothing_that_depends_on_rank_only():
    steps = sorted(random.Random(0).sample(range(1000), 10))
    assert merge_coefficients("wma", steps) == merge_coefficients("wma", EVEN)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda steps: [math.nan] * len(steps), "not finite"),
        (lambda steps: [math.inf] * len(steps), "not finite"),
        (lambda steps: [1.0], "1 weights for 10 snapshots"),
        (lambda steps: [0.0] * len(steps), "sum to zero"),
        (lambda steps: [1.0, -1.0] * 5, "sum to zero"),
    ],
)
def test_a_function_that_gives_no_proper_weights_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        merge_coefficients(rule, EVEN)


def test_an_unknown_rule_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown merge rule '1_sqrt'; did you mean '1-sqrt'\?"):
        resolve_rule("1_sqrt")
    with pytest.raises(ValueError, match=r"unknown decay shape 'cosin'; did you mean 'cosine'\?"):
        decay("cosin")


def test_something_else_is_no_rule():
    with pytest.raises(TypeError, match="a name or a function"):
        resolve_rule(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of span_steps and span, got span_steps=None, span=None"),
        ({"span_steps": 10, "span": 0.1}, "exactly one"),
        ({"span_steps": 0}, "span_steps must be >= 1, got 0"),
        ({"span": 0.0}, "got 0.0"),
        ({"span": 1.5}, "got 1.5"),
        ({"rule": "smaa", "span": 0.1}, "did you mean 'sma'"),
    ],
)
def test_a_window_with_impossible_arguments_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Window(**arguments)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.1])
def test_an_ema_needs_a_proper_alpha(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\]"):
        ema(alpha)


def test_extrapolation_goes_on_from_the_older_merge_through_the_newest():
    rule = Extrapolate("sma", amount=0.5, gap_steps=20)
    # Newest: a quarter each; older: a half each of the first two.
    assert rule([10, 20, 30, 40]) == [0.125, 0.125, 0.375, 0.375]
    assert sum(rule([10, 20, 30, 40])) == 1
    # x_t = t: the merges are 25 and 15.
    assert sum(c * x for c, x in zip(rule([10, 20, 30, 40]), (10, 20, 30, 40), strict=True)) == 30


def test_an_extrapolation_without_an_older_merge_or_by_nothing_is_the_rule_itself():
    assert Extrapolate("wma", gap_steps=100)([10, 20, 30]) == wma([10, 20, 30])
    assert Extrapolate("wma", amount=0.0, gap=0.5)([10, 20, 30]) == wma([10, 20, 30])


def test_an_extrapolation_needs_its_gap_and_the_window_behind_it():
    assert required_span(Extrapolate(Window(span_steps=100), gap_steps=50), 1000) == 150
    assert required_span(Extrapolate(Window(span=0.1), gap=0.1), 1000) == 100 + 90
    assert required_span(Extrapolate("sma", gap=0.1), 1000) == 100
    assert required_span("sma", 1000) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Extrapolate takes exactly one of gap and gap_steps, got gap=None, gap_steps=None"),
        ({"gap": 0.1, "gap_steps": 5}, "exactly one of gap and gap_steps"),
        ({"gap_steps": 0}, "gap_steps must be >= 1, got 0"),
        ({"gap": 1.0}, r"gap must be a share of training in \(0, 1\), got 1.0"),
        ({"gap": 0.1, "amount": float("nan")}, "amount must be finite, got nan"),
        ({"gap": 0.1, "rule": "smaa"}, "did you mean 'sma'"),
    ],
)
def test_a_wrong_extrapolation_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Extrapolate(**arguments)


# A loss (curvature / 2) x^2 with noisy gradients has closed forms. The curvatures are multiplied by the rate.
CURVATURES = [0.01, 0.1, 0.5, 0.9]


def multipliers_of(shape, num):
    """The rates of a decay over the window, one for each gap."""
    return [DECAY_SHAPES[shape](gap / num) for gap in range(1, num)]


@pytest.mark.parametrize("shape", DECAY_SHAPES)
@pytest.mark.parametrize("num", [1, 2, 5, 40])
def test_qam_is_where_gradient_descent_with_a_decaying_rate_ends_on_a_quadratic(shape, num):
    coefficients = qam(shape)(range(100, 100 + 7 * num, 7))
    assert math.fsum(coefficients) == pytest.approx(1)
    assert min(coefficients) >= 0
    for curvature in CURVATURES:
        merged = sum(c * (1 - curvature) ** step for step, c in enumerate(coefficients))
        decayed = math.prod(1 - multiplier * curvature for multiplier in multipliers_of(shape, num))
        assert merged == pytest.approx(decayed, rel=1e-12)
    # As far on as the decay's own rule is in the mean, and nearer together.
    ours, theirs = (np.array(c) for c in (coefficients, decay(shape)(range(num))))
    places = np.arange(num)
    assert ours @ places == pytest.approx(theirs @ places)
    assert ours @ (places - ours @ places) ** 2 <= theirs @ (places - theirs @ places) ** 2 + 1e-9


@pytest.mark.parametrize("shape", DECAY_SHAPES)
def test_qam_of_points_keeps_more_noise_than_a_decay_and_less_than_no_decay(shape):
    num = 40
    coefficients = np.array(qam(shape)(range(num)))
    for curvature in CURVATURES:
        # At a constant rate the noise has variance one, and is forgotten by the curvature at each step.
        kept = 1 - curvature
        covariance = kept ** np.abs(np.subtract.outer(range(num), range(num)))
        variance = 1.0
        for multiplier in multipliers_of(shape, num):
            variance = (1 - multiplier * curvature) ** 2 * variance + multiplier**2 * (1 - kept**2)
        assert variance < coefficients @ covariance @ coefficients < 1


def test_qam_goes_by_name_for_a_linear_decay_and_as_an_object_for_others():
    assert resolve_rule("qam") == qam("linear")
    assert (rule_label("qam"), rule_label(qam()), rule_label(qam("cosine"))) == ("qam", "qam", "qam('cosine')")
    with pytest.raises(ValueError, match="unknown decay shape 'linaer'; did you mean"):
        qam("linaer")


# Snapshots that are means over intervals.

interval_lengths = st.lists(st.integers(1, 50), min_size=1, max_size=12)


def contiguous(lengths, begin=7):
    ends = [begin + sum(lengths[: i + 1]) for i in range(len(lengths))]
    return Intervals((begin, *ends[:-1]), tuple(ends))


@given(rule_names.filter(lambda name: name != "qam"), st.integers(1, 12), st.integers(1, 50))
def test_means_over_even_intervals_have_the_coefficients_of_even_points(rule, num, length):
    points = list(range(length, length * num + 1, length))
    assert merge_coefficients(rule, contiguous([length] * num)) == pytest.approx(merge_coefficients(rule, points))


@given(st.sampled_from(["sma", "linear"]), interval_lengths)
def test_uniform_and_linear_merges_of_means_are_the_mean_over_all_steps(rule, lengths):
    total = sum(lengths)
    expected = [length / total for length in lengths]
    assert merge_coefficients(rule, contiguous(lengths)) == pytest.approx(expected)


@given(st.sampled_from(list(DECAY_SHAPES)), interval_lengths)
def test_the_decay_of_means_has_the_shape_at_every_border_and_is_straight_between(shape, lengths):
    steps = contiguous(lengths)
    multipliers = decay_from_coefficients(merge_coefficients(shape, steps))
    begins = [(begin - 7) / sum(lengths) for begin in steps.begins]
    assert multipliers == pytest.approx([DECAY_SHAPES[shape](share) for share in begins], abs=1e-12)
    # A walk whose updates get the multipliers of the single steps ends where the merge of the means is.
    coefficients = merge_coefficients(shape, steps)
    per_step = [c / length for c, length in zip(coefficients, lengths, strict=True) for _ in range(length)]
    updates = [math.sin(3 * step) for step in range(sum(lengths))]
    places = np.cumsum(updates)
    merged = sum(
        c * places[end - 8 - np.arange(length)].mean()
        for c, end, length in zip(coefficients, steps.ends, lengths, strict=True)
    )
    walked = sum(update * sum(per_step[step:]) for step, update in enumerate(updates))
    assert merged == pytest.approx(walked, abs=1e-9)


@given(interval_lengths, st.integers(1, 4))
def test_a_longer_interval_counts_as_the_shorter_ones_it_was_made_of(lengths, factor):
    """As in a ring that is thinned: with the weights of an even grid, where neighbours have equal weights."""
    doubled = [factor * length for length in lengths]
    for rule in ("sma", "wma", "ema", "linear", "1-sqrt", "cosine", "qam"):
        found = merge_coefficients(rule, contiguous(doubled))
        assert found == pytest.approx(merge_coefficients(rule, contiguous(lengths)))


def test_means_of_unequal_intervals_by_hand():
    steps = Intervals((0, 10, 30), (10, 30, 40))
    assert sma(steps) == [0.25, 0.5, 0.25]
    # Length times the way from the beginning: 10 * 10, 20 * 30, 10 * 40.
    assert wma(steps) == pytest.approx([1 / 11, 6 / 11, 4 / 11])
    # A whole interval keeps a half, and one of half its length the root of that.
    kept = 0.5**0.5
    assert ema(0.5)(steps) == pytest.approx([kept * 0.5, kept * 0.5, 1 - kept])
    assert decay("1-sqrt")(steps) == pytest.approx([0.5, 0.75**0.5 - 0.5, 1 - 0.75**0.5])
    # Multipliers 3/4 and 1/4 at the two borders.
    assert qam()(steps) == pytest.approx([3 / 16, 10 / 16, 3 / 16])


def test_of_steps_that_are_missing_between_intervals_each_side_gets_half():
    steps = Intervals((0, 20), (10, 40))
    assert covered(steps).edges == [0, 15, 40]
    assert decay("linear")(steps) == pytest.approx([15 / 40, 25 / 40])
    assert sma(steps) == pytest.approx([1 / 3, 2 / 3])


def test_a_window_takes_the_means_whose_middle_lies_inside():
    steps = contiguous([10] * 6, begin=0)
    assert Window(span_steps=30)(steps) == pytest.approx([0, 0, 0, 1 / 3, 1 / 3, 1 / 3])
    assert Window(span_steps=26)(steps) == Window(span_steps=30)(steps) == Window(span_steps=35)(steps)
    assert Window(span_steps=36)(steps) == pytest.approx([0, 0] + [0.25] * 4)
    assert Window(span_steps=1)(steps) == [0, 0, 0, 0, 0, 1]
    assert Window("wma", span=0.5)(steps) == pytest.approx([0, 0, 0, 1 / 6, 2 / 6, 3 / 6])
    uneven = Intervals((0, 10, 30), (10, 30, 40))
    assert Window("sma", span_steps=30)(uneven) == pytest.approx([0, 2 / 3, 1 / 3])
    older = Extrapolate("sma", amount=1.0, gap_steps=10)(uneven)
    assert older == pytest.approx([2 * 0.25 - 1 / 3, 2 * 0.5 - 2 / 3, 2 * 0.25])


def test_a_function_of_the_user_gets_the_ends_of_the_intervals():
    assert merge_coefficients(list, Intervals((0, 100), (100, 300))) == [0.25, 0.75]
    with pytest.raises(ValueError, match=r"failed for steps \[100, 300\]"):
        merge_coefficients(lambda steps: steps.undefined, Intervals((0, 100), (100, 300)))
