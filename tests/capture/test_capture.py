"""Which steps are in the window: intervals, thinning, phases. Hypothesis walks a scalar model through whole runs."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from merge_callback.capture.capture import SnapshotCapture
from merge_callback.capture.state import TensorReader, capture_state, captured_tensors, restore_capture_
from merge_callback.live.learning_rates import learning_rates
from merge_callback.merging.rules import resolve_rule
from merge_callback.merging.windows import Window


class Position(nn.Module):
    """A model whose only weight is the step it is at."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("statistics", torch.zeros(1))


def run(capture, rates, first_step=1):
    """Walks through steps with these learning rates and yields (step, snapshot steps) after each.

    The last rate is only the one that would follow.
    """
    module = Position()
    if capture.ring is None:
        capture.prepare(module)
    for step, (used, following) in enumerate(itertools.pairwise(rates), first_step):
        module.weight.data.fill_(step)
        module.statistics.fill_(step)
        capture.after_step(module, step, [used], [following])
        yield step, capture.steps


def restore(second, first, module=None):
    """Takes over the state of another capture, as a checkpoint would bring it."""
    tensors = {each.key: each.part.clone() for each in captured_tensors(first)}
    reader = TensorReader(tensors, second.sharding)
    assert restore_capture_(second, capture_state(first), module or Position(), reader) == []


def captured(every, capacity, rates, rules=("sma",), start="stable"):
    capture = SnapshotCapture(every, capacity, [resolve_rule(rule) for rule in rules], start, None)
    *_, (_, steps) = run(capture, [*rates, rates[-1]])
    return steps


def test_snapshots_lie_at_multiples_of_the_interval_and_the_newest_are_kept():
    assert captured(5, 3, [0.1] * 32) == [20, 25, 30]


def test_nothing_is_captured_in_warmup_or_decay_and_the_window_is_frozen_and_kept():
    warmup = [i / 10 for i in range(1, 10)]
    decay = [1 - i / 10 for i in range(1, 10)]
    capture = SnapshotCapture(2, 10, [], "stable", None)
    windows = dict(run(capture, [*warmup, *[1.0] * 11, *decay]))
    assert windows[9] == []
    assert windows[20] == windows[28] == [10, 12, 14, 16, 18, 20]


def test_a_rate_that_is_constant_again_at_another_value_begins_a_new_window():
    rates = [1.0] * 10 + [0.9, 0.8, 0.7, 0.6, 0.5] + [0.5] * 7
    assert captured(2, 10, rates) == [16, 18, 20, 22]


def test_the_old_window_stays_until_the_new_one_has_a_snapshot():
    capture = SnapshotCapture(2, 10, [], "stable", None)
    windows = dict(run(capture, [1.0] * 10 + [0.9, 0.8, 0.7, 0.6, 0.5] + [0.5] * 7))
    assert windows[14] == windows[15] == [2, 4, 6, 8, 10]
    assert windows[16] == [16]


def test_a_rate_that_changes_more_often_than_snapshots_are_due_keeps_the_last_window():
    assert captured(10, 10, [1.0] * 25 + [0.5] * 3 + [0.25] * 2 + [0.125] * 5) == [30]
    assert captured(10, 10, [1.0] * 25 + [0.5] * 2 + [0.25] * 2 + [0.125, 0.0625, 0.03] * 2) == [10, 20]


def test_a_start_by_step_captures_whatever_the_rate_does():
    falling = [1 - i / 100 for i in range(41)]
    for start, expected in (("stable", []), (18, [20, 25, 30, 35, 40])):
        capture = SnapshotCapture(5, 10, [], start, None)
        *_, (step, steps) = run(capture, falling)
        assert (step, steps) == (40, expected)


@given(st.integers(2, 24), st.integers(1, 2000), st.integers(0, 300))
@settings(deadline=None, max_examples=60)
@pytest.mark.slow
def test_without_arguments_the_ring_always_covers_the_last_tenth_of_training(capacity, num_steps, warmup):
    capture = SnapshotCapture(None, capacity, [], "stable", None)
    rates = [*(i / (warmup + 1) for i in range(1, warmup + 1)), *[1.0] * num_steps]
    was_full = False
    for step, steps in run(capture, [*rates, 1.0]):
        if not steps:
            continue
        stable_since = warmup + 1
        assert steps[0] <= max(0.9 * step, stable_since), (step, steps)
        was_full = was_full or len(steps) == capacity
        if was_full:
            assert len(steps) >= capacity / 2
        assert steps == sorted(set(steps))


