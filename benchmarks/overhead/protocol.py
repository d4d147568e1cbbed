"""Question, statistic and pass rules of the overhead benchmark, written before it was run; and what it runs on.

**Question.** What does it cost to capture weights, to average them at every step, to merge them and to evaluate the
merge: beside other averagers, beside a plain copy of the same bytes, and beside the training itself?

**Models.** Lists of float32 tensors, each in a module of its own: 30 M parameters in 150 tensors, 8 M in 2,000 small
tensors, and the tensors of GPT-2 with 124 M parameters. The two parts that train take the demo's model and settings.

**Peers.** Lightning's `EMAWeightAveraging` and its `WeightAveraging` with torch's foreach update, torch's
`AveragedModel` with the same update, timm's `ModelEmaV3`, ema-pytorch's `EMA` with ``use_foreach``, and loops over
state dicts as people write them by hand. All averages keep 0.999 of themselves at an update.

**Statistic.** All contestants take turns in one process (A, B, C, A, B, C, ...). Rounds of a warm-up are left out. What
counts is the median over rounds of the ratio of two contestants' seconds in the same round. Merges by peers, which no
rule is about and which take seconds, take part in the first few rounds only. Every part but the
trainings is measured with one torch thread and with two, and beside every median stands the interval that holds it with
a probability of 95 %. A *plain copy* is ``torch._foreach_copy_`` between two sets of
the model's tensors. Rings and copies are in memory before the clock starts; what a merge allocates is its own cost.

**Pass rules.** Each holds if it holds for every model and number of threads.

- *EMA update*, for `Shadow.update` alone and for all that `MergeCallback` does at the end of a batch, in a real fit: no
  slower than 1.03 times the fastest peer; no slower than a plain copy; and at least four times as fast as the hook of
  Lightning's `EMAWeightAveraging`.
- *Capture* into a ring on the model's device: at least 0.95 of the speed of a plain copy. Beside it, without a rule,
  all that the callback does at a capture, its check for NaN included.
- *Merge* of 10 float32 snapshots with unequal weights: at least 0.85 of the bound that the memory sets. A copy moves
  its bytes twice, so the bound is ``(N * snapshot bytes + merge bytes) / (2 * copied bytes)`` times its seconds. The
  merge is made as the callback makes it, into a row that it keeps; beside it, without a rule, into a new row.
- *Merge* of 10 bfloat16 snapshots into float32 weights: at least 0.60 of the bound, by the same formula.
- *Four merges* of one ring: at most 1.6 times one.
- *Swap* of a merge into the live model and back: at most one millisecond, also for a billion parameters. In place, as
  shards need it: at most half of what Lightning's exchange takes.
- *Training step* between captures: at most 1.003 of that without the callback. Blocks of one step with and without it
  take turns in one fit of the demo; the median ratio of neighbouring blocks counts. Beside it the time spent in its
  hooks.
- *Hooks*: what the callback's hooks take in a step between captures, of the step of a model of a hundred million
  parameters: at most 0.001. In 60,000 steps of one fit, with 100 merged validations and a file of 20,000 records, hooks
  take no more time in the last tenth of the steps than in the second tenth, within 5 %; and to learn from a merged
  validation takes no more in the last tenth than in the second, within 20 %.
- *Whole run* at the demo's settings with a merged validation at each live one: (seconds with the callback - seconds
  without - what the live validation of as many batches takes) / seconds without, at most 0.01; the median of pairs of
  runs. The runs are shorter than the demo, with validations as often. Beside it the same from clocks inside the run:
  what evaluations took beyond the live validation of as many batches, and what the hooks took.

**On a GPU** (``run.py --device cuda``) the clock stops when the device has done its work, the model trained is of
GPT-2's size, and these rules hold besides, or instead:

- *Merge* of 10 float32 snapshots: at least 0.90 of the bound; of 10 bfloat16 ones, at least 0.85.
- *Training step* between captures: at most 1.001 of that without the callback.
- *Waits*: the callback, which also keeps an average, never makes the host wait for the device in a step between
  captures. The profiler counts the calls.
- *In flight*: a training step while a capture is on its way to pinned host memory, at most 1.02 of one without. Blocks
  of steps with a capture at each of them, and without the callback, take turns.
- *Memory*: what the allocator gives out at its peak beyond ring and model, when a snapshot is taken, merged and swapped
  in: at most the merge and 64 MiB; with snapshots in host memory, where the merge is too, at most 64 MiB.

**Scaling.** Seconds of captures and merges for 10 M to 1 B parameters and 2 to 50 snapshots, in so far as the ring
takes at most 12 GB; and for 100 M parameters spread over 1 to 4 processes, which share the machine's cores and memory.
No rule.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scipy.stats import binom

Shapes = list[tuple[int, ...]]

ROOT = Path(__file__).parents[2]
RECORDS = Path(__file__).parent / "records"
COPY = "plain copy"
CAPTURE = "capture"
UPDATE = "EMA update"
MERGES = "SnapshotRing.merges"
IN_PLACE = "swapped_weights, in place"
LIGHTNING_EXCHANGE = "Lightning WeightAveraging's exchange"
DECAY = 0.999
NUM_SNAPSHOTS = 10
# Coefficients of four merges of the same ten snapshots are those of these rules.
RULES_OF_FOUR = ("wma", "sma", "ema", "1-sqrt")


@dataclass(frozen=True)
class PassRule:
    """A limit for a median."""

    what: str
    limit: float
    is_upper: bool = True
    unit: str = "x"

    def is_reached(self, value: float) -> bool:
        """Whether the value is on the right side of the limit."""
        return value <= self.limit if self.is_upper else value >= self.limit

    def missed_by(self, value: float) -> float:
        """How far beyond the limit the value is, as a share of the limit; zero or less where it is reached."""
        beyond = (value - self.limit) * (1 if self.is_upper else -1)
        return beyond / self.limit if self.limit else beyond


PASS_RULES = {
    "fastest": PassRule("EMA update, over the fastest peer", 1.03),
    "copy": PassRule("EMA update, over a plain copy", 1.0),
    "lightning": PassRule("Lightning's EMAWeightAveraging, over the EMA update", 4.0, is_upper=False),
    "capture": PassRule("speed of a capture, over that of a plain copy", 0.95, is_upper=False),
    "merge float32": PassRule("bound of a merge of 10 float32 snapshots, over the merge", 0.85, is_upper=False),
    "merge bfloat16": PassRule("bound of a merge of 10 bfloat16 snapshots, over the merge", 0.60, is_upper=False),
    "several": PassRule("four merges, over one", 1.6),
    "swap": PassRule("swap in and out", 1.0, unit=" ms"),
    "in place": PassRule("swap in place, over Lightning's exchange", 0.5),
    "step": PassRule("step with the callback, over one without", 1.003),
    "hooks": PassRule("time in hooks, over a step of a model of 100 M parameters", 0.001),
    "growth": PassRule("time in hooks at the end of 60,000 steps, over that at the beginning", 1.05),
    "growth of validations": PassRule("learning from a merged validation, at the end over the beginning", 1.2),
    "whole": PassRule("run with merges, beyond the run without and the batches, over the run without", 0.01),
    "merge float32 on a GPU": PassRule(
        "bound of a merge of 10 float32 snapshots on a GPU, over the merge", 0.90, is_upper=False
    ),
    "merge bfloat16 on a GPU": PassRule(
        "bound of a merge of 10 bfloat16 snapshots on a GPU, over the merge", 0.85, is_upper=False
    ),
    "step on a GPU": PassRule("step on a GPU with the callback, over one without", 1.001),
    "waits": PassRule("waits of the host for a GPU that the callback adds to a step", 0.0, unit=" a step"),
    "in flight": PassRule("step while captures go to pinned memory, over one without", 1.02),
    "memory": PassRule("peak of a GPU's memory beyond model and ring, over the merge and 64 MiB", 1.0),
}


@dataclass(frozen=True)
class Median:
    """A median with the interval that holds it with a probability of 95 %."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Median":
        """Times a positive number."""
        return Median(self.value * factor, self.low * factor, self.high * factor)


