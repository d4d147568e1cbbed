"""Snapshots in host memory and in files: the same merges, and files that are missing, corrupt or cannot be written."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_callback import Ema, MergeCallback, SnapshotDirectory
from merge_callback.capture.directory import DirectoryStorage
from merge_callback.capture.layout import RowLayout
from merge_callback.capture.ring import SnapshotRing
from merge_callback.capture.storage import DeviceStorage, HostStorage
from tests.capture.test_ring import merged, tensors, uniform
from tests.helpers.toys import Toy, fit, make, same


def storage_of(kind, layout, capacity, tmp_path, dtype=None):
    if kind == "files":
        return DirectoryStorage(layout, dtype, tmp_path / "files", "merge-")
    return {"device": DeviceStorage, "cpu": HostStorage}[kind](layout, capacity, dtype)


@pytest.mark.parametrize("kind", ["cpu", "files"])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float64, torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_merges_are_the_same_wherever_the_rows_are(tmp_path, kind, dtypes, dtype):
    rings = []
    for each in ("device", kind):
        ring = SnapshotRing(storage_of(each, RowLayout(tensors(0, dtypes)), 3, tmp_path, dtype), 3)
        for step in range(5):
            ring.append(step, tensors(step, dtypes))
        rings.append(ring)
    expected, found = (merged(ring, [0.2, 0.3, 0.5]) for ring in rings)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
def test_there_are_never_more_files_than_snapshots_and_none_half_written(tmp_path):
    callback = MergeCallback(1, 4, storage=tmp_path / "snapshots")
    fit(make(Toy), tmp_path, callback)
    callback.merged_state_dict()
    files = sorted(file.name for file in (tmp_path / "snapshots").iterdir())
    assert files == [f"merge-rank00000-{slot:03d}.safetensors" for slot in range(4)]
    rows = load_file(tmp_path / "snapshots" / files[0])
    assert list(rows) == ["row0"]


def spoilt(path, how):
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    else:
        save_file({"row0": torch.zeros(3)}, path)


HOWS = {
    "missing": "cannot be read",
    "cut short": "cannot be read",
    "flipped": "is corrupt",
    "another": "was written by another run",
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.sample(1)
def test_a_spoilt_file_is_named_and_left_out(tmp_path, how):
    callback = MergeCallback(2, 3, storage=tmp_path / "snapshots")
    fit(make(Toy), tmp_path / "run", callback)
    assert callback.snapshot_steps == [20, 22, 24]
    # Twelve snapshots were taken in turn into three files.
    path = tmp_path / "snapshots" / "merge-rank00000-001.safetensors"
    spoilt(path, how)
    with pytest.warns(UserWarning, match=rf"step 22 is left out of merges and checkpoints: .*{path.name} {HOWS[how]}"):
        callback.merged_state_dict()
    assert callback.coefficients() == {20: 0.5, 24: 0.5}


class Stepping(Toy):
    events: ClassVar[list[str]] = []

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        configured["optimizer"].register_step_post_hook(lambda *_: self.events.append("stepped"))
        return configured


class Clipping(Stepping):
    def on_train_batch_end(self, *arguments):
        self.events.append("clipped")


AT_A_STEP = {
    Stepping: (["finish", "stepped"], ["finish", "stepped", "write"]),
    Clipping: (["finish", "stepped", "finish", "clipped"], ["finish", "stepped", "write", "finish", "clipped"]),
}


@pytest.mark.usefixtures("both_lightnings")
@pytest.mark.parametrize("module", AT_A_STEP)
@pytest.mark.parametrize("where", ["cpu", "files"])
def test_whatever_writes_to_the_weights_waits_for_copies_under_way(tmp_path, monkeypatch, module, where):
    def told(method, event):
        def method_and_event(*arguments):
            Stepping.events.append(event)
            return method(*arguments)

        return method_and_event

    for name in ("write", "finish"):
        monkeypatch.setattr(HostStorage, name, told(getattr(HostStorage, name), name))
    Stepping.events.clear()
    callback = MergeCallback(2, 3, storage=tmp_path / "snapshots" if where == "files" else where)
    fit(make(module), tmp_path / "run", callback, max_steps=3)
    plain, captured = AT_A_STEP[module]
    expected = plain + captured + plain
    assert Stepping.events[: len(expected)] == expected


def test_a_strict_directory_refuses_a_spoilt_file(tmp_path):
    callback = MergeCallback(2, 3, storage=SnapshotDirectory(tmp_path / "snapshots", strict=True))
    fit(make(Toy), tmp_path / "run", callback)
    spoilt(tmp_path / "snapshots" / "merge-rank00000-001.safetensors", "flipped")
    with pytest.raises(OSError, match=r"001\.safetensors is corrupt"):
        callback.merged_state_dict()
    assert callback.snapshot_steps == [20, 22, 24]


def test_a_snapshot_that_cannot_be_written_is_left_out_and_the_run_goes_on(tmp_path):
    storage = storage_of("files", RowLayout(tensors(0)), 3, tmp_path)
    ring = SnapshotRing(storage, 3)
    ring.append(1, tensors(1))
    # A folder of the file's name is in the way.
    storage.path(1).mkdir()
    ring.append(2, tensors(2))
    assert list(ring.problems()) == [2]
    assert "could not be written" in ring.problems()[2]
    ring.drop(ring.problems())
    assert torch.equal(merged(ring, uniform(ring))["transposed"], tensors(1)["transposed"])


@pytest.mark.parametrize("storage", ["device", "cpu", "files"])
@pytest.mark.slow
def test_a_callback_can_be_copied_also_after_a_fit(tmp_path, storage):
    place = tmp_path / "snapshots" if storage == "files" else storage
    callback = MergeCallback(2, 3, merges={"sma": "sma", "ema": Ema(half_life_steps=3)}, storage=place)
    copy.deepcopy(callback)
    fit(make(Toy), tmp_path / "run", callback)
    copied = copy.deepcopy(callback)
    for name in ("sma", "ema"):
        assert same(copied.merged_state_dict(name), callback.merged_state_dict(name))
    fit(make(Toy), tmp_path / "again", copied)
    again = {name: copied.merged_state_dict(name) for name in ("sma", "ema")}
    fit(make(Toy), tmp_path / "anew", callback)
    for name in ("sma", "ema"):
        assert same(again[name], callback.merged_state_dict(name))


@pytest.mark.slow
def test_snapshots_of_another_run_in_the_same_directory_are_told_from_those_of_this_one(tmp_path):
    first, second = (MergeCallback(2, 3, storage=tmp_path / "snapshots") for _ in range(2))
    fit(make(Toy), tmp_path / "first", first)
    fit(make(Toy, learning_rate=0.01), tmp_path / "second", second)
    second.merged_state_dict()
    with pytest.warns(UserWarning, match="was written by another run"), pytest.raises(RuntimeError, match="no merge"):
        first.merged_state_dict()


@pytest.mark.parametrize("name", ["a/b", "../x", "..", "a\\b", "a b", "é", "a%2Fb"])
def test_whatever_a_callback_is_called_its_files_stay_in_their_folder(tmp_path, name):
    callback = MergeCallback(2, 2, name=name, storage=tmp_path / "inner" / "files")
    fit(make(Toy), tmp_path / "logs", callback, max_steps=6)
    # Waits until all are written.
    callback.merged_state_dict()
    files = list((tmp_path / "inner" / "files").iterdir())
    assert len(files) == 2
    assert all(file.suffix == ".safetensors" for file in files)
    assert {path.name for path in tmp_path.iterdir()} == {"logs", "inner"}
    assert [path.name for path in (tmp_path / "inner").iterdir()] == ["files"]


@pytest.mark.parametrize("kind", ["device", "cpu", "files"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda ring: pickle.loads(pickle.dumps(ring))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_ring_goes_on_as_the_ring_itself(tmp_path, kind, copied):
    ring = SnapshotRing(storage_of(kind, RowLayout(tensors(0)), 3, tmp_path), 3)
    for step in range(3):
        ring.append(step, tensors(step))
    other = copied(ring)
    for each in (ring, other):
        each.append(3, tensors(3))
        found = merged(each, uniform(each))
        for name, tensor in tensors(1).items():
            mean = (tensor.double() + tensors(2)[name].double() + tensors(3)[name].double()) / 3
            torch.testing.assert_close(found[name].double(), mean, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_cost_is_told_by_place(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(make(Toy), tmp_path, MergeCallback(2, 3, storage=tmp_path / "snapshots"))
        fit(make(Toy), tmp_path, MergeCallback(2, 3, storage="cpu"))
    assert f"in files in {tmp_path / 'snapshots'}, up to 0.0 MiB by each rank" in caplog.text
    assert "MiB of host memory" in caplog.text
