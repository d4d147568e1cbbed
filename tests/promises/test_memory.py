"""Bytes are counted: what a capture and a merge take beside the ring, measured by the kernel."""

import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
pytestmark = pytest.mark.slow
# Prints by how many bytes the process grew at most during captures, during a merge that is swapped in, during four
# merges one after the other of which the first has been made before, and during updates of an average.
PROGRAM = """
import sys
from pathlib import Path
import torch
from merge_callback.merging.averages import Ema
from merge_callback.capture.running_averages import Shadow
from merge_callback.capture import ring as snapshots
from merge_callback.capture.storage import DeviceStorage
from merge_callback.capture.layout import RowLayout
from merge_callback.capture.ring import SnapshotRing
from merge_callback.capture.directory import DirectoryStorage
from merge_callback.capture.storage import HostStorage
from merge_callback.live.swap import swapped_weights

torch.set_num_threads(1)

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

def growth(work):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before

live = {f"weight{i}": torch.nn.Parameter(torch.ones(8 * 2**18)) for i in range(8)}
layout, kind, folder = RowLayout(live), sys.argv[1], Path(sys.argv[2])
dtype = getattr(torch, sys.argv[3])
storage = DirectoryStorage(layout, dtype, folder, "") if kind == "files" else (
    DeviceStorage if kind == "device" else HostStorage)(layout, 4, dtype)
ring = SnapshotRing(storage, 4)
ring.append(0, live)
ring.problems()
ring.combine([1.0])

def capture():
    for step in range(1, 6):
        ring.append(step, live)
    ring.problems()

def merge():
    row = ring.combine([0.25] * 4)
    with swapped_weights(live, layout.views(row)):
        assert float(live["weight0"][0]) == 1.0

def merges_again():
    for row in ring.merges([[0.25] * 4] * 4):
        with swapped_weights(live, layout.views(row)):
            assert float(live["weight0"][0]) == 1.0

shadow = Shadow(Ema(half_life_steps=3))
shadow.update(0, {name: tensor.to(dtype) for name, tensor in live.items()})

def average():
    for step in range(1, 4):
        shadow.update(step, narrow)

narrow = {name: tensor.detach().to(dtype) for name, tensor in live.items()}
grown = [growth(capture), growth(merge)]
snapshots.AMPLE_SHARE = 0.0
next(ring.merges([[0.25] * 4]))
print(*grown, growth(merges_again), growth(average))
"""
# Eight tensors of 2**21 float32 elements.
MODEL_BYTES = 64 * MIB
CHUNK_BYTES = 64 * MIB


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["device", "cpu", "files"])
def test_a_merge_takes_one_copy_of_the_model_and_all_else_takes_nothing(tmp_path: Path, kind: str, dtype: str) -> None:
    command = [sys.executable, "-c", PROGRAM, kind, str(tmp_path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    captured, merged, merged_again, averaged = map(int, done.stdout.split())
    assert captured <= CHUNK_BYTES / 4
    assert MODEL_BYTES / 2 < merged <= MODEL_BYTES + CHUNK_BYTES / 4
    assert merged_again <= CHUNK_BYTES / 4
    assert averaged <= CHUNK_BYTES / 4
