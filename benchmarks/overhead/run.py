"""Measures what merging costs, part by part; every call of a part overwrites its record.

    python benchmarks/overhead/run.py                # all parts, one after the other
    python benchmarks/overhead/run.py ema swap       # some of them
    python benchmarks/overhead/run.py --smoke        # all on small models, records to a temporary folder

Records go to benchmarks/records/overhead/<part>.json. Needs 18 GiB of free memory, a machine that does nothing else,
and the peers without what they depend on (timm's torchvision is not used):

    pip install --no-deps -c constraints.txt timm ema-pytorch

Read protocol.py first.
"""

import argparse
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from merge_callback import Ema, MergeCallback
from merge_callback.rules import merge_coefficients, resolve_rule
from merge_callback.shadow import Shadow
from merge_callback.snapshots import DeviceStorage, RowLayout, SnapshotRing
from merge_callback.swap import swapped_weights
from merge_callback.weights import LiveTensors, merged_parameters

sys.path.insert(0, str(Path(__file__).parent))
from contest import batch_end, take_turns, take_turns_in_fit
from models import Weights, touched_like
from peers import ema_peers, merge_peers
from protocol import (
    COPY,
    DECAY,
    FULL,
    IN_PLACE,
    LIGHTNING_EXCHANGE,
    MAX_RING_BYTES,
    MERGES,
    NUM_SNAPSHOTS,
    RECORDS,
    ROOT,
    RULES_OF_FOUR,
    SMOKE,
    Amount,
    Shapes,
    median,
)
from ranks import Job, sharded_seconds
from trainings import paired_blocks, paired_runs

Record = dict[str, Any]
HALF_LIFE_STEPS = math.log(0.5) / math.log(DECAY)


def settings(amount: Amount) -> Iterator[tuple[str, Shapes, Record]]:
    """Every model with every number of threads, which is set: name, shapes, what to record."""
    for name, shapes in amount.models.items():
        for num_threads in amount.num_threads:
            torch.set_num_threads(num_threads)
            yield name, shapes, {"model": name, "num_threads": num_threads}


def copy_action(live: dict[str, Tensor]) -> Callable[[], object]:
    """A plain copy of the tensors."""
    targets, sources = touched_like(live), list(live.values())
    return lambda: torch._foreach_copy_(targets, sources)


def filled_ring(live: dict[str, Tensor], capacity: int, dtype: torch.dtype | None = None) -> SnapshotRing:
    """A full ring on the model's device."""
    ring = SnapshotRing(DeviceStorage(RowLayout(live), capacity, dtype), capacity)
    for step in range(capacity):
        ring.append(step, live)
    return ring


def coefficients(rule: str, num_snapshots: int) -> list[float]:
    """Of a merge of evenly spaced snapshots."""
    return list(merge_coefficients(resolve_rule(rule), range(1, num_snapshots + 1)))


def summary(seconds: Mapping[str, list[float]]) -> Record:
    """Median with its interval, and all samples, of every contestant, in seconds."""
    return {
        name: {
            "median": _rounded((found := median(samples)).value),
            "interval": [_rounded(found.low), _rounded(found.high)],
            "samples": list(map(_rounded, samples)),
        }
        for name, samples in seconds.items()
    }


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.5g}")


def ema(amount: Amount) -> list[Record]:
    """An update of an exponential average, at every batch of a real fit."""
    measured = []
    for _, shapes, setting in settings(amount):
        module = Weights(shapes)
        shadow, tensors = Shadow(Ema(half_life_steps=HALF_LIFE_STEPS)), LiveTensors(module)
        ours = MergeCallback(merges=Ema(half_life_steps=HALF_LIFE_STEPS))
        lightning = EMAWeightAveraging(decay=DECAY)
        foreach = WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        steps = iter(range(1, 10**9))

        def update(shadow=shadow, tensors=tensors, steps=steps) -> None:
            tensors.find()
            shadow.update(next(steps), tensors.parameters())

        def actions(trainer, module=module, update=update, hooks=(ours, lightning, foreach)):
            hooks = [batch_end(hook, trainer, module) for hook in hooks]
            return {
                COPY: copy_action(module.live),
                "Shadow.update": update,
                "MergeCallback": hooks[0],
                "Lightning EMAWeightAveraging": hooks[1],
                "Lightning WeightAveraging, foreach": hooks[2],
                **ema_peers(module),
            }

        callbacks = [ours, lightning, foreach]
        seconds = take_turns_in_fit(module, callbacks, actions, amount.num_quick_rounds, amount.num_warm_up)
        measured.append({**setting, **module.description, "seconds": summary(seconds)})
    return measured


