"""Measures what merging costs, part by part; every call of a part overwrites its record.

    python benchmarks/overhead/run.py                # all parts, one after the other
    python benchmarks/overhead/run.py ema swap       # some of them
    python benchmarks/overhead/run.py --smoke        # all on small models, records to a temporary folder
    python benchmarks/overhead/run.py --device cuda  # on a GPU with 80 GB
    python benchmarks/overhead/run.py --limit 60     # gives up a part after so many seconds, and goes on with the next

Records go to benchmarks/overhead/records/<part>.json, those of a GPU to a folder of its name. Needs 18 GiB of free
memory, a machine that does nothing else, and the peers without what they depend on (timm's torchvision is not used):

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
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from merge_callback import Ema, MergeCallback
from merge_callback.capture.layout import RowLayout
from merge_callback.capture.memory import required_bytes
from merge_callback.capture.ring import SnapshotRing
from merge_callback.capture.running_averages import Shadow
from merge_callback.capture.storage import DeviceStorage, HostStorage
from merge_callback.live.swap import swapped_weights
from merge_callback.live.weights import LiveTensors, merged_parameters
from merge_callback.merging.rules import merge_coefficients, resolve_rule

sys.path.insert(0, str(Path(__file__).parent))
from contest import batch_end, take_turns, take_turns_in_fit, wait_for_device
from models import Weights, touched_like
from peers import ema_peers, merge_peers
from protocol import (
    COPY,
    DECAY,
    FULL,
    IN_PLACE,
    LIGHTNING_EXCHANGE,
    MERGES,
    NUM_SNAPSHOTS,
    ON_GPU,
    RECORDS,
    ROOT,
    RULES_OF_FOUR,
    SMOKE,
    Amount,
    Shapes,
    median,
)
from ranks import Job, sharded_seconds
from trainings import (
    WITH,
    WITHOUT,
    ProfiledWaits,
    Training,
    hooks_in_large_steps,
    long_run,
    paired_blocks,
    paired_runs,
)

Record = dict[str, Any]
HALF_LIFE_STEPS = math.log(0.5) / math.log(DECAY)


def settings(amount: Amount) -> Iterator[tuple[str, Shapes, Record]]:
    """Every model with every number of threads, which is set: name, shapes, what to record."""
    for name, shapes in amount.models.items():
        for num_threads in amount.num_threads:
            torch.set_num_threads(num_threads)
            yield name, shapes, {"model": name, **where(amount)}


def where(amount: Amount) -> Record:
    """What did the work, for records."""
    return {"num_threads": torch.get_num_threads()} if amount.device == "cpu" else {"device": amount.device}


def trained(amount: Amount) -> Training:
    """What is trained in the parts that train."""
    torch.set_num_threads(max(amount.num_threads))
    return Training(amount.device, amount.training)


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
        module = Weights(shapes, amount.device)
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
        module = Weights(shapes, amount.device)
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
            module = Weights(shapes, amount.device)
            ring = filled_ring(module.live, NUM_SNAPSHOTS, dtype)
            # Theirs takes as much memory again.
            is_compared = 2 * ring.storage.size_bytes <= amount.max_ring_bytes
            snapshots = [Weights(shapes, amount.device).to(dtype) for _ in range(NUM_SNAPSHOTS if is_compared else 0)]
            peers = merge_peers(snapshots, weights) if is_compared else {}
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
        module = Weights(shapes, amount.device)
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
        module = Weights(shapes, amount.device)
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
    largest = {f"weight{index}": torch.empty(shape, device=amount.device) for index, shape in enumerate(amount.largest)}
    other = {name: torch.empty_like(tensor) for name, tensor in largest.items()}
    seconds = take_turns({"swapped_weights": _swap_action(largest, other)}, amount.num_quick_rounds, amount.num_warm_up)
    numel = sum(tensor.numel() for tensor in largest.values())
    about = {"model": f"{numel / 1e9:g} B", **where(amount)}
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
    found = paired_blocks(trained(amount), amount.block_steps, amount.num_block_pairs, every_n_train_steps=10**9)
    about = {"model": "demo", **where(amount), "block_steps": amount.block_steps}
    return [{**about, "seconds": summary(found)}]


def hooks(amount: Amount) -> list[Record]:
    """What hooks take in a step of a large model, and in a long run of a small one."""
    training = trained(amount)
    large = replace(training, overrides=amount.large)
    found = hooks_in_large_steps(large, amount.num_large_steps)
    measured = [{"model": "large", **where(amount), "seconds": summary(found)}]
    torch.set_num_threads(1)
    steps = amount.num_long_steps, amount.num_long_validations
    found = long_run(Training(amount.device), *steps, amount.num_old_records)
    about = {"model": "tiny", **where(amount), "num_steps": steps[0], "num_records": amount.num_old_records}
    # The second tenth and the last one.
    ends = {
        f"{kind}, {when} tenth": seconds[tenth * len(seconds) // 10 : (tenth + 1) * len(seconds) // 10]
        for kind, seconds in found.items()
        for when, tenth in (("second", 1), ("last", 9))
    }
    return [*measured, {**about, "seconds": {name: _spread(seconds) for name, seconds in ends.items()}}]


def _spread(seconds: list[float]) -> Record:
    """Median and interval of many samples, which are not kept."""
    found = median(seconds)
    interval = [_rounded(found.low), _rounded(found.high)]
    return {"median": _rounded(found.value), "interval": interval, "num_samples": len(seconds)}


def in_flight(amount: Amount) -> list[Record]:
    """A training step of the demo while captures are on their way to host memory."""
    how = {"every_n_train_steps": 1, "num_snapshots": 2, "start": 0, "storage": "cpu"}
    found = paired_blocks(trained(amount), amount.in_flight_steps, amount.num_in_flight_pairs, **how)
    about = {"model": "demo", **where(amount), "block_steps": amount.in_flight_steps}
    return [{**about, "seconds": summary(found)}]


def memory(amount: Amount) -> list[Record]:
    """Peaks of a GPU's allocator beyond model and ring: at a capture, and at a merge that is swapped in."""
    measured = []
    weights = coefficients("wma", NUM_SNAPSHOTS)
    for _, shapes, setting in settings(amount):
        # Pinning tens of gigabytes takes minutes.
        is_large = 4 * NUM_SNAPSHOTS * sum(map(math.prod, shapes)) > 2**34
        for storage in (DeviceStorage,) if is_large else (DeviceStorage, HostStorage):
            live = Weights(shapes, amount.device).live
            layout = RowLayout(live)
            ring = SnapshotRing(storage(layout, NUM_SNAPSHOTS), NUM_SNAPSHOTS)
            for step in range(NUM_SNAPSHOTS):
                ring.append(step, live)

            def merge_and_swap(ring=ring, live=live, layout=layout) -> None:
                with swapped_weights(live, layout.views(ring.combine(weights))):
                    pass

            peaks = {"capture": _peak_bytes(lambda ring=ring, live=live: ring.append(NUM_SNAPSHOTS, live))}
            peaks["merge, swapped in"] = _peak_bytes(merge_and_swap)
            on_gpu = storage is DeviceStorage
            merge_bytes = sum(required_bytes(layout, 1, None).values()) if on_gpu else 0
            about = {"storage": "device" if on_gpu else "cpu", "merge_bytes": merge_bytes, "peak_bytes": peaks}
            measured.append({**setting, **about})
            del ring, live, merge_and_swap
    return measured