def median(samples: Iterable[float]) -> Median:
    """The median, and the order statistics around it between which it lies, whatever the samples' distribution.

    Of five samples or fewer the interval is all of their range, and holds it with less.

    >>> median(range(1, 11))
    Median(value=5.5, low=2, high=9)
    """
    ordered = sorted(samples)
    # So many samples on either side of it are less likely than 2.5 %.
    beyond = int(binom.ppf(0.025, len(ordered), 0.5)) - 1
    first = max(beyond, 0)
    return Median(statistics.median(ordered), ordered[first], ordered[-1 - first])


def paired_ratio(seconds: Sequence[float], others: Sequence[float]) -> Median:
    """Median of the ratio of two contestants' seconds in the same round, over the rounds in which both took part."""
    return median(ours / theirs for ours, theirs in zip(seconds, others, strict=False))


def bound_in_copies(num_snapshots: int, snapshot_bytes: int, merge_bytes: int = 4) -> float:
    """The least time that a merge can take, in plain float32 copies of the model.

    Args:
        num_snapshots: How many are read.
        snapshot_bytes: Bytes of one of their elements.
        merge_bytes: Bytes of an element of the merge.

    >>> bound_in_copies(10, snapshot_bytes=4), bound_in_copies(10, snapshot_bytes=2)
    (5.5, 3.0)
    """
    return (num_snapshots * snapshot_bytes + merge_bytes) / (2 * 4)