def capture(amount: Amount) -> list[Record]:
    """A snapshot into a full ring, and all that the callback does at a capture."""
    measured = []
    # Few slots, but too many for a cache.
    num_slots = 4
    for _, shapes, setting in settings(amount):
        module = Weights(shapes)
        rings = {dtype: filled_ring(module.live, num_slots, dtype) for dtype in (torch.float32, torch.bfloat16)}
        ours = MergeCallback(every_n_train_steps=1, num_snapshots=num_slots)
        steps = iter(range(num_slots, 10**9))

        def actions(trainer, module=module, rings=rings, steps=steps, ours=ours):
            live = module.live
            return {
                COPY: copy_action(live),
                "ring, float32": lambda: rings[torch.float32].append(next(steps), live),
                "ring, bfloat16": lambda: rings[torch.bfloat16].append(next(steps), live),
                "MergeCallback, float32": batch_end(ours, trainer, module),
                "clone of the state dict": lambda: {k: v.clone() for k, v in module.state_dict().items()},
            }

        seconds = take_turns_in_fit(module, [ours], actions, amount.num_quick_rounds, amount.num_warm_up)
        measured.append({**setting, **module.description, "seconds": summary(seconds)})
    return measured


def merge(amount: Amount) -> list[Record]:
    """A weighted merge of ten snapshots, in two dtypes."""
    measured = []
    weights = coefficients("wma", NUM_SNAPSHOTS)
    for _, shapes, setting in settings(amount):
        for dtype in (torch.float32, torch.bfloat16):
            module = Weights(shapes)
            ring = filled_ring(module.live, NUM_SNAPSHOTS, dtype)
            snapshots = [Weights(shapes).to(dtype) for _ in range(NUM_SNAPSHOTS)]
            peers = merge_peers(snapshots, weights)
            actions = {
                COPY: copy_action(module.live),
                MERGES: lambda ring=ring: list(ring.merges([weights])),
                "SnapshotRing.combine, a new row": lambda ring=ring: ring.combine(weights),
                **peers,
            }
            leaving_after = dict.fromkeys(peers, amount.num_peer_rounds)
            seconds = take_turns(actions, amount.num_rounds, amount.num_warm_up, leaving_after)
            how = {"dtype": str(dtype).removeprefix("torch."), "num_snapshots": NUM_SNAPSHOTS}
            measured.append({**setting, **how, **module.description, "seconds": summary(seconds)})
            del ring, snapshots, peers, actions
    return measured


def several(amount: Amount) -> list[Record]:
    """Four merges of one ring."""
    measured = []
    weights = [coefficients(rule, NUM_SNAPSHOTS) for rule in RULES_OF_FOUR]
    for _, shapes, setting in settings(amount):
        module = Weights(shapes)
        ring = filled_ring(module.live, NUM_SNAPSHOTS)
        actions = {
            "one merge": lambda ring=ring: list(ring.merges(weights[:1])),
            "four merges": lambda ring=ring: list(ring.merges(weights)),
        }
        seconds = take_turns(actions, amount.num_rounds, amount.num_warm_up)
        measured.append({**setting, **module.description, "seconds": summary(seconds)})
    return measured


def swap(amount: Amount) -> list[Record]:
    """Other values into the live model, and its own back."""
    measured = []
    for _, shapes, setting in settings(amount):
        module = Weights(shapes)
        live, other = module.live, dict(zip(module.live, touched_like(module.live), strict=True))
        parameters = merged_parameters(module)
        lightning = EMAWeightAveraging(decay=DECAY)
        # Nothing of the trainer is asked for.
        lightning.setup(None, module, "fit")

        def exchange(lightning=lightning, module=module) -> None:
            lightning.on_validation_epoch_start(None, module)
            lightning.on_validation_epoch_end(None, module)

        def through_buffers(live=live, other=other) -> None:
            saved = [tensor.clone() for tensor in live.values()]
            torch._foreach_copy_(list(live.values()), list(other.values()))
            torch._foreach_copy_(list(live.values()), saved)

        actions = {
            "swapped_weights": _swap_action(parameters, other),
            IN_PLACE: _swap_action(parameters, other, in_place=True),
            "copies through buffers": through_buffers,
            LIGHTNING_EXCHANGE: exchange,
        }
        seconds = take_turns(actions, amount.num_quick_rounds, amount.num_warm_up)
        measured.append({**setting, **module.description, "seconds": summary(seconds)})
    # Nothing is read or written, so the memory of the largest need not be there.
    largest = {f"weight{index}": torch.empty(shape) for index, shape in enumerate(amount.largest)}
    other = {name: torch.empty_like(tensor) for name, tensor in largest.items()}
    seconds = take_turns({"swapped_weights": _swap_action(largest, other)}, amount.num_quick_rounds, amount.num_warm_up)
    numel = sum(tensor.numel() for tensor in largest.values())
    about = {"model": f"{numel / 1e9:g} B", "num_threads": torch.get_num_threads()}
    measured.append({**about, "num_tensors": len(largest), "num_parameters": numel, "seconds": summary(seconds)})
    return measured


