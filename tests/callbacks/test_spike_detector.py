"""When is a loss a spike: at once if it is no number, within a few steps if it runs away, never if it only falls."""

import math
import random

import pytest

from merge_callback.callbacks.spike_detector import SpikeDetector, noise


def falling(seed, num_steps=400):
    """A loss that falls fast, then slowly, with normal noise of 0.05."""
    draw = random.Random(seed)
    return [
        2 + 3 * math.exp(-step / 40) + 0.5 * math.exp(-step / 300) + draw.gauss(0, 0.05) for step in range(num_steps)
    ]


def first_alarm(losses, **arguments):
    detector = SpikeDetector(**arguments)
    for step, loss in enumerate(losses):
        if (began := detector.update(step, loss)) is not None:
            return step, began
    return None


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_falls_never_alarms_and_a_spike_of_five_deviations_is_found_within_ten_steps(seed):
    losses = falling(seed)
    assert first_alarm(losses) is None
    spiked = [loss + 5 * 0.05 * (step >= 300) for step, loss in enumerate(losses)]
    found, began = first_alarm(spiked)
    assert 300 <= found < 310
    assert abs(began - 300) <= 3


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_no_number_is_a_spike_at_once(loss):
    assert SpikeDetector().update(7, loss) == 7


def test_one_bad_batch_is_no_spike():
    losses = falling(0)
    losses[300] += 0.5
    assert first_alarm(losses) is None
    # Of single losses some lie three deviations above the median.
    assert first_alarm(losses, patience=1, threshold=6)[0] == 300


@pytest.mark.parametrize("begin", range(130, 200, 10))
def test_a_rise_is_found_in_time_while_the_loss_falls_fast(begin):
    for seed in range(5):
        found, began = first_alarm([loss + 5 * 0.05 * (step >= begin) for step, loss in enumerate(falling(seed))])
        assert begin <= found < begin + 10
        assert abs(began - begin) <= 3


def test_there_is_no_verdict_before_half_a_window_is_there():
    assert first_alarm([1.0, 1.1, 0.9, 1.0, *[9.0] * 20], window=100) is None
    assert first_alarm([1.0, 1.1, 0.9, 1.0, *[9.0] * 20], window=8) is not None


def test_a_trend_does_not_count_as_noise():
    draw = random.Random(0)
    steady = [draw.gauss(0, 0.1) for _ in range(400)]
    assert noise(steady) == pytest.approx(0.1, rel=0.2)
    assert noise([value - 0.05 * step for step, value in enumerate(steady)]) == pytest.approx(noise(steady))


def test_a_detector_that_was_interrupted_goes_on_as_it_would_have():
    losses = [loss + 0.5 * (step >= 300) for step, loss in enumerate(falling(1))]
    first, second = SpikeDetector(), SpikeDetector()
    for step, loss in enumerate(losses[:302]):
        first.update(step, loss)
    second.load_state_dict(first.state_dict())
    verdicts = [[each.update(step, losses[step]) for step in range(302, 310)] for each in (first, second)]
    assert verdicts[0] == verdicts[1]
    assert any(verdicts[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0}, "threshold must be above zero, got 0"),
        ({"patience": 0}, "patience must be >= 1, got 0"),
        ({"window": 3}, "window must be >= 4, got 3"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpikeDetector(**arguments)
