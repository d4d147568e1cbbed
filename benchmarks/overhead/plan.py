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


@dataclass(frozen=True)
class Kept:
    """The snapshots of a window.

    Args:
        name: What the tables say.
        number: How many.
        dtype: In which dtype.
        num_samples: Steps of each interval that a mean takes; 1 keeps the weights at its end.
    """

    name: str
    number: int
    dtype: str
    num_samples: int = 1

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2


KINDS = (
    Kept("10 points, float32", NUM_SNAPSHOTS, "float32"),
    Kept("10 points, bfloat16", NUM_SNAPSHOTS, "bfloat16"),
    Kept("4 means, bfloat16", 4, "bfloat16", num_samples=8),
)
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
    """What a rank holds, for each kind of snapshots."""
    rows = []
    for layout in LAYOUTS:
        for kept in KINDS:
            ring, live = layout.num_parameters * kept.size * kept.number, layout.num_parameters * 4
            interval = live if kept.num_samples > 1 else 0
            total = (ring + interval) * layout.num_shards
            cells = [f"{each / GB:.2f} GB" if each else "-" for each in (ring, interval, live, live)]
            rows.append(
                [layout.name, kept.name, f"{layout.num_parameters / 1e6:,.0f} M", *cells, f"{total / GB:,.0f} GB"]
            )
    header = ["layout", "snapshots", "parameters of a rank", "ring", "sum of an interval", "merge", "`Ema`"]
    return table([*header, "in a checkpoint, all ranks"], rows)


def seconds_table(rates: Rates, shares: dict[str, float]) -> str:
    """What a rank waits for."""
    rows = []
    for layout in LAYOUTS:
        for kept in KINDS:
            live, snapshot = layout.num_parameters * 4, layout.num_parameters * kept.size
            merged_bytes = kept.number * snapshot + live
            swap = 3 * 2 * live
            is_mean = kept.num_samples > 1
            # A mean reads the weights, and reads and writes its sum, at each of its steps.
            sample = 3 * live / rates.device_memory / shares["capture"]
            merging = {place: merged_bytes / rate / shares[kept.dtype] for place, rate in vars(rates).items()}
            times = {
                "device": (
                    kept.num_samples * sample
                    if is_mean
                    else (live + snapshot) / rates.device_memory / shares["capture"],
                    merging["device_memory"] + swap / rates.device_memory,
                ),
                '"cpu"': (
                    # What a mean takes leaves the device at every one of its steps.
                    kept.num_samples * (live if is_mean else snapshot) / rates.link,
                    merging["host_memory"] + 3 * live / rates.link,
                ),
                "a directory": (
                    kept.num_samples * (live if is_mean else snapshot) / rates.link,
                    kept.number * snapshot / rates.disk + live / rates.host_memory + 3 * live / rates.link,
                ),
            }
            saved = (kept.number * snapshot + (live if is_mean else 0)) / rates.disk
            for storage, (capture, merge) in times.items():
                rows.append([layout.name, kept.name, storage, *map(_time, (capture, merge, saved))])
    return table(["layout", "snapshots", "storage", "an interval", "a merge, in and out", "in a checkpoint"], rows)


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

Four means do in a window what ten points do ([how](window.md)). The ring stays; the merge is there while it is validated.
An `Ema` over every step is one more copy and needs no ring.
With `storage="cpu"` both are in host memory, with a directory the ring is in files.

## What a rank waits for

{seconds_table(rates, shares)}

An interval has one capture, and a mean up to {KINDS[-1].num_samples} samples of it, at as many of its steps. A capture into host
memory is under way while the next forward pass runs; with a directory the training waits for the copy from the GPU, and the file is written beside it. Nothing is communicated by captures and merges. A merged
validation costs what a live one does, which is more than all of this: `limit_batches` and `max_overhead` bound it.

## What to choose

- The ring in every checkpoint is the largest cost: model and Adam's states take {NUM_PARAMETERS * 12 / GB:,.0f} GB.
  `dtype="bfloat16"` halves it; `snapshot="mean", num_snapshots=4` makes it smaller again; `SnapshotMemory(in_checkpoints=False)` leaves it out, and the window begins anew after a resume.
- `storage="cpu"` where device memory is short: a capture every few thousand steps and a merge at a validation are rare
  enough for host memory. A directory is for hosts that have none to spare.
- HSDP holds the same shards once in each replica, so its ranks keep eight times as much.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
