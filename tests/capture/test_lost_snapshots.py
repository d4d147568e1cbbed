"""Snapshots that a full disk, a stranger or an interrupt spoils cost neither the run nor its checkpoint."""

import os
import shutil
import signal
import threading
import time
import warnings

import pytest
import torch
from lightning.pytorch import Callback

from merge_callback import Ema, MergeCallback, SpikeDetector, SpikeRecovery
from merge_callback.capture.directory import DirectoryStorage
from merge_callback.capture.layout import RowLayout
from merge_callback.capture.ring import SnapshotRing
from merge_callback.capture.running_averages import Shadow
from merge_callback.capture.storage import HostStorage
from merge_callback.utilities.background import Background
from tests.capture.test_ring import merged, tensors
from tests.helpers.toys import (
    ResumableBatches,
    Toy,
    Tracker,
    assert_same_training,
    fit,
    interrupted_between_tensors,
    make,
    same,
)


class At(Callback):
    """Does something at the beginning of a step."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_train_batch_start(self, trainer, *arguments):
        if trainer.global_step == self.step:
            self.do()


def in_the_way(folder):
    """Later files cannot be written."""
    for slot in range(4):
        path = folder / f"merge-rank00000-{slot:03d}.safetensors"
        path.unlink(missing_ok=True)
        path.mkdir()


def flipped(folder):
    path = folder / "merge-rank00000-003.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def foreign(folder):
    (folder / "merge-rank00000-000.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")


def another_run(folder):
    for path in (folder.parent / "theirs").iterdir():
        shutil.copy(path, folder)


def lost(callback, spoil, folder):
    # All that was captured is on the disk first.
    callback.state_dict()
    spoil(folder)


def files_of_another_run(folder):
    callback = MergeCallback(2, 4, storage=folder / "theirs")
    fit(make(Toy), folder / "their run", callback, max_steps=8)
    callback.state_dict()


# The files are of steps 10, 4, 6 and 8, and two more snapshots follow, of steps 12 and 14.
SPOILT = {
    in_the_way: {8: "cannot be read", 10: "cannot be read", 12: "could not be written", 14: "could not be written"},
    shutil.rmtree: {8: "cannot be read", 10: "cannot be read"},
    flipped: {8: "is corrupt"},
    foreign: {10: "cannot be read"},
    another_run: {8: "written by another run", 10: "written by another run"},
}


def said(warned):
    return [text for each in warned if "left out" in (text := str(each.message))]


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.sample(2)
def test_a_checkpoint_holds_the_snapshots_that_there_are_and_none_under_a_wrong_step(tmp_path, spoil):
    files_of_another_run(tmp_path)
    folder, tracker = tmp_path / "snapshots", Tracker()
    callback, again = (MergeCallback(2, 4, storage=tmp_path / name) for name in ("snapshots", "others"))
    at = At(11, lambda: lost(callback, spoil, folder))
    settings = {"max_steps": 15, "train": ResumableBatches(), "val_check_interval": 16}
    stopped = fit(make(Toy), tmp_path / "run", tracker, callback, at, **settings)
    path = str(tmp_path / "stopped.ckpt")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        stopped.trainer.save_checkpoint(path)
        fit(make(Toy), tmp_path / "resumed", again, **settings, ckpt_path=path)
    saved = torch.load(path, weights_only=True)["callbacks"][callback.state_key]
    assert saved["capture"]["steps"] == [8, 10, 12, 14]
    for (step, problem), (expected_step, what) in zip(
        saved["capture"]["problems"].items(), SPOILT[spoil].items(), strict=True
    ):
        assert step == expected_step
        assert what in problem
        assert any(f"step {step} is left out of merges and checkpoints: {problem}" in each for each in said(warned))
    usable = [step for step in (8, 10, 12, 14) if step not in SPOILT[spoil]]
    assert {key.split(".")[1] for key in saved["tensors"]} == {str(step) for step in usable}
    for key, tensor in saved["tensors"].items():
        _, step, name = key.split(".", 2)
        assert torch.equal(tensor, tracker.parameters[int(step)][name]), key
    # The run that goes on and the one that is resumed lose the same snapshots.
    assert again.snapshot_steps == callback.snapshot_steps == [8, 10, 12, 14]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not usable:
            for each in (callback, again):
                with pytest.raises(RuntimeError, match="no merge"):
                    each.merged_state_dict()
            return
        resumed = again.merged_state_dict()
        assert same(resumed, callback.merged_state_dict())
    assert again.snapshot_steps == callback.snapshot_steps == usable
    for name, tensor in tracker.merged(dict.fromkeys(usable, 1 / len(usable))).items():
        torch.testing.assert_close(resumed[name].double(), tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.sample(2)
def test_whatever_becomes_of_the_files_the_run_goes_on_and_later_snapshots_are_kept(tmp_path, spoil):
    files_of_another_run(tmp_path)
    folder = tmp_path / "snapshots"
    callback = MergeCallback(2, 4, storage=folder)

    def back_again():
        for path in folder.glob("*.safetensors"):
            if path.is_dir():
                path.rmdir()

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        spoiler, repair = At(11, lambda: lost(callback, spoil, folder)), At(17, back_again)
        with_it = fit(make(Toy), tmp_path / "run", callback, spoiler, repair, max_steps=30)
    steps = [step for step in SPOILT[spoil] if step <= 12]
    assert [text for text in said(warned) if any(f"step {step} is" in text for step in steps)]
    assert callback.snapshot_steps == [24, 26, 28, 30]
    assert_same_training(with_it, fit(make(Toy), tmp_path / "without", max_steps=30))


def test_a_wait_that_is_interrupted_is_not_over():
    background, go, release, done = Background("test"), threading.Event(), threading.Event(), threading.Event()

    def work():
        go.wait()
        # By then the other thread waits for this one.
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        release.wait()
        done.set()

    # A process that was started in the background ignores this signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    background.begin(work)
    try:
        with pytest.raises(KeyboardInterrupt):
            go.set()
            background.wait()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not done.is_set()
    release.set()
    background.wait()
    assert done.is_set()


class Interrupted(HostStorage):
    """A storage whose write of one step ends in its middle."""

    def write(self, slot, step, tensors):
        if step == 9:
            super().write(slot, step, {name: torch.full_like(tensor, 9) for name, tensor in tensors.items()})
            raise KeyboardInterrupt
        super().write(slot, step, tensors)


def test_a_snapshot_whose_write_is_interrupted_is_none():
    ring = SnapshotRing(Interrupted(RowLayout(tensors(0)), 3), 3)
    for step in range(4):
        ring.append(step, tensors(step))
    with pytest.raises(KeyboardInterrupt):
        ring.append(9, tensors(0))
    assert ring.steps == [2, 3]
    ring.append(4, tensors(4))
    assert ring.steps == [2, 3, 4]
    for position, step in enumerate(ring.steps):
        found = merged(ring, [float(place == position) for place in range(3)])
        assert same(found, tensors(step))


def test_an_average_that_an_interrupt_leaves_half_moved_restarts():
    shadow, live = Shadow(Ema(half_life_steps=1)), {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16)}
    shadow.update(1, live)
    later = {name: tensor + 1 for name, tensor in live.items()}
    with interrupted_between_tensors():
        shadow.update(2, later)
    assert shadow.tensors["a"][0] == 0.5
    assert shadow.step is None
    shadow.update(3, later)
    assert shadow.step == 3
    assert [float(shadow.tensors[name][0]) for name in "ab"] == [1, 1]


def test_a_spike_never_brings_back_what_fails_its_checksum(tmp_path):
    folder, tracker = tmp_path / "snapshots", Tracker()
    merge = MergeCallback(2, 4, storage=folder)
    recovery = SpikeRecovery(merge, detector=SpikeDetector(threshold=8, patience=2, window=20))
    module = make(Toy)

    def spoil():
        lost(merge, flipped, folder)
        with torch.no_grad():
            module.out.bias.fill_(float("nan"))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(SpikeRecovery|left out|No snapshot)")
        fit(module, tmp_path / "run", tracker, merge, recovery, At(11, spoil), max_steps=12, limit_val_batches=0)
    assert recovery.recoveries == [12]
    # The snapshot of step 8 is spoilt, and that of step 12 is of the spike.
    for name, tensor in tracker.merged(dict.fromkeys([4, 6, 10], 1 / 3)).items():
        torch.testing.assert_close(dict(module.named_parameters())[name].double(), tensor, rtol=1e-5, atol=1e-6)


def test_a_row_that_cannot_be_used_is_never_merged(tmp_path):
    storage = DirectoryStorage(RowLayout(tensors(0)), None, tmp_path / "files", "merge-rank00000-")
    ring = SnapshotRing(storage, 4)
    for step in range(4):
        ring.append(step, tensors(step))
    storage.row(0)
    flipped(tmp_path / "files")
    for attempt in (lambda: ring.combine([0.25] * 4), lambda: ring.combine([0.0, 0.0, 0.0, 1.0])):
        with pytest.raises(OSError, match=r"003\.safetensors is corrupt"):
            attempt()
    assert same(merged(ring, [0.0, 0.0, 1.0, 0.0]), tensors(2))