@given(st.integers(2, 24), st.integers(1, 30), st.floats(0.02, 1.0), st.integers(50, 3000))
@settings(deadline=None, max_examples=60)
@pytest.mark.slow
def test_a_window_by_share_is_thinned_and_never_falls_below_half_the_capacity_once_it_had_it(
    capacity, every, span, num_steps
):
    window = Window(span=span)
    capture = SnapshotCapture(every, capacity, [window], "stable", None)
    reached_half = False
    for step, steps in run(capture, [1.0] * num_steps):
        if not steps:
            continue
        assert steps[0] <= max((1 - span) * step, every) + 1e-9, (step, steps)
        inside = sum(coefficient > 0 for coefficient in window(steps))
        if reached_half:
            assert inside >= capacity // 2, (step, steps)
        reached_half = reached_half or inside >= capacity / 2


@given(st.integers(2, 20), st.integers(1, 20), st.integers(1, 3000))
@settings(deadline=None, max_examples=40)
def test_thinned_snapshots_stay_evenly_spaced(capacity, every, num_steps):
    capture = SnapshotCapture(every, capacity, [Window(span=0.5)], "stable", None)
    for _, steps in run(capture, [1.0] * num_steps):
        gaps = {later - earlier for earlier, later in itertools.pairwise(steps)}
        assert len(gaps) <= 1, steps


def test_a_window_by_steps_longer_than_the_ring_doubles_the_interval_until_it_fits():
    steps = captured(10, 10, [1.0] * 3000, rules=[Window(span_steps=1000)])
    assert steps[0] <= 2000
    assert steps[1] - steps[0] == 160


def test_every_snapshot_holds_the_weights_of_its_step():
    capture = SnapshotCapture(None, 7, [], "stable", None)
    for _, steps in run(capture, [1.0] * 500):
        for position, step in enumerate(steps):
            row = capture.ring.combine([float(i == position) for i in range(len(steps))])
            assert capture.ring.storage.layout.views(row)["weight"].item() == step


def test_buffers_are_those_of_the_newest_snapshot():
    capture = SnapshotCapture(5, 3, [], "stable", None)
    for step, steps in run(capture, [1.0] * 33):
        if steps:
            assert capture.buffers["statistics"].item() == steps[-1] <= step


def test_a_snapshot_with_nan_is_refused_by_name_and_the_window_stays():
    module = Position()
    capture = SnapshotCapture(1, 2, [], "stable", None)
    capture.prepare(module)
    for step in (1, 2):
        module.weight.data.fill_(step)
        capture.after_step(module, step, [1.0], [1.0])
    assert capture.steps == [1, 2]
    module.weight.data.fill_(torch.nan)
    with pytest.warns(UserWarning, match=r"No snapshot at step 3: weight holds NaN or inf. The window stays.*\[1, 2\]"):
        capture.after_step(module, 3, [1.0], [1.0])
    # Once for all that follow: warnings are errors here.
    for step in (4, 5):
        capture.after_step(module, step, [1.0], [1.0])
    assert capture.steps == [1, 2]
    module.weight.data.fill_(6)
    capture.after_step(module, 6, [1.0], [1.0])
    assert capture.steps == [2, 6]
    module.weight.data.fill_(torch.nan)
    with pytest.warns(UserWarning, match="No snapshot at step 7"):
        capture.after_step(module, 7, [1.0], [1.0])


def test_a_refused_snapshot_leaves_a_full_window_unthinned():
    capture = SnapshotCapture(None, 4, [Window(span=1.0)], "stable", None)
    module = Position()
    capture.prepare(module)
    for step in range(1, 5):
        capture.after_step(module, step, [1.0], [1.0])
    module.weight.data.fill_(torch.inf)
    with pytest.warns(UserWarning, match="No snapshot at step 5"):
        capture.after_step(module, 5, [1.0], [1.0])
    assert capture.steps == [1, 2, 3, 4]


def test_parameters_that_become_trainable_before_the_first_snapshot_are_nothing_to_warn_of():
    module = nn.Sequential(nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1))
    capture = SnapshotCapture(1, 5, [], "stable", None)
    capture.prepare(module)
    module.requires_grad_(True)
    capture.after_step(module, 1, [1.0], [1.0])
    assert capture.steps == [1]
    assert len(capture.ring.storage.layout.places) == 4


