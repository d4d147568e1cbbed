"""A run of 70 billion parameters on 512 GPUs, planned on paper; written to docs/planning-70b.md.

    python benchmarks/overhead/plan.py

What a rank holds follows from the layout. Seconds are its bytes over what memory and links are assumed to move, over
the share of that which the overhead benchmark measured. Nothing of it was run at that size.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import COPY, MERGES, NUM_SNAPSHOTS, RECORDS, ROOT, bound_in_copies, paired_ratio
from report import samples, table

from merge_callback import recommended_window

PAGE = ROOT / "docs" / "planning-70b.md"
NUM_PARAMETERS = 70 * 10**9
NUM_GPUS = 512
TOKENS_PER_STEP = 4 * 2**20
GB = 10**9


@dataclass(frozen=True)
class Rates:
    """Bytes a second that one rank is assumed to move, all ranks at the same time."""

    # An H200's memory moves 4.8 TB/s.
    device_memory: float = 4.8e12
    # A rank's eighth of a host whose memory moves 400 GB/s.
    host_memory: float = 50e9
    # PCIe 5.0 with 16 lanes, in practice.
    link: float = 50e9
    # A rank's eighth of a host with local disks of 16 GB/s, or of its share of a parallel file system.
    disk: float = 2e9


@dataclass(frozen=True)
class Layout:
    """How the parameters are spread."""

    name: str
    # Among how many ranks one copy of them is spread.
    num_shards: int

    @property
    def num_parameters(self) -> float:
        """Of one rank."""
        return NUM_PARAMETERS / self.num_shards


LAYOUTS = (
    Layout("FSDP2 over 512, or over 64 with TP 8", 512),
    Layout("FSDP2 over 64, eight replicas (HSDP)", 64),
)


def measured_shares(folder: Path = RECORDS) -> dict[str, float]:
    """The least share of a plain copy's speed, or of the memory's, over all models and threads of the benchmark."""
    capture, merge = (json.loads((folder / f"{part}.json").read_text())["measured"] for part in ("capture", "merge"))
    shares: dict[str, Any] = {
        "capture": min(paired_ratio(samples(each, COPY), samples(each, "ring, float32")).value for each in capture)
    }
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        bound = bound_in_copies(NUM_SNAPSHOTS, size)
        cases = [each for each in merge if each["dtype"] == dtype]
        shares[dtype] = min(bound * paired_ratio(samples(each, COPY), samples(each, MERGES)).value for each in cases)
    return shares


def bytes_table() -> str:
    """What a rank holds, for snapshots in two dtypes."""
    rows = []
    for layout in LAYOUTS:
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            ring = layout.num_parameters * size * NUM_SNAPSHOTS
            row, shadow = (layout.num_parameters * 4,) * 2
            total = ring * layout.num_shards
            cells = [f"{layout.num_parameters / 1e6:,.0f} M", *(f"{each / GB:.2f} GB" for each in (ring, row, shadow))]
            rows.append([layout.name, dtype, *cells, f"{total / GB:,.0f} GB"])
    header = ["layout", "snapshots in", "parameters of a rank", f"ring of {NUM_SNAPSHOTS}", "merge", "`Ema`"]
    return table([*header, "ring in a checkpoint, all ranks"], rows)


def seconds_table(rates: Rates, shares: dict[str, float]) -> str:
    """What a rank waits for."""
    rows = []
    for layout in LAYOUTS:
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            live, snapshot = layout.num_parameters * 4, layout.num_parameters * size
            merged_bytes = NUM_SNAPSHOTS * snapshot + live
            swap = 3 * 2 * live
            times = {
                "device": (
                    (live + snapshot) / rates.device_memory / shares["capture"],
                    merged_bytes / rates.device_memory / shares[dtype] + swap / rates.device_memory,
                ),
                '"cpu"': (
                    snapshot / rates.link,
                    merged_bytes / rates.host_memory / shares[dtype] + 3 * live / rates.link,
                ),
                "a directory": (
                    snapshot / rates.link,
                    NUM_SNAPSHOTS * snapshot / rates.disk + live / rates.host_memory + 3 * live / rates.link,
                ),
            }
            saved = NUM_SNAPSHOTS * snapshot / rates.disk
            for storage, (capture, merge) in times.items():
                rows.append([layout.name, dtype, storage, *map(_time, (capture, merge, saved))])
    return table(
        ["layout", "snapshots in", "storage", "a capture", "a merge, in and out", "ring in a checkpoint"], rows
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms" if seconds < 1 else f"{seconds:,.1f} s"


# ruff: noqa: E501 - lines of the page, which are shorter with their numbers.
def page() -> str:
    """The whole page."""
    rates, shares = Rates(), measured_shares()
    every = recommended_window(NUM_PARAMETERS, TOKENS_PER_STEP).every_n_train_steps
    return f"""# A run of 70 billion parameters on 512 GPUs, on paper

Made by `benchmarks/overhead/plan.py`. What a rank holds is arithmetic. Seconds are bytes over assumed rates, over the
shares of such rates that the [overhead benchmark](evidence.md) measured on a CPU, in its
worst case: {shares["capture"]:.2f} for captures, {shares["float32"]:.2f} for merges of float32 snapshots, {shares["bfloat16"]:.2f} for bfloat16 ones.
Nothing was run at that size. Of GPUs only one H100 has been measured, with up to a billion parameters.

Assumed for each rank, all of a host's eight at the same time: float32 parameters, {rates.device_memory / 1e12:g} TB/s of device memory,
{rates.host_memory / GB:g} GB/s of host memory, {rates.link / GB:g} GB/s between host and GPU, {rates.disk / GB:g} GB/s of disk. With {TOKENS_PER_STEP / 2**20:g} Mi tokens a step the
paper's interval for a dense model of this size, {every * TOKENS_PER_STEP / GB:.0f} B tokens (arXiv 2505.12082), is {every:,.0f} steps:
`MergeCallback(every_n_train_steps={round(every, -2):.0f}, num_snapshots={NUM_SNAPSHOTS}, dtype="bfloat16")`.

## What a rank holds

{bytes_table()}

The ring stays; the merge is there while it is validated. An `Ema` over every step is one more copy and needs no ring.
With `storage="cpu"` both are in host memory, with a directory the ring is in files.

## What a rank waits for

{seconds_table(rates, shares)}

A capture into host memory is under way while the next forward pass runs; with a directory the training waits for the
copy from the GPU, and the file is written beside it. Nothing is communicated by captures and merges. A merged
validation costs what a live one does, which is more than all of this: `limit_batches` and `max_overhead` bound it.

## What to choose

- The ring in every checkpoint is the largest cost: model and Adam's states take {NUM_PARAMETERS * 12 / GB:,.0f} GB.
  `dtype="bfloat16"` halves it; `SnapshotMemory(in_checkpoints=False)` leaves it out, and the window begins anew after a resume.
- `storage="cpu"` where device memory is short: a capture every few thousand steps and a merge at a validation are rare
  enough for host memory. A directory is for hosts that have none to spare.
- HSDP holds the same shards once in each replica, so its ranks keep eight times as much.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
