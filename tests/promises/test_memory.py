"""Bytes are counted: what a capture and a merge take beside the ring, measured by the kernel."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from merge_callback.capture import ring as snapshots
from merge_callback.capture.directory import DirectoryStorage
from merge_callback.capture.kinds import MeanSnapshots
from merge_callback.capture.layout import RowLayout
from merge_callback.capture.ring import MeanRing, SnapshotRing
from merge_callback.capture.running_averages import Shadow
from merge_callback.capture.storage import DeviceStorage, HostStorage, SnapshotStorage
from merge_callback.live.swap import swapped_weights
from merge_callback.merging.averages import Ema
from tests.helpers.processes import call

MIB = 2**20
pytestmark = pytest.mark.slow
# Eight tensors of 2**21 float32 elements.
MODEL_BYTES = 64 * MIB
CHUNK_BYTES = 64 * MIB


def status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def growth(work: Callable[[], None]) -> int:
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def grown(kind: str, folder: Path, name: str) -> list[int]:
    """By how many bytes the process grows at most during captures, during a merge that is swapped in, during four
    merges one after the other of which the first has been made before, and during updates of an average, and
    while a mean gets samples, snapshots that are means are stored and the ring is thinned."""
    torch.set_num_threads(1)
    live = {f"weight{i}": torch.nn.Parameter(torch.ones(8 * 2**18)) for i in range(8)}
    layout, dtype = RowLayout(live), getattr(torch, name)
    storage: SnapshotStorage
    if kind == "files":
        storage = DirectoryStorage(layout, dtype, folder, "")
    else:
        storage = (DeviceStorage if kind == "device" else HostStorage)(layout, 4, dtype)
    ring = SnapshotRing(storage, 4)
    ring.append(0, live)
    ring.problems()
    ring.combine([1.0])

    def capture() -> None:
        for step in range(1, 6):
            ring.append(step, live)
        ring.problems()

    def merge() -> None:
        row = ring.combine([0.25] * 4)
        with swapped_weights(live, layout.views(row)):
            assert float(live["weight0"][0]) == 1.0

    def merges_again() -> None:
        for row in ring.merges([[0.25] * 4] * 4):
            with swapped_weights(live, layout.views(row)):
                assert float(live["weight0"][0]) == 1.0

    mean = MeanSnapshots(99, None)
    assert mean.is_due(6, 20)
    mean.add(6, 20, live)

    def means() -> None:
        for step in range(7, 19):
            mean.add(step, 20, live)
        mean_ring = MeanRing(storage, 4)
        for step in range(4):
            mean_ring.append(step + 1, live, step)
        mean_ring.thin()
        mean_ring.problems()

    narrow = {name: tensor.detach().to(dtype) for name, tensor in live.items()}
    shadow = Shadow(Ema(half_life_steps=3))
    shadow.update(0, narrow)

    def average() -> None:
        for step in range(1, 4):
            shadow.update(step, narrow)

    first = [growth(capture), growth(merge)]
    snapshots.AMPLE_SHARE = 0.0
    next(ring.merges([[0.25] * 4]))
    return [*first, growth(merges_again), growth(average), growth(means)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["device", "cpu", "files"])
def test_a_merge_takes_one_copy_of_the_model_and_all_else_takes_nothing(tmp_path: Path, kind: str, dtype: str) -> None:
    captured, merged, merged_again, averaged, meant = call(grown, kind, tmp_path, dtype)
    assert captured <= CHUNK_BYTES / 4
    assert MODEL_BYTES / 2 < merged <= MODEL_BYTES + CHUNK_BYTES / 4
    assert merged_again <= CHUNK_BYTES / 4
    assert averaged <= CHUNK_BYTES / 4
    assert meant <= CHUNK_BYTES / 4
