"""Places for snapshots: what they are called with, and what they say of themselves."""

import pytest
import torch

from merge_callback import MergeCallback, SnapshotDirectory, SnapshotMemory
from merge_callback.capture.layout import RowLayout
from merge_callback.capture.memory import CaptureSizes
from merge_callback.capture.storage import DeviceStorage, HostStorage

LAYOUT = RowLayout({"weight": torch.zeros(2**18)})
SIZES = CaptureSizes(snapshots=3 * 2**20, averages=2**20, copy=2**20)


@pytest.mark.parametrize(
    ("place", "arguments", "error", "message"),
    [
        (SnapshotMemory, {"place": "gpu"}, ValueError, "place must be 'device' or 'cpu', got 'gpu'"),
        (SnapshotMemory, {"in_checkpoints": 1}, TypeError, "in_checkpoints must be True or False, got 1"),
        (SnapshotDirectory, {"path": "a", "strict": 1}, TypeError, "strict must be True or False, got 1"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name_and_value(place, arguments, error, message):
    with pytest.raises(error, match=message):
        place(**arguments)


def test_words_and_paths_name_places(tmp_path):
    assert MergeCallback().storage == SnapshotMemory("device")
    assert MergeCallback(storage="cpu").storage == SnapshotMemory("cpu")
    assert MergeCallback(storage=tmp_path).storage == SnapshotDirectory(tmp_path)
    place = SnapshotMemory("cpu", in_checkpoints=False)
    assert MergeCallback(storage=place).storage is place


def test_each_place_makes_its_storage_and_says_what_it_takes(tmp_path):
    device, host, files = SnapshotMemory(), SnapshotMemory("cpu"), SnapshotDirectory(tmp_path / "files")
    assert isinstance(device.new_storage(LAYOUT, 3, None, "merge"), DeviceStorage)
    assert isinstance(host.new_storage(LAYOUT, 3, None, "merge"), HostStorage)
    assert files.new_storage(LAYOUT, 3, None, "merge").path(1) == tmp_path / "files" / "merge-rank00000-001.safetensors"
    assert device.describe(LAYOUT, 3, None, SIZES) == "in 5.0 MiB on cpu"
    assert host.describe(LAYOUT, 3, None, SIZES) == "in 5.0 MiB of host memory"
    assert files.describe(LAYOUT, 4, torch.bfloat16, SIZES) == (
        f"in files in {tmp_path / 'files'}, up to 2.0 MiB by each rank, with 3.0 MiB of host memory and 1.0 MiB on cpu"
    )
    assert [place.num_rows_in_memory(4) for place in (device, host, files)] == [4, 4, 1]
