"""Snapshots that are means over intervals: which steps they hold, with which weights, and what they cost."""

import itertools
import math
import warnings
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from merge_callback import MergeCallback, SpikeDetector, SpikeRecovery, Window
from merge_callback.callbacks.arguments import snapshot_place
from merge_callback.capture.capture import SnapshotCapture
from merge_callback.capture.kinds import MeanSnapshots
from merge_callback.capture.layout import RowLayout
from merge_callback.capture.ring import MeanRing
from merge_callback.checkpoints.merge import merge_checkpoints
from merge_callback.checkpoints.write import read_provenance
from merge_callback.merging.intervals import Intervals, covered
from tests.capture.test_capture import restore
from tests.helpers import reference
from tests.helpers.toys import (
    ResumableBatches,
    Toy,
    Tracker,
    assert_same_training,
    batches,
    fit,
    interrupted_between_tensors,
    lightning,
    make,
    same,
)

ALL = 10**6


class Wandering(nn.Module):
    """A model whose weight after each step is given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))


def capturing(every=None, capacity=4, num_samples=None, rules=(), dtype=None):
    return SnapshotCapture(every, capacity, rules, "stable", dtype, kind=MeanSnapshots(num_samples, None))


def walk(capture, values, rates=None, first_step=1, dtype=torch.float32):
    """Walks through these weights; steps are numbered from ``first_step``."""
    rates = rates or [0.1] * (len(values) + 1)
    module = Wandering(dtype)
    if capture.ring is None:
        capture.prepare(module)
    for step, (value, used, following) in enumerate(zip(values, rates, rates[1:], strict=False), first_step):
        module.weight.data.fill_(value)
        capture.after_step(module, step, [used], [following])
    return capture


def means(capture) -> list[float]:
    return [float(tensors["weight"]) for _, tensors in capture.ring.snapshots()]


def intervals(capture) -> list[tuple[int, int]]:
    assert isinstance(capture.covered, Intervals)
    return list(zip(capture.covered.begins, capture.covered.ends, strict=True))


weights = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=120)
many_weights = st.lists(st.floats(-1, 1, width=32), min_size=18, max_size=120)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@given(weights, st.integers(1, 12), st.integers(1, 5))
def test_each_snapshot_is_the_mean_over_all_steps_of_its_interval(values, every, capacity):
    capture = walk(capturing(every, capacity, ALL), values, dtype=torch.float64)
    ends = list(range(every, len(values) + 1, every))[-capacity:]
    assert intervals(capture) == [(end - every, end) for end in ends]
    expected = [mean(values[end - every : end]) for end in ends]
    assert means(capture) == pytest.approx(expected, abs=1e-6)


@given(weights, st.integers(1, 40), st.integers(1, 6))
def test_fewer_samples_are_evenly_spaced_and_the_last_one_is_at_the_end(values, every, num_samples):
    capture = walk(capturing(every, 50, num_samples), values, dtype=torch.float64)
    for (begin, end), found in zip(intervals(capture), means(capture), strict=True):
        taken = [begin + math.ceil(k * every / num_samples) for k in range(1, num_samples + 1)]
        taken = sorted(set(taken)) if num_samples < every else list(range(begin + 1, end + 1))
        assert taken[-1] == end
        assert found == pytest.approx(mean([values[step - 1] for step in taken]), abs=1e-6)


def test_without_a_number_a_mean_takes_every_step_up_to_eight_of_them():
    values = [float(step) for step in range(1, 33)]
    assert means(walk(capturing(8), values)) == [4.5, 12.5, 20.5, 28.5]
    # Steps 2, 4, ... of each.
    assert means(walk(capturing(16), values)) == [9.0, 25.0]


@given(weights, st.integers(2, 7), st.floats(0.05, 0.9))
def test_however_a_ring_was_thinned_its_means_are_those_of_all_their_steps(values, capacity, span):
    capture = walk(capturing(None, capacity, ALL, [Window(span=span)]), values, dtype=torch.float64)
    found = intervals(capture)
    assert all(older[1] == newer[0] for older, newer in itertools.pairwise(found))
    assert means(capture) == pytest.approx([mean(values[begin:end]) for begin, end in found], abs=1e-6)
    # All that was covered before is still there, up to the interval in progress.
    begin, end = found[0][0], found[-1][1]
    assert begin == 0 or end - begin >= span * end
    assert end > len(values) - capture.window.schedule.interval
    merged = sum(c * m for c, m in zip(reference.uniform(found), means(capture), strict=True))
    assert merged == pytest.approx(mean(values[begin:end]), abs=1e-6)


@given(weights, many_weights, st.integers(1, 9), st.integers(1, 4))
# The first phase ends in the middle of an interval.
@example([0.5] * 3, [-0.5] * 18, 2, 4)
@settings(max_examples=50)
def test_a_new_phase_begins_a_new_interval_and_nothing_of_the_old_one_is_in_it(first, second, every, capacity):
    rates = [0.1] * len(first) + [0.09, 0.08, 0.07, 0.06, 0.05] + [0.05] * (len(second) + 1)
    capture = walk(capturing(every, capacity, ALL), [*first, *[9.0] * 5, *second], rates, dtype=torch.float64)
    # The step with the first rate of the second phase has the last of the fives.
    values = dict(enumerate([9.0, *second], len(first) + 5))
    found = intervals(capture)
    assert found[0][0] >= len(first) + 4
    for (begin, end), value in zip(found, means(capture), strict=True):
        assert value == pytest.approx(mean([values[step] for step in range(begin + 1, end + 1)]), abs=1e-6)


def test_means_are_made_in_float32_whatever_the_weights_are_and_stored_in_the_wanted_dtype():
    # In bfloat16 the mean of 1 and 1 + 2**-7 would be one of the two.
    values = [1.0, 1.0 + 2**-7] * 4
    narrow = torch.bfloat16
    assert means(walk(capturing(8, dtype=torch.float32), values, dtype=narrow)) == [1.0 + 2**-8]
    assert means(walk(capturing(8), values, dtype=narrow)) == [1.0]
    assert means(walk(capturing(8, dtype=narrow), [1.0, 1.5] * 4)) == [1.25]


def test_thinning_averages_in_the_dtype_of_the_rows():
    capture = walk(capturing(None, 2, ALL, [Window(span=0.9)], dtype=torch.float32), [1.0, 1.5, 2.0, 2.5])
    assert intervals(capture) == [(0, 2), (2, 4)]
    assert means(capture) == [1.25, 2.25]


def test_a_sample_that_is_not_finite_is_named_and_costs_itself_alone():
    with pytest.warns(UserWarning, match="No sample at step 6: weight holds NaN or inf. The mean of its") as caught:
        capture = walk(capturing(4), [1.0, 1, 1, 1, 2, math.nan, 3, 4])
    assert len(caught) == 1
    assert means(capture) == [1.0, 3.0]
    assert intervals(capture) == [(0, 4), (4, 8)]


def test_an_interval_without_a_finite_sample_has_no_snapshot_and_the_next_one_begins_behind_it():
    with pytest.warns(UserWarning, match="No (sample|snapshot) at step") as caught:
        capture = walk(capturing(2), [1.0, 1.0, math.inf, math.nan, 3.0, 5.0])
    assert "No snapshot at step 4: no step of its interval has weights that can be used. The window stays" in str(
        caught[-1].message
    )
    assert means(capture) == [1.0, 4.0]
    assert intervals(capture) == [(0, 2), (4, 6)]


def test_what_is_forgotten_takes_the_interval_in_progress_with_it():
    capture = walk(capturing(4), [1.0] * 8 + [7.0] * 2)
    capture.forget_since(6)
    assert intervals(capture) == [(0, 4)]
    walk(capture, [2.0] * 6, first_step=11)
    assert intervals(capture) == [(0, 4), (10, 12), (12, 16)]
    assert means(capture) == [1.0, 2.0, 2.0]


@given(weights, st.integers(0, 120), st.sampled_from([None, 1, 5, 16]), st.sampled_from([None, 3]))
@settings(max_examples=60)
def test_a_capture_that_is_interrupted_anywhere_continues_to_the_bit(values, stop, every, num_samples):
    def fresh():
        return capturing(every, 4, num_samples, [Window(span=0.5)])

    whole, first = walk(fresh(), values), walk(fresh(), values[:stop])
    second = fresh()
    second.prepare(Wandering())
    restore(second, first, Wandering())
    walk(second, values[stop:], first_step=len(values[:stop]) + 1)
    assert (means(second), intervals(second)) == (means(whole), intervals(whole))
    assert second.kind.state_dict() == whole.kind.state_dict()
    assert same(dict(second.kind.tensors()), dict(whole.kind.tensors()))


def test_an_interval_that_an_interrupt_leaves_half_moved_begins_anew():
    kind, live = MeanSnapshots(None, None), {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16)}
    assert kind.is_due(1, 8)
    kind.add(1, 8, live)
    later = {name: tensor + 1 for name, tensor in live.items()}
    with interrupted_between_tensors():
        kind.add(2, 8, later)
    assert kind.tensors() == {}
    kind.add(3, 8, later)
    assert [float(kind.tensors()[name][0]) for name in "ab"] == [1, 1]


# In whole runs.


def per_step(callback, name=None) -> dict[int, float]:
    """The coefficient of each step of a merge of means over all steps."""
    steps = callback.session.capture.covered
    each = zip(steps.begins, steps.ends, callback.coefficients(name).values(), strict=True)
    return {step: c / (end - begin) for begin, end, c in each for step in range(begin + 1, end + 1)}


MERGES = {"sma": "sma", "wma": "wma", "sqrt": "1-sqrt", "qam": "qam", "late": Window("cosine", span=0.4)}


@pytest.mark.parametrize("every", [None, 5])
@pytest.mark.parametrize("storage", ["device", "cpu", "files"])
@pytest.mark.gpu
@pytest.mark.slow
def test_merges_of_means_agree_with_their_twin_over_all_steps_wherever_they_are_kept(tmp_path, every, storage):
    place = tmp_path / "snapshots" if storage == "files" else storage
    callback, tracker = (
        MergeCallback(every, 4, merges=MERGES, snapshot="mean", mean_samples=99, storage=place),
        Tracker(),
    )
    without = fit(make(Toy), tmp_path / "without")
    watched = fit(make(Toy), tmp_path / "with", callback, tracker)
    assert_same_training(without, watched)
    for name in MERGES:
        expected = tracker.merged(per_step(callback, name))
        state = callback.merged_state_dict(name)
        for key, tensor in expected.items():
            torch.testing.assert_close(state[key].double(), tensor, rtol=2e-6, atol=1e-7)
    in_memory = MergeCallback(every, 4, merges=MERGES, snapshot="mean", mean_samples=99)
    fit(make(Toy), tmp_path / "device", in_memory)
    assert all(same(callback.merged_state_dict(name), in_memory.merged_state_dict(name)) for name in MERGES)


def test_the_uniform_merge_of_means_is_the_mean_over_all_steps_of_the_window(tmp_path):
    callback, tracker = MergeCallback(4, 3, snapshot="mean"), Tracker()
    fit(make(Toy), tmp_path, callback, tracker)
    assert callback.snapshot_steps == [16, 20, 24]
    assert callback.implied_decay() == [(16, 1.0), (20, pytest.approx(2 / 3)), (24, pytest.approx(1 / 3))]
    expected = tracker.merged(dict.fromkeys(range(13, 25), 1 / 12))
    for key, tensor in expected.items():
        torch.testing.assert_close(callback.merged_state_dict()[key].double(), tensor, rtol=1e-6, atol=1e-7)


def test_what_is_said_and_saved_of_means_says_which_steps_they_are_over(tmp_path, caplog):
    callback = MergeCallback(5, 3, snapshot="mean", mean_samples=2)
    with caplog.at_level("INFO"):
        fit(make(Toy), tmp_path / "run", callback)
    said = [record.getMessage() for record in caplog.records]
    assert any("each the mean of up to 2 steps since the one before, in" in each for each in said)
    assert any("sma (3 means, 15 steps), at step 24" in each for each in said)
    for name in ("merge.ckpt", "merge.safetensors"):
        callback.save_merged(tmp_path / name)
        origin = read_provenance(tmp_path / name)
        assert origin["steps"] == [10, 15, 20]
        assert origin["means_over"] == [[6, 10], [11, 15], [16, 20]]
        with pytest.raises(ValueError, match=r"holds a merge by the rule .*sma.* of means over the steps \[\[6, 10\]"):
            merge_checkpoints([tmp_path / name], tmp_path / "again.ckpt")
    found = merge_checkpoints([tmp_path / "merge.ckpt"], tmp_path / "again.ckpt", of_averages=True)
    assert found["steps"] == [24]


@pytest.mark.filterwarnings("ignore:SpikeRecovery:UserWarning", "ignore:No sample at step 33:UserWarning")
def test_a_recovery_weights_means_by_their_steps_and_the_interval_in_progress_restarts(tmp_path):
    merge, tracker = MergeCallback(5, 8, snapshot="mean", mean_samples=99, start=3), Tracker()
    detector = SpikeDetector(threshold=8, patience=2, window=20)
    recovery = SpikeRecovery(merge, detector=detector, num_snapshots=6)
    module = make(Toy)

    class Accident(lightning(".callbacks").Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 32:
                with torch.no_grad():
                    pl_module.out.bias.fill_(float("nan"))

    fit(module, tmp_path, merge, recovery, tracker, Accident(), max_steps=44, train=batches(512))
    assert recovery.recoveries == [33]
    # The first of six intervals has three steps, the others five.
    expected = reference.merge([tracker.parameters[step] for step in range(3, 31)], [1 / 28] * 28)
    for key, tensor in expected.items():
        torch.testing.assert_close(tracker.parameters[33][key].double(), tensor, rtol=1e-6, atol=1e-7)
    steps = merge.session.capture.covered
    assert list(zip(steps.begins, steps.ends, strict=True))[-3:] == [(25, 30), (33, 35), (35, 40)]


@pytest.mark.filterwarnings("ignore:Be aware that when using:UserWarning")
def test_a_resume_with_the_other_kind_of_snapshots_says_that_the_window_is_dropped(tmp_path):
    stopped = fit(make(Toy), tmp_path / "first", MergeCallback(2, 3), train=ResumableBatches(), max_steps=12)
    stopped.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    second = MergeCallback(2, 3, snapshot="mean")
    said = "its window of 3 snapshots was dropped: they were taken with snapshot='point'"
    resumed = {"ckpt_path": str(tmp_path / "stopped.ckpt"), "train": ResumableBatches()}
    with pytest.warns(UserWarning, match=said):
        fit(make(Toy), tmp_path / "second", second, **resumed, max_steps=20)
    assert second.snapshot_steps == [16, 18, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"snapshot": "means"}, "snapshot must be 'point' or 'mean', got 'means'"),
        ({"mean_samples": 4}, "mean_samples=4 needs snapshot='mean', got snapshot='point'"),
        ({"snapshot": "mean", "mean_samples": 0}, "mean_samples must be >= 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MergeCallback(**arguments)


def test_points_stand_for_the_steps_that_are_nearest_to_them():
    points = covered([10, 20, 40])
    assert (points.counts, points.edges, points.span_steps) == ([1, 1, 1], [5, 15, 30, 50], 30)


def test_the_samples_of_an_interval_that_doubles_stand_for_equal_stretches():
    """Of 16 steps: those of the first eight have every second one, those of the last eight every fourth."""
    capture = capturing(8, 2, 4, [Window(span_steps=30)])
    values = [0.0] * 16 + [1.0] * 8 + [3.0] * 8
    walk(capture, values)
    # Full at step 16; at step 24 it is thinned, and the interval that began at step 16 lasts until step 32.
    assert intervals(capture) == [(0, 16), (16, 32)]
    assert means(capture) == [0.0, 2.0]


def test_parameters_that_change_in_the_middle_of_an_interval_begin_a_new_one():
    class Growing(Wandering):
        def __init__(self):
            super().__init__()
            self.late = nn.Parameter(torch.zeros(1), requires_grad=False)

    module, capture = Growing(), capturing(4)
    capture.prepare(module)
    for step in range(1, 13):
        if step == 7:
            module.late.requires_grad_(True)
        module.weight.data.fill_(step)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The trainable parameters changed before step 7")
            capture.after_step(module, step, [0.1], [0.1])
    assert intervals(capture) == [(6, 8), (8, 12)]
    assert means(capture) == [7.5, 10.5]


@pytest.mark.parametrize("place", ["device", "cpu", "files"])
def test_neighbours_are_averaged_by_their_steps_in_every_storage(tmp_path, place):
    live = {"weight": torch.zeros(40)}
    storage = snapshot_place(tmp_path if place == "files" else place).new_storage(RowLayout(live), 5, None, "merge")
    ring = MeanRing(storage, 5)
    for begin, end, value in ((0, 2, 5.0), (2, 3, 1.0), (3, 6, 9.0), (6, 10, 0.0), (10, 20, 7.0)):
        ring.append(end, {"weight": torch.full((40,), value)}, begin)
    ring.thin()
    assert ring.covered == Intervals((0, 2, 6), (2, 6, 20))
    assert [float(tensors["weight"][39]) for _, tensors in ring.snapshots()] == [5.0, 7.0, 5.0]
