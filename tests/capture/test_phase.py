import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_callback.capture.phase import CaptureSchedule, PhaseEvent, RateUpdates, StablePhase, needs_thinning


def stable_steps(rates):
    """Steps (from 1) that belong to a stable phase, when the schedule goes through these rates."""
    phase = StablePhase()
    return [
        step
        for step, (used, following) in enumerate(itertools.pairwise(rates), 1)
        if phase.observe([used], [following]).is_stable
    ]


def test_a_constant_rate_is_stable_from_the_first_step():
    assert stable_steps([0.1] * 6) == [1, 2, 3, 4, 5]


def test_warmup_and_decay_are_left_out_and_both_edges_count():
    warmup, constant, decay = [0.25, 0.5, 0.75], [1.0] * 4, [0.5, 0.25, 0.0]
    assert stable_steps([*warmup, *constant, *decay, 0.0]) == [4, 5, 6, 7, 10]


def test_a_rate_that_changes_every_epoch_is_stable_within_each():
    phase = StablePhase()
    for used, following in itertools.pairwise([0.1] * 5 + [0.05] * 5 + [0.025]):
        phase.observe([used], [following])
    assert phase.num_begun == 2
    assert phase.is_stable


def test_a_long_linear_decay_ends_the_phase_at_once():
    length = 10_000_000
    rates = [1.0] * 20 + [1 - step / length for step in range(1, 3000)]
    assert max(stable_steps(rates)) <= 20 + 4
    phase = StablePhase()
    events = [phase.observe([used], [following]) for used, following in itertools.pairwise(rates)]
    assert phase.num_begun == 1
    assert PhaseEvent.ENDED in events
    assert PhaseEvent.RETRACTED not in events


@pytest.mark.parametrize("length", [10_000, 100_000, 1_000_000, 10_000_000])
def test_a_cosine_never_settles_however_long_it_is(length):
    warmup = [(step + 1) / 101 for step in range(101)]
    rates = [*warmup, *(0.5 * (1 + math.cos(math.pi * step / length)) for step in range(3000))]
    phase = StablePhase()
    events = [phase.observe([used], [following]) for used, following in itertools.pairwise(rates)]
    assert len(stable_steps(rates)) < 10
    assert events.count(PhaseEvent.RETRACTED) == events.count(PhaseEvent.BEGAN) == 1
    assert phase.num_begun == 0
    assert phase.never_settled(1000)


def test_rounding_of_a_rate_does_not_end_the_phase():
    assert stable_steps([0.1, 0.1 * (1 + 2e-16), 0.1 * (1 - 2e-16)] * 5)[-1] == 14


def test_a_single_small_change_does_not_end_the_phase():
    rates = [1.0] * 5 + [1.0 + 1e-7] * 20
    assert stable_steps(rates) == list(range(1, 25))


def test_every_group_has_to_be_constant():
    phase = StablePhase()
    assert phase.observe([1.0, 0.1], [1.0, 0.2]) is PhaseEvent.UNSETTLED
    assert phase.observe([1.0, 0.2], [1.0, 0.2]) is PhaseEvent.BEGAN
    assert phase.observe([1.0, 0.2], [1.0, 0.3]) is PhaseEvent.HELD
    assert phase.observe([1.0, 0.3], [1.0, 0.4]) is PhaseEvent.ENDED
    assert phase.observe([1.0, 0.4], [1.0, 0.5]) is PhaseEvent.UNSETTLED


def test_a_group_that_joins_begins_another_phase():
    phase = StablePhase()
    phase.observe([1.0], [1.0])
    phase.observe([1.0, 0.1], [1.0, 0.1])
    assert phase.num_begun == 2


def test_a_rate_that_is_not_a_number_is_never_stable():
    assert stable_steps([float("nan")] * 5) == []


def test_a_rate_of_zero_is_constant():
    assert stable_steps([0.0] * 4) == [1, 2, 3]


@pytest.mark.parametrize(
    ("planned", "steps", "expected"),
    [
        (1000, 200, False),
        (1000, 201, True),
        (50, 50, False),
        (float("inf"), 9000, False),
        (float("inf"), 10001, True),
        (0, 1, True),
    ],
)
def test_a_run_that_never_settles_is_noticed_in_time(planned, steps, expected):
    phase = StablePhase()
    for step in range(steps):
        phase.observe([1 / (step + 1)], [1 / (step + 2)])
    assert phase.never_settled(planned) is expected


def test_a_run_that_settled_once_is_not_said_to_never_settle():
    phase = StablePhase()
    phase.observe([1.0], [1.0])
    for step in range(200):
        phase.observe([1 / (step + 2)], [1 / (step + 3)])
    assert not phase.never_settled(500)