def host_waits(amount: Amount) -> list[Record]:
    """How often the host waits for the device in steps between captures, by the profiler."""
    training = trained(amount)
    merges = {"sma": "sma", "ema": Ema(half_life_steps=HALF_LIFE_STEPS)}
    counts = {}
    for name, callbacks in ((WITHOUT, []), (WITH, [MergeCallback(every_n_train_steps=10**9, merges=merges, start=0)])):
        waits = ProfiledWaits()
        training.fit(waits.num_steps, *callbacks, waits)
        counts[name] = waits.counts
    return [{"model": "demo", **where(amount), "num_steps": waits.num_counted, "waits": counts}]


def _peak_bytes(action: Callable[[], object]) -> int:
    wait_for_device()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    action()
    wait_for_device()
    return torch.cuda.max_memory_allocated() - before


def whole(amount: Amount) -> list[Record]:
    """Runs of the demo with merged validations, and without."""
    pairs = list(paired_runs(trained(amount), amount.run_steps, amount.num_run_pairs))
    return [{"model": "demo", **where(amount), "run_steps": amount.run_steps, "pairs": pairs}]


def scaling(amount: Amount) -> list[Record]:
    """Captures and merges of rings of many sizes."""
    measured = []
    for num_parameters in amount.scaling_parameters:
        module = Weights([(num_parameters // 100, 10)] * 10, amount.device)
        live = module.live
        nums = [num for num in amount.scaling_snapshots if num * 4 * num_parameters <= amount.max_ring_bytes]
        ring = filled_ring(live, max(nums))
        steps = iter(range(max(nums), 10**9))
        actions = {"capture": lambda ring=ring, steps=steps, live=live: ring.append(next(steps), live)}
        actions |= {f"merge of {num}": _newest_merged(ring, num) for num in nums}
        for num_threads in amount.num_threads:
            torch.set_num_threads(num_threads)
            # Apart from the rest, since merges need the memory that its targets take.
            copied = take_turns({COPY: copy_action(live)}, amount.num_scaling_rounds, 1)
            seconds = take_turns(actions, amount.num_scaling_rounds, 1)
            about = {**where(amount), **module.description, "num_snapshots": nums}
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
    "hooks": hooks,
    "in_flight": in_flight,
    "memory": memory,
    "waits": host_waits,
    "whole": whole,
    "scaling": scaling,
    "ranks": ranks,
}
# Elsewhere these say nothing, or cannot run.
ONLY_ON = {"in_flight": "cuda", "memory": "cuda", "waits": "cuda", "ranks": "cpu"}


VERSIONED = ("torch", "lightning", "timm", "ema-pytorch")


def is_installed(name: str) -> bool:
    """Whether a package is there; the peers are needed by two parts only."""
    return any(distributions(name=name))


def environment(device: str) -> Record:
    """Versions, commit and machine."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = Path("/proc/meminfo").read_text().split()[1]
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        # A copy without its history says with COMMIT what it is a copy of.
        "commit": os.environ.get("COMMIT") or _git("rev-parse", "HEAD"),
        "has_uncommitted_source": "COMMIT" not in os.environ and bool(_git("status", "--porcelain", "src")),
        "versions": {name: version(name) for name in VERSIONED if is_installed(name)},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": cpus[0].partition(": ")[2] if cpus else platform.processor(),
        "num_cores": os.cpu_count(),
        "memory_gib": round(int(memory) / 2**20, 1),
        "huge_pages": pages.read_text().strip() if pages.exists() else None,
        "load_before": os.getloadavg()[0],
    } | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def _git(*arguments: str) -> str:
    return subprocess.check_output(["git", "-C", str(ROOT), *arguments], text=True).strip()


def write(folder: Path, part: str, record: Record) -> None:
    """Writes a record, with every list of numbers on a line of its own."""
    text = json.dumps(record, indent=1)
    text = re.sub(r"\[[-\d\s.,e+]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}.json").write_text(text + "\n")


@contextmanager
def given_up_after(seconds: int) -> Iterator[None]:
    """Raises TimeoutError inside the context after so many seconds; never if that is zero."""

    def give_up(*arguments: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def try_to_measure(part: str, amount: Amount, folder: Path, limit: int) -> bool:
    """Measures a part and writes its record. What goes wrong is printed, so that the next part has its turn."""
    try:
        with given_up_after(limit):
            measure(part, amount, folder)
    except Exception:
        traceback.print_exc()
        return False
    return True


def measure(part: str, amount: Amount, folder: Path) -> None:
    """Measures a part and writes its record."""
    seed_everything(0, verbose=False)
    record = {"part": part, **environment(amount.device)}
    began = time.perf_counter()
    measured = PARTS[part](amount)
    record |= {"part_seconds": round(time.perf_counter() - began, 1), "measured": measured}
    write(folder, part, record)
    print(f"{part}: {record['part_seconds']} s, {folder / part}.json", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all of them if none is given")
    parser.add_argument("--smoke", action="store_true", help="small models, few rounds, a temporary folder")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--limit", type=int, default=0, help="seconds that each part may take; 0 is no limit")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch finds none")
    folder = RECORDS if device == "cpu" else RECORDS / re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    amount = FULL if device == "cpu" else ON_GPU
    if arguments.smoke:
        folder = Path(tempfile.mkdtemp(prefix="overhead-"))
        amount = replace(SMOKE, device=device, num_threads=amount.num_threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    parts = arguments.parts or [part for part in PARTS if ONLY_ON.get(part, device) == device]
    if failed := [part for part in parts if not try_to_measure(part, amount, folder, arguments.limit)]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