def _swap_action(
    live: Mapping[str, Tensor], other: Mapping[str, Tensor], *, in_place: bool = False
) -> Callable[[], object]:
    def swap_in_and_out() -> None:
        with swapped_weights(live, other, in_place=in_place):
            pass

    return swap_in_and_out


def step(amount: Amount) -> list[Record]:
    """A training step of the demo between captures."""
    torch.set_num_threads(max(amount.num_threads))
    found = paired_blocks(amount.block_steps, amount.num_block_pairs)
    about = {"model": "demo", "num_threads": torch.get_num_threads(), "block_steps": amount.block_steps}
    return [{**about, "seconds": summary(found)}]


def whole(amount: Amount) -> list[Record]:
    """Runs of the demo with merged validations, and without."""
    torch.set_num_threads(max(amount.num_threads))
    about = {"model": "demo", "num_threads": torch.get_num_threads(), "run_steps": amount.run_steps}
    return [{**about, "pairs": list(paired_runs(amount.run_steps, amount.num_run_pairs))}]


def scaling(amount: Amount) -> list[Record]:
    """Captures and merges of rings of many sizes."""
    measured = []
    for num_parameters in amount.scaling_parameters:
        module = Weights([(num_parameters // 100, 10)] * 10)
        live = module.live
        nums = [num for num in amount.scaling_snapshots if num * 4 * num_parameters <= MAX_RING_BYTES]
        ring = filled_ring(live, max(nums))
        steps = iter(range(max(nums), 10**9))
        actions = {"capture": lambda ring=ring, steps=steps, live=live: ring.append(next(steps), live)}
        actions |= {f"merge of {num}": _newest_merged(ring, num) for num in nums}
        for num_threads in amount.num_threads:
            torch.set_num_threads(num_threads)
            # Apart from the rest, since merges need the memory that its targets take.
            copied = take_turns({COPY: copy_action(live)}, amount.num_scaling_rounds, 1)
            seconds = take_turns(actions, amount.num_scaling_rounds, 1)
            about = {"num_threads": num_threads, **module.description, "num_snapshots": nums}
            measured.append({**about, "seconds": summary(copied | seconds)})
        del ring, actions, module, live
    return measured


def ranks(amount: Amount) -> list[Record]:
    """Captures, averages and merges of a model that is spread over processes on this machine, one thread each."""
    measured = []
    for num_ranks in amount.num_ranks:
        seconds = sharded_seconds(Job(num_ranks, amount.num_sharded_parameters, NUM_SNAPSHOTS, amount.num_rounds))
        about = {"num_ranks": num_ranks, "num_threads": 1, "num_parameters": amount.num_sharded_parameters}
        measured.append({**about, "num_snapshots": NUM_SNAPSHOTS, "seconds": summary(seconds)})
    return measured


def _newest_merged(ring: SnapshotRing, num: int) -> Callable[[], object]:
    weights = [0.0] * (ring.capacity - num) + coefficients("wma", num)
    return lambda: list(ring.merges([weights]))


PARTS: dict[str, Callable[[Amount], list[Record]]] = {
    "ema": ema,
    "capture": capture,
    "merge": merge,
    "several": several,
    "swap": swap,
    "step": step,
    "whole": whole,
    "scaling": scaling,
    "ranks": ranks,
}


def environment() -> Record:
    """Versions, commit and machine."""
    git = ["git", "-C", str(ROOT)]
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = Path("/proc/meminfo").read_text().split()[1]
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "commit": subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip(),
        "has_uncommitted_source": bool(subprocess.check_output([*git, "status", "--porcelain", "src"], text=True)),
        "versions": {name: version(name) for name in ("torch", "lightning", "timm", "ema-pytorch")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": cpus[0].partition(": ")[2] if cpus else platform.processor(),
        "num_cores": os.cpu_count(),
        "memory_gib": round(int(memory) / 2**20, 1),
        "huge_pages": pages.read_text().strip() if pages.exists() else None,
        "load_before": os.getloadavg()[0],
    }


def write(folder: Path, part: str, record: Record) -> None:
    """Writes a record, with every list of numbers on a line of its own."""
    text = json.dumps(record, indent=1)
    text = re.sub(r"\[[-\d\s.,e+]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}.json").write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all of them if none is given")
    parser.add_argument("--smoke", action="store_true", help="small models, few rounds, a temporary folder")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="overhead-")) if arguments.smoke else RECORDS
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    for part in arguments.parts or PARTS:
        seed_everything(0, verbose=False)
        record = {"part": part, **environment()}
        began = time.perf_counter()
        measured = PARTS[part](SMOKE if arguments.smoke else FULL)
        record |= {"part_seconds": round(time.perf_counter() - began, 1), "measured": measured}
        write(folder, part, record)
        print(f"{part}: {record['part_seconds']} s, {folder / part}.json", flush=True)


if __name__ == "__main__":
    main()
