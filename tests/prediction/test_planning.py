"""Which decays are compared, and what is said of them."""

from dataclasses import replace

import pytest

from merge_callback.prediction.planning import Option, later, option, plan, verdict
from merge_callback.prediction.river import Decay
from tests.prediction.test_forecasts import METRIC, TRUTH, validations


def decays(**named):
    found = plan(validations(), METRIC, **{"shapes": ["linear"], "spans": [0.1], **named})
    return [each.decay for each in found]


def test_decays_begin_now_or_end_with_the_budget():
    assert decays() == [Decay(1000, 111)]
    assert decays(budget=200) == [Decay(1000, 111), Decay(1080, 120)]
    # A decay that takes longer than what is left is none, and one that takes just that is one.
    assert decays(budget=111) == [Decay(1000, 111)]
    assert decays(budget=100) == []
    assert decays(spans=[0.1, 0.2], budget=200) == [Decay(1000, 111), Decay(1080, 120)]
    both = decays(shapes=["linear", "1-sqrt"], spans=[0.05, 0.1])
    assert both == [Decay(1000, n, shape) for n in (53, 111) for shape in ("linear", "1-sqrt")]


def test_what_cannot_be_told_has_its_reason():
    known = validations()
    told, far, short = (option(known, METRIC, decay) for decay in (Decay(1000, 111), Decay(1300, 111), Decay(1000, 10)))
    assert told.forecast.prediction.value == pytest.approx(TRUTH.annealed(Decay(1000, 111)), abs=2e-4)
    assert not told.reason
    assert far.forecast is None
    assert far.reason == "the decay ends 411 steps from now, which is more than 26% of the steps by then"
    assert "takes 1% of the steps" in short.reason


def test_waiting_for_a_decay_of_the_same_share():
    assert later(Decay(1000, 111, "1-sqrt", 0.1), 1000) == Decay(2000, 222, "1-sqrt", 0.1)


def test_a_verdict_is_given_only_where_intervals_lie_apart():
    known = validations()
    short, long = option(known, METRIC, Decay(1000, 53)), option(known, METRIC, Decay(1000, 250))
    assert verdict([]) == "Nothing can be foretold"
    assert verdict([short]) == "Lowest: linear over 53 steps (5%) from step 1000"
    assert verdict([short, long]) == (
        "Lowest: linear over 250 steps (20%) from step 1000; the intervals of all others lie above"
    )
    other = option(known, METRIC, Decay(1000, 250, "1-sqrt"))
    said = verdict([short, long, other])
    assert "its interval overlaps with those of 1 others, so these cannot be told apart" in said
    assert verdict([replace(short, forecast=None), Option(Decay(1, 1), None)]) == "Nothing can be foretold"
