"""Question, statistics and pass rule of the snapshots benchmark, written before it was run.

**Question.** A snapshot can be the weights at the end of an interval (a *point*) or their mean over the interval. Do
four means merge as well as ten points, at less than half the memory and checkpoint?

**Runs.** The trunks of the annealing benchmark, trained again with the same seeds, with the weights of every step kept.
At each of its five points, merges of windows over the last 5, 10, 20 and 40 % of the steps so far: points N = 3, 5, 10,
20 and means N = 2, 3, 4, 5, 10, evenly over the window, each under every rule; means N = 4 also from 2, 4 and 8 samples
an interval, N = 3 and 5 from 4 samples, and N = 4 in rows of bfloat16. Every merge is evaluated on the first 128 of the
256 validation blocks. Merges are compared with each other and with the live model on just these blocks, so the noise of
the validation set is the same on both sides. For a 40 % window, three seeds are really annealed over 40 % to each point
after the first quarter, in a linear shape; recovered share and bias for 10 and 20 % are against the records of the
annealing benchmark, with the gain on these blocks and the live loss of those records.

**Statistics.** For each trunk, over its points after the first quarter: mean loss of the merge above that of ten points
under the same rule and window; recovered share ``(live - merged) / (live - annealed)`` and bias ``merged - annealed``.
Rows in memory, and bytes of a checkpoint beside those of model and AdamW.

**Pass rule.** Means N = 4 of all steps are, for every rule and window, no worse than points N = 10 by more than 0.001
nats in the mean of each trunk, and no worse on average over trunks. Means N = 4 of 4 samples are within 0.001 nats of
those of all steps, in the same means. If it holds, means become the default.

**A long window.** Reported without a pass rule: ``qam`` over means against ``linear`` over points, for 40 %, as bias
against the real anneals.

    python benchmarks/snapshots/run.py train seed0 sgd     # weights to outputs/snapshots/, 4 to 6 GB a trunk
    python benchmarks/snapshots/run.py anneal seed0        # branches over 40 % of the steps
    python benchmarks/snapshots/run.py evaluate seed0 sgd
    python benchmarks/snapshots/run.py report
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from matplotlib.figure import Figure

from merge_callback.apps.demo.training import CheckpointAt
from merge_callback.apps.train import prepare
from merge_callback.live.swap import swapped_weights
from merge_callback.live.weights import merged_parameters
from merge_callback.merging.combine import combine_
from merge_callback.merging.intervals import Intervals
from merge_callback.merging.rules import merge_coefficients
from merge_callback.validation.figures import LIVE, MERGED

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "annealing"))
import run as annealing
from shared import about, put_into

ROOT = Path(__file__).parents[2]
WORK = ROOT / "outputs" / "snapshots"
RECORDS = Path(__file__).parent / "records"

NUM_POINTS = (3, 5, 10, 20)
NUM_MEANS = (2, 3, 4, 5, 10)
# Number of means -> numbers of samples an interval.
SAMPLED = {3: (4,), 4: (2, 4, 8), 5: (4,)}
RULES = ("sma", "wma", "linear", "1-sqrt", "cosine", "ema", "qam")
WINDOWS = (0.05, 0.1, 0.2, 0.4)
NUM_BATCHES = 8  # of 16 blocks
LONG_SPAN = 0.4
LONG_SEEDS = ("seed0", "seed1", "seed2")
LIMIT = 0.001
FIRST_QUARTER = 0.25


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
        # Border of intervals -> sum of the weights since the window's beginning. Each step is read once.
        self.sums: dict[int, np.ndarray] = {}
        borders = sorted({cut for num in NUM_MEANS for cut in self.cuts(num)})
        total = np.zeros(weights.shape[1])
        for begin, border in pairwise([borders[0], *borders]):
            for step in range(begin, border):
                total += weights[step]
            self.sums[border] = total.copy()

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
            rows = [self._whole_mean(begin, end) for begin, end in pairwise(cuts)]
            yield f"means {num}", steps, rows
            if num == 4:
                yield f"means {num} in bfloat16", steps, [row.bfloat16() for row in rows]
            for num_samples in SAMPLED.get(num, ()):
                taken = [samples(begin, end, num_samples) for begin, end in pairwise(cuts)]
                yield f"means {num} of {num_samples}", steps, [self._mean(each) for each in taken]

    def _whole_mean(self, begin: int, end: int) -> torch.Tensor:
        return torch.from_numpy((self.sums[end] - self.sums[begin]) / (end - begin)).float()

    def _mean(self, steps: list[int]) -> torch.Tensor:
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


# Reports.


def differences(label: str, rule: str, span: float, base: str = "points 10") -> dict[str, float]:
    """Trunk -> mean over its points of the loss of a merge above that of ten points under the same rule and window."""
    found = {}
    for name in annealing.TRUNKS:
        if (record := RECORDS / name / "merges.json").exists():
            windows = [point["windows"][str(span)] for point in json.loads(record.read_text())["points"]]
            found[name] = mean(losses[label][rule] - losses[base][rule] for losses in windows)
    return found


def told(found: dict[str, float]) -> str:
    """Mean over trunks, and the worst of them."""
    return f"{mean(found.values()):+.4f} ({max(found.values()):+.4f})"


def comparison(span: float) -> list[str]:
    """A table of one window: all kinds of snapshots under all rules."""
    first = next(iter(RECORDS.glob("*/merges.json")))
    labels = [
        label for label in json.loads(first.read_text())["points"][0]["windows"][str(span)] if label != "points 10"
    ]
    lines = [f"| snapshots | {' | '.join(RULES)} |", "| --- |" + " --- |" * len(RULES)]
    rows = [" | ".join(told(differences(label, rule, span)) for rule in RULES) for label in labels]
    return [*lines, *(f"| {label} | {row} |" for label, row in zip(labels, rows, strict=True))]


def verdict() -> list[str]:
    """What of the pass rule holds, a line for each window and rule where it does not."""
    lines = []
    for span, rule in product(WINDOWS, RULES):
        found = differences("means 4", rule, span)
        worst = max(found, key=found.__getitem__)
        if found[worst] > LIMIT or mean(found.values()) > 0:
            lines.append(f"- {rule}, {span:.0%}: {mean(found.values()):+.4f}, and {found[worst]:+.4f} in `{worst}`")
    sampled = {
        (span, rule): max(map(abs, differences("means 4 of 4", rule, span, "means 4").values()))
        for span, rule in product(WINDOWS, RULES)
    }
    far = [f"{rule}, {span:.0%} ({value:.4f})" for (span, rule), value in sampled.items() if value > LIMIT]
    num = len(WINDOWS) * len(RULES)
    passed = f"Four means were no worse than ten points in {num - len(lines)} of {num} cases."
    passed += " They were worse in these (mean over trunks, worst trunk):" if lines else ""
    of_samples = "Four samples an interval were within the limit of all steps in every trunk"
    return [passed, "", *lines, "", f"{of_samples}{', except ' + ', '.join(far) if far else ''}."]


def real_anneals(name: str) -> dict[tuple[int, float], float]:
    """(End, span) -> annealed loss after a linear decay, from this benchmark and the annealing benchmark."""
    found = {}
    for record in (annealing.RECORDS / name / "anneals.jsonl", RECORDS / name / "anneals.jsonl"):
        for each in annealing.read_records(record) if record.exists() else []:
            if each.shape == "linear":
                found[each.step, round(each.span_steps / each.step, 1)] = each.annealed["val_loss"]
    return found


def biases(label: str, rule: str, span: float) -> tuple[list[float], list[float]]:
    """Recovered share and bias of a merge at all points with a real anneal over the same span."""
    shares, found = [], []
    for name in annealing.TRUNKS:
        if not (record := RECORDS / name / "merges.json").exists():
            continue
        proxies = json.loads((annealing.RECORDS / name / "proxies.json").read_text())
        live = {point["step"]: point["live"] for point in proxies}
        anneals = real_anneals(name)
        for point in json.loads(record.read_text())["points"]:
            if (annealed := anneals.get((point["step"], span))) is None:
                continue
            gain = point["live"] - point["windows"][str(span)][label][rule]
            whole = live[point["step"]]
            shares.append(gain / (whole - annealed))
            found.append(whole - gain - annealed)
    return shares, found


def against_anneals() -> list[str]:
    """A table of recovered shares and biases of some kinds of snapshots."""
    lines = [
        "| window | snapshots | rule | anneals | recovered share | bias, mean | bias, mean size |",
        "| --- |" + " --- |" * 6,
    ]
    for span, label, rule in product(WINDOWS[1:], ("points 10", "points 20", "means 4", "means 10"), RULES):
        shares, found = biases(label, rule, span)
        if shares:
            numbers = f"{mean(shares):.2f} | {mean(found):+.4f} | {mean(map(abs, found)):.4f}"
            lines.append(f"| {span:.0%} | {label} | {rule} | {len(shares)} | {numbers} |")
    return lines


def summary() -> str:
    """The table in the docs."""
    lines = [
        "| snapshots | copies in memory | checkpoint | rule | 5 % | 10 % | 20 % | 40 % |",
        "| --- |" + " --- |" * 7,
    ]
    # Copies in float32 beside model and AdamW, which are three; means have one more for the interval in progress.
    for label, copies in (
        ("points 3", 3),
        ("points 5", 5),
        ("means 4", 5),
        ("means 4 in bfloat16", 3),
        ("means 10", 11),
    ):
        for rule in ("sma", "wma", "1-sqrt"):
            numbers = " | ".join(told(differences(label, rule, span)) for span in WINDOWS)
            lines.append(f"| {label} | {copies} | x{(3 + copies) / 3:.1f} | {rule} | {numbers} |")
    return "\n".join(lines)


def picture() -> Figure:
    """Loss above that of ten points over the copies in memory, for points and for means, under three rules."""
    figure = Figure(figsize=(10, 3.4), dpi=100, layout="constrained")
    for axes, rule in zip(figure.subplots(1, 3, sharey=True), ("sma", "wma", "1-sqrt"), strict=True):
        for kind, numbers, colour in (("points", NUM_POINTS, LIVE), ("means", NUM_MEANS, MERGED)):
            losses = [mean(differences(f"{kind} {num}", rule, 0.1).values()) for num in numbers]
            copies = [num + (kind == "means") for num in numbers]
            axes.plot(copies, losses, "o-", color=colour, label=kind)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(title=f"{rule}, 10 % window", xlabel="copies of the weights in memory")
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="loss above that of ten points")
    figure.axes[0].legend()
    return figure


def report(*_: str) -> None:
    """Writes the report, the picture and the table in the docs."""
    question = (__doc__ or "").partition("    python")[0].strip()
    trunks = sorted(record.parent.name for record in RECORDS.glob("*/merges.json"))
    lines = [
        "# Means over intervals against points",
        "",
        "> Made by `run.py report` from `records/`.",
        "",
        question,
        "",
    ]
    lines += ["## What came out", "", f"Trunks: {', '.join(trunks)}.", "", *verdict(), ""]
    for span in WINDOWS:
        lines += [
            f"## A window of {span:.0%}",
            "",
            "Loss above that of ten points, in nats per byte: mean over trunks",
            "(worst trunk).",
        ]
        lines += ["", *comparison(span), ""]
    lines += ["## Against real anneals of a linear shape over the same steps", "", *against_anneals(), ""]
    (Path(__file__).parent / "REPORT.md").write_text("\n".join(lines))
    put_into(ROOT / "docs" / "window.md", "snapshots", summary())
    picture().savefig(ROOT / "docs" / "pictures" / "means.png")


PARTS = {"train": train, "anneal": anneal, "evaluate": evaluate, "report": report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=PARTS)
    parser.add_argument("trunks", nargs="*", metavar="TRUNK")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.trunks or [""]:
        PARTS[arguments.what](name)


if __name__ == "__main__":
    main()
