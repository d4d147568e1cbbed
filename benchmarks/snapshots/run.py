"""Trains the trunks with every step's weights kept, anneals over 40 %, and evaluates merges of points and of means.

    python benchmarks/snapshots/run.py train seed0 sgd     # weights to outputs/snapshots/, 4 to 6 GB a trunk
    python benchmarks/snapshots/run.py anneal seed0        # branches over 40 % of the steps
    python benchmarks/snapshots/run.py evaluate seed0 sgd
    python benchmarks/snapshots/run.py report

What has a record is not run again. Read protocol.py first.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback

from merge_callback.apps.demo.training import CheckpointAt
from merge_callback.apps.train import prepare
from merge_callback.live.swap import swapped_weights
from merge_callback.live.weights import merged_parameters
from merge_callback.merging.combine import combine_
from merge_callback.merging.intervals import Intervals
from merge_callback.merging.rules import merge_coefficients

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from protocol import FIRST_QUARTER, LONG_SEEDS, LONG_SPAN, NUM_BATCHES, NUM_MEANS, NUM_POINTS, RULES, SAMPLED, WINDOWS
from shared import about

ROOT = Path(__file__).parents[2]
WORK = ROOT / "outputs" / "snapshots"
RECORDS = Path(__file__).parent / "records"


def _annealing() -> Any:
    """The annealing benchmark's script, whose trunks these are; its own imports are those of its folder."""
    folder = Path(__file__).parents[1] / "annealing"
    own = sys.modules.pop("protocol")
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("annealing_run", folder / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    sys.modules["protocol"] = own
    return module


annealing = _annealing()


class EveryStep(Callback):
    """Writes the weights of every optimizer step to one file: ``[steps, parameters]`` in float32."""

    def __init__(self, path: Path, num_steps: int) -> None:
        self.path = path
        self.num_steps = num_steps

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        num = sum(parameter.numel() for parameter in merged_parameters(pl_module).values())
        self.weights = np.lib.format.open_memmap(self.path, "w+", np.float32, (self.num_steps, num))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        flat = torch.cat([p.detach().flatten() for p in merged_parameters(pl_module).values()])
        self.weights[trainer.global_step - 1] = flat.numpy()


def train(name: str) -> None:
    """The trunk, with the weights of every step and checkpoints from which long branches start."""
    trunk, folder = annealing.TRUNKS[name], WORK / name
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    starts = {end - round(end * LONG_SPAN) for end in trunk.ends} if name in LONG_SEEDS else set()
    keepers = EveryStep(folder / "weights.npy", trunk.num_steps), CheckpointAt(folder, starts | {trunk.num_steps})
    prepare(annealing.config_of(trunk, folder), keepers).fit()
    (folder / "done").touch()


def ends_of(name: str) -> list[int]:
    """Steps of the points that are evaluated: those after the first quarter."""
    trunk = annealing.TRUNKS[name]
    return [end for end in trunk.ends if end > FIRST_QUARTER * trunk.num_steps]


def anneal(name: str) -> None:
    """Real anneals over the long span, each to a point; the branch writes its own record."""
    trunk, record = annealing.TRUNKS[name], RECORDS / name / "anneals.jsonl"
    record.parent.mkdir(parents=True, exist_ok=True)
    for end in ends_of(name):
        done = {each.step for each in annealing.read_records(record)}
        if end not in done:
            annealing.run_branch(trunk, WORK / name, record, end=end, span=LONG_SPAN, shape="linear")
            print(f"{name}: branch over {LONG_SPAN:.0%} to step {end}", flush=True)


def samples(begin: int, end: int, num: int) -> list[int]:
    """Steps of so many even samples of an interval, its end included; all steps if there are no more."""
    length = end - begin
    return sorted({begin + round(place * length / min(num, length)) for place in range(1, min(num, length) + 1)})


class Merges:
    """All merges of a window, from the weights of every step: name -> flat weights, one at a time."""

    def __init__(self, weights: np.ndarray, end: int, span: float) -> None:
        self.weights = weights
        self.end = end
        self.span_steps = round(end * span)

    def cuts(self, num: int) -> list[int]:
        """Borders of so many even intervals in the window."""
        return [self.end - round((num - place) * self.span_steps / num) for place in range(num + 1)]

    def rows(self) -> Iterator[tuple[str, Any, list[torch.Tensor]]]:
        """Name, steps for the rules, and rows."""
        for num in NUM_POINTS:
            ends = self.cuts(num)[1:]
            yield f"points {num}", ends, [self._mean([end]) for end in ends]
        for num in NUM_MEANS:
            cuts = self.cuts(num)
            steps = Intervals(tuple(cuts[:-1]), tuple(cuts[1:]))
            for num_samples in (None, *SAMPLED.get(num, ())):
                taken = [samples(begin, end, num_samples or end) for begin, end in pairwise(cuts)]
                label = f"means {num}" + (f" of {num_samples}" if num_samples else "")
                rows = [self._mean(each) for each in taken]
                yield label, steps, rows
                if num == 4 and num_samples is None:
                    yield f"{label} in bfloat16", steps, [row.bfloat16() for row in rows]

    def _mean(self, steps: list[int]) -> torch.Tensor:
        # Contiguous steps are read as one block; float64, so that the order does not matter.
        return torch.from_numpy(np.mean(self.weights[[step - 1 for step in steps]], axis=0, dtype=np.float64)).float()

    def __iter__(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for label, steps, rows in self.rows():
            known: dict[tuple[float, ...], torch.Tensor] = {}
            for rule in RULES:
                coefficients = merge_coefficients(rule, steps)
                key = tuple(round(each, 9) for each in coefficients)
                if key not in known:
                    known[key] = torch.empty(len(rows[0]))
                    combine_([known[key]], rows, [coefficients])
                yield label, rule, known[key]


def evaluate(name: str) -> None:
    """Loss of the live model and of all merges at each point of a trunk."""
    record = RECORDS / name / "merges.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(record.read_text()) if record.exists() else {"about": about(), "points": []}
    trunk, folder = annealing.TRUNKS[name], WORK / name
    evaluator = annealing.Evaluator(prepare(annealing.config_of(trunk, folder / "offline")), folder)
    evaluator.batches = evaluator.batches[:NUM_BATCHES]
    weights = np.load(folder / "weights.npy", mmap_mode="r")

    def loss(flat: torch.Tensor) -> float:
        parts = flat.split([p.numel() for p in evaluator.live.values()])
        merged = {k: part.view_as(p) for part, (k, p) in zip(parts, evaluator.live.items(), strict=True)}
        with swapped_weights(evaluator.live, merged):
            return round(float(evaluator.loss()), 6)

    for end in ends_of(name)[len(found["points"]) :]:
        point: dict[str, Any] = {"step": end, "live": loss(torch.from_numpy(weights[end - 1].copy())), "windows": {}}
        for span in WINDOWS:
            losses: dict[str, dict[str, float]] = {}
            known: dict[int, float] = {}
            for label, rule, flat in Merges(weights, end, span):
                # Under two rules the same merge is the same tensor.
                known = known if rule != RULES[0] else {}
                if id(flat) not in known:
                    known[id(flat)] = loss(flat)
                losses.setdefault(label, {})[rule] = known[id(flat)]
            point["windows"][str(span)] = losses
        found["points"].append(point)
        annealing.write(record, found)
        print(f"{name}: merges at step {end}", flush=True)


PARTS = {"train": train, "anneal": anneal, "evaluate": evaluate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=PARTS)
    parser.add_argument("trunks", nargs="*", metavar="TRUNK")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.trunks:
        PARTS[arguments.what](name)


if __name__ == "__main__":
    main()