def gpt2_shapes(width: int = 768, num_layers: int = 12, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """Shapes of GPT-2's parameters in their order; its head is its embedding.

    >>> import math
    >>> sum(map(math.prod, gpt2_shapes()))
    124439808
    """
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *(norm + attention + norm + feed_forward) * num_layers, *norm]


@dataclass(frozen=True)
class Amount:
    """How much is measured, and on what."""

    models: dict[str, Shapes]
    # Too large for anything but swaps.
    largest: Shapes
    device: str = "cpu"
    num_threads: tuple[int, ...] = (1, 2)
    num_warm_up: int = 3
    # Of merges; of those by peers; of all that takes milliseconds.
    num_rounds: int = 15
    num_peer_rounds: int = 3
    num_quick_rounds: int = 30
    scaling_parameters: tuple[int, ...] = (10**7, 3 * 10**7, 10**8, 3 * 10**8, 10**9)
    scaling_snapshots: tuple[int, ...] = (2, 5, 10, 20, 50)
    num_scaling_rounds: int = 3
    num_ranks: tuple[int, ...] = (1, 2, 3, 4)
    num_sharded_parameters: int = 10**8
    max_ring_bytes: int = 12 * 10**9
    # Of the demo's model, in the parts that train.
    training: tuple[str, ...] = ()
    block_steps: int = 1
    num_block_pairs: int = 300
    # Long enough for a copy to be under way in nearly all of its steps.
    in_flight_steps: int = 10
    num_in_flight_pairs: int = 30
    # Of the demo's model: a hundred million parameters on a short batch, and a model that is nearly none.
    large: tuple[str, ...] = ("model.width=768", "model.num_layers=15", "model.num_heads=12", "data.batch_size=1")
    num_large_steps: int = 30
    num_long_steps: int = 60_000
    num_long_validations: int = 100
    num_old_records: int = 20_000
    run_steps: int = 225
    num_run_pairs: int = 4


FULL = Amount(
    models={
        "30 M in 150 tensors": [(400, 500)] * 150,
        "8 M in 2,000 tensors": [(64, 64)] * 2000,
        "GPT-2 (124 M)": gpt2_shapes(),
    },
    largest=[(10_000, 10_000)] * 10,
)
ON_GPU = replace(
    FULL,
    device="cuda",
    num_threads=(1,),
    models={**FULL.models, "1 B in 100 tensors": [(10_000, 1000)] * 100},
    max_ring_bytes=45 * 10**9,
    num_rounds=25,
    num_quick_rounds=50,
    num_scaling_rounds=10,
    num_block_pairs=150,
    num_in_flight_pairs=20,
    # GPT-2's width and depth: 86 M parameters, and a third of a second for ten steps where the device is fast.
    training=(
        "model.width=768",
        "model.num_layers=12",
        "model.num_heads=12",
        "demo.context=512",
        "data.batch_size=16",
        "+trainer.precision=bf16-mixed",
    ),
    num_run_pairs=2,
)
SMOKE = Amount(
    models={"small, 150 tensors": [(40, 50)] * 150, "small GPT-2": gpt2_shapes(48, 3, 500, 64)},
    largest=[(1000, 1000)] * 10,
    num_warm_up=1,
    num_rounds=4,
    num_peer_rounds=2,
    num_quick_rounds=3,
    scaling_parameters=(10**5, 10**6),
    scaling_snapshots=(2, 5),
    num_scaling_rounds=2,
    num_ranks=(1, 2),
    num_sharded_parameters=10**5,
    block_steps=2,
    num_block_pairs=4,
    in_flight_steps=2,
    num_in_flight_pairs=4,
    large=("model.width=48",),
    num_large_steps=8,
    num_long_steps=200,
    num_long_validations=20,
    num_old_records=50,
    run_steps=150,
    num_run_pairs=1,
)
