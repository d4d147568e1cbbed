"""Runs the forecast benchmark piece by piece; what has a record is not run again.

    python benchmarks/forecast/run.py            # all trunks but `smoke`, two at a time, one thread each: two hours
    python benchmarks/forecast/run.py muon long  # some of them

Checkpoints and weights go to outputs/forecast/ (about 1 GB a trunk, 4 GB of the large one; to be deleted when all is
done), records to benchmarks/forecast/records/. Read trunks.py first.
"""

import argparse
import platform
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from merge_callback import MergeCallback
from merge_callback.apps.demo.training import CheckpointAt
from merge_callback.prediction.records import read_records

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "annealing"))
from run import Evaluator, WeightsAt, write
from shared import about
from training import RECORDS, RULES, WORK, MergesOfValidations, prepared, run_branch
from trunks import NUM_SNAPSHOTS, NUM_STORED, TRUNKS, WINDOWS, Trunk


def window(end: int, span_steps: int) -> list[int]:
    """Steps of ten snapshots, evenly over the last steps before an end."""
    return sorted(end - round(j * span_steps / NUM_SNAPSHOTS) for j in range(NUM_SNAPSHOTS))


def matched_windows(trunk: Trunk) -> dict[tuple[int, int], list[int]]:
    """End and length of decays that end within the trunk -> steps of ten snapshots over the same steps."""
    ends = {(start + steps, steps) for start in trunk.starts for _, steps, _ in trunk.branches(start)}
    return {(end, steps): window(end, steps) for end, steps in sorted(ends) if end <= trunk.num_steps}


def run_trunk(trunk: Trunk, folder: Path) -> dict[str, Any]:
    """Trains the trunk and keeps what branches and merges need."""
    stored = {round(trunk.num_steps * (index + 1) / NUM_STORED) for index in range(NUM_STORED)}
    for steps in matched_windows(trunk).values():
        stored |= set(steps)
    for start in trunk.starts:
        for share in WINDOWS:
            stored |= set(window(start, round(share * start)))
    merge = MergeCallback(merges={name: name for name in RULES})
    noted = MergesOfValidations(merge)
    keepers = WeightsAt(folder, stored), CheckpointAt(folder, {*trunk.starts, trunk.num_steps})
    run = prepared(trunk, merge, noted, *keepers)
    began = time.perf_counter()
    run.fit()
    return {
        **about(),
        "overrides": list(trunk.overrides),
        "num_steps": trunk.num_steps,
        "num_parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "seconds": round(time.perf_counter() - began, 1),
        "python": platform.python_version(),
        "validations": noted.validations,
    }


def evaluate(trunk: Trunk, folder: Path) -> dict[str, Any]:
    """Losses of merges of stored weights: at every start, and over the steps of every decay within the trunk."""
    evaluator = Evaluator(prepared(trunk), folder)

    def losses(steps: list[int]) -> dict[str, Any]:
        with evaluator.weights(f"weights-{steps[-1]}.pt"):
            found: dict[str, Any] = {"snapshots": steps, "live": evaluator.loss()}
        for name, rule in RULES.items():
            with evaluator.merge(rule, steps):
                found[name] = evaluator.loss()
        return found

    at_starts = {
        start: {share: losses(window(start, round(share * start))) for share in WINDOWS} for start in trunk.starts
    }
    matched = [{"end": end, "span_steps": n, **losses(steps)} for (end, n), steps in matched_windows(trunk).items()]
    return {"starts": at_starts, "matched": matched}


def run(name: str) -> str:
    """All pieces of one trunk that have no record yet."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trunk, folder = TRUNKS[name], WORK / name
    records = folder if name == "smoke" else RECORDS / name
    for each in (records, folder):
        each.mkdir(parents=True, exist_ok=True)
    if not (records / "trunk.json").exists():
        write(records / "trunk.json", run_trunk(trunk, folder))
    if not (records / "merges.json").exists():
        write(records / "merges.json", evaluate(trunk, folder))
    for start in trunk.starts:
        for span, span_steps, shape in trunk.branches(start):
            done = {(r.start_step, r.span_steps, r.shape) for r in read_records(records / "anneals.jsonl")}
            if (start, span_steps, shape) not in done:
                run_branch(trunk, folder, records / "anneals.jsonl", start=start, span_steps=span_steps, shape=shape)
                print(f"{name}: {shape} decay over {span:.0%} from step {start}", flush=True)
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trunks", nargs="*", metavar="TRUNK", help=", ".join(TRUNKS))
    parser.add_argument("--at-once", type=int, default=2, help="trunks side by side")
    arguments = parser.parse_args()
    names = arguments.trunks or [name for name in TRUNKS if name != "smoke"]
    if unknown := set(names) - TRUNKS.keys():
        parser.error(f"no trunk called {', '.join(sorted(unknown))}; there are: {', '.join(TRUNKS)}")
    with ProcessPoolExecutor(arguments.at_once) as pool:
        for name in pool.map(run, names):
            print(f"{name}: all done", flush=True)


if __name__ == "__main__":
    main()