@given(st.integers(1, 50), st.integers(1, 500))
def test_snapshots_are_due_at_the_multiples_of_the_interval(interval, num_steps):
    schedule = CaptureSchedule(interval)
    due = [step for step in range(1, num_steps + 1) if schedule.take(step)]
    assert due == list(range(interval, num_steps + 1, interval))


def test_the_first_snapshot_after_a_late_start_is_due_at_the_next_multiple():
    schedule = CaptureSchedule(10)
    assert [step for step in range(37, 65) if schedule.take(step)] == [40, 50, 60]


@given(st.integers(1, 20), st.lists(st.integers(1, 7), min_size=1, max_size=100))
def test_steps_that_jump_keep_at_least_the_interval(interval, jumps):
    schedule = CaptureSchedule(interval)
    steps = itertools.accumulate(jumps)
    due = [step for step in steps if schedule.take(step)]
    assert all(later - earlier >= interval for earlier, later in itertools.pairwise(due))


def test_thinning_is_needed_when_dropping_the_oldest_would_uncover_the_span():
    assert not needs_thinning([10, 20, 30, 40], step=50, required_span=30)
    assert needs_thinning([10, 20, 30, 40], step=50, required_span=31)
    assert not needs_thinning([10], step=50, required_span=45)


def epochs(rates, num_steps=5, num_rates=1):
    """Observes rates that are set once an epoch, as Lightning sets them: between two steps."""
    phase, events = StablePhase(), []
    for epoch, rate in enumerate(rates):
        for step in range(num_steps):
            # What the next epoch brings is not known yet at the end of one.
            updates = RateUpdates([epoch] * num_rates, [epoch] * num_rates)
            events.append(phase.observe([rate], [rate], updates))
            assert step < num_steps
    return phase, events


def test_a_cosine_that_steps_once_an_epoch_is_not_constant():
    rates = [0.5 * (1 + math.cos(math.pi * epoch / 20)) for epoch in range(20)]
    phase, events = epochs(rates)
    assert set(events) == {PhaseEvent.WAITING}
    assert phase.num_begun == 0
    assert phase.never_settled(0)
    assert not phase.never_settled(10_000)
    # One that is as long as training ever is moves little near its top.
    _, events = epochs([0.5 * (1 + math.cos(math.pi * epoch / 100_000)) for epoch in range(30)])
    assert set(events) == {PhaseEvent.WAITING}


def test_what_is_set_once_an_epoch_to_the_same_value_is_constant_from_the_second_on():
    phase, events = epochs([1.0, 1.0, 1.0, 0.1, 0.1, 0.01])
    began, held, waiting, ended = PhaseEvent.BEGAN, PhaseEvent.HELD, PhaseEvent.WAITING, PhaseEvent.ENDED
    assert events[:5] == [waiting] * 5
    assert events[5:15] == [began, *[held] * 9]
    assert events[15:20] == [ended, *[waiting] * 4]
    assert events[20:25] == [began, *[held] * 4]
    assert events[25:] == [ended, *[waiting] * 4]
    assert phase.num_begun == 2


def test_if_no_scheduler_is_asked_again_the_first_rate_is_constant_from_the_first_step():
    phase = StablePhase()
    assert phase.observe([1.0], [1.0], RateUpdates([0], [0], are_over=True)) is PhaseEvent.BEGAN
    assert phase.observe([1.0], [1.0], RateUpdates([0], [0], are_over=True)) is PhaseEvent.HELD
    # But the last epoch of a cosine is no constant one.
    phase, _ = epochs([1.0, 0.5, 0.1])
    assert phase.observe([0.1], [0.1], RateUpdates([2], [2], are_over=True)) is PhaseEvent.WAITING


def test_of_several_schedulers_each_has_to_have_set_the_rates_again():
    phase = StablePhase()
    events = [phase.observe([1.0, 1.0], [1.0, 1.0], RateUpdates([s, s // 4], [s + 1, s // 4])) for s in range(8)]
    assert events == [*[PhaseEvent.WAITING] * 4, PhaseEvent.BEGAN, *[PhaseEvent.HELD] * 3]


def test_a_warmup_of_the_modules_own_does_not_make_the_run_wait_for_a_scheduler_that_is_never_asked():
    phase, rates = StablePhase(), [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0]
    updates = RateUpdates([0], [0], are_over=True)
    events = [phase.observe([used], [used], updates) for used in rates]
    assert events[4:] == [PhaseEvent.BEGAN, PhaseEvent.HELD, PhaseEvent.HELD]