def test_newly_trainable_parameters_begin_a_new_window_with_a_warning():
    module = nn.Sequential(nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1))
    capture = SnapshotCapture(1, 5, [], "stable", None)
    capture.prepare(module)
    for step in (1, 2, 3):
        capture.after_step(module, step, [1.0], [1.0])
    module.requires_grad_(True)
    with pytest.warns(UserWarning, match="trainable parameters changed before step 4: the window of 3 snapshots"):
        capture.after_step(module, 4, [1.0], [1.0])
    assert capture.steps == [4]
    assert set(capture.ring.storage.layout.places) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_module_without_parameters_is_refused_and_a_frozen_one_is_waited_for():
    capture = SnapshotCapture(1, 5, [], "stable", None)
    with pytest.raises(ValueError, match="ReLU has no floating-point parameters"):
        capture.prepare(nn.ReLU())
    module = nn.Linear(2, 2).requires_grad_(False)
    capture.prepare(module)
    assert capture.describe().endswith("once there are trainable parameters whose shapes are known")
    capture.after_step(module, 1, [1.0], [1.0])
    assert capture.steps == []
    module.weight.requires_grad_(True)
    capture.after_step(module, 2, [1.0], [1.0])
    assert capture.steps == [2]
    assert list(capture.layout.places) == ["weight"]


def test_parameters_that_never_get_a_shape_are_left_out():
    module = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2), nn.LazyBatchNorm1d())
    capture = SnapshotCapture(1, 5, [], "stable", None)
    capture.prepare(module)
    for step in (1, 2):
        capture.after_step(module, step, [1.0], [1.0])
    assert capture.steps == [1, 2]
    assert list(capture.layout.places) == ["0.weight", "0.bias"]


@given(st.integers(1, 12), st.one_of(st.none(), st.integers(1, 7)), st.integers(1, 200), st.integers(1, 200))
@settings(deadline=None, max_examples=40)
def test_an_interrupted_capture_goes_on_as_if_it_had_not_stopped(capacity, every, before, after):
    # Two phases, so that it matters which one the window belongs to.
    rates = [*(i / 20 for i in range(1, 20)), *[1.0] * after, *[0.5] * before, 0.25, *[0.125] * 5]
    whole, first, second = (SnapshotCapture(every, capacity, [Window(span=0.3)], "stable", None) for _ in range(3))
    windows = dict(run(whole, rates))
    list(run(first, rates[: before + 1]))
    second.prepare(Position())
    restore(second, first)
    resumed = dict(run(second, rates[before:], first_step=before + 1))
    assert resumed == {step: windows[step] for step in resumed}
    assert second.steps == whole.steps
    if whole.steps:
        coefficients = [1 / len(whole.steps)] * len(whole.steps)
        assert torch.equal(second.ring.combine(coefficients)[0], whole.ring.combine(coefficients)[0])
        assert torch.equal(second.buffers["statistics"], whole.buffers["statistics"])


def test_a_schedule_free_optimizer_has_no_rate_that_one_could_call_constant():
    class ScheduleFree(torch.optim.SGD):
        """As the schedule-free optimizers do it: a mode in the group, and a rate that stays as it was given."""

        def __init__(self, parameters):
            super().__init__(parameters, lr=0.1)
            self.param_groups[0]["train_mode"] = True

    weight = nn.Parameter(torch.zeros(1))
    assert learning_rates([torch.optim.SGD([weight], lr=0.1)]) == [0.1]
    (rate,) = learning_rates([ScheduleFree([weight])])
    assert math.isnan(rate)


def test_lazy_parameters_are_captured_once_they_have_shapes():
    module = nn.LazyLinear(2)
    capture = SnapshotCapture(1, 3, [], "stable", None)
    capture.prepare(module)
    assert capture.describe().endswith("once there are trainable parameters whose shapes are known")
    module(torch.zeros(1, 4))
    capture.after_step(module, 1, [1.0], [1.0])
    assert capture.steps == [1]
    assert "in 0.0 MiB on cpu" in capture.describe()


def test_a_cosine_leaves_no_window_behind_its_top():
    cosine = [0.5 * (1 + math.cos(math.pi * step / 100_000)) for step in range(400)]
    capture = SnapshotCapture(1, 10, [], "stable", None)
    windows = dict(run(capture, [*([i / 10 for i in range(1, 11)]), *cosine]))
    assert windows[20] == windows[400] == []


def test_a_slow_decay_after_a_real_phase_keeps_its_window():
    falling = [1 - step / 10_000_000 for step in range(1, 200)]
    capture = SnapshotCapture(10, 10, [], "stable", None)
    *_, (_, steps) = run(capture, [1.0] * 55 + falling)
    assert steps == [10, 20, 30, 40, 50]
