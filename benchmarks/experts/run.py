"""Does merging disturb a mixture of experts: is it better to merge the routers, or to keep the newest ones?

A reader's question on the paper that its authors had not measured. The demo's model is trained for 1,000 steps, with a
dense feed-forward layer and with eight experts of which a token uses two; ten snapshots from the last tenth of training
are merged uniformly, at ten points. Of the experts there are two merges of the same run: of everything, and of all but
the routers, which stay the newest. Three seeds.

Statistics, means over the validations after the first quarter, for each seed: gain of the merge in validation loss;
for the routers, over the same tokens, share of tokens for which the merge chooses the same two experts as the live
model, entropy of the load over its largest value, and how far the busiest expert lies above the mean load.
Questions and rules, written before: merging the routers is *harmless* if its gain is at most 0.001 nats smaller than
with the newest ones in the mean over seeds, and *better* if it is larger in every seed. The balance is *kept* if the
merge's entropy is at most 0.01 below the live one in every seed. A mixture of experts gains *as a dense model does* if
the means of their gains differ by less than the deviation between seeds.

    python benchmarks/experts/run.py run     # 20 minutes on two cores
    python benchmarks/experts/run.py report  # writes REPORT.md from the records
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lightning.pytorch import Callback

from merge_callback import MergeCallback, Parts, Routers, Window
from merge_callback.validation.routers import LOGGED

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import ROOT, demo_run, put_into, read_runs, write_runs

FOLDER = Path(__file__).parent
RECORDS = FOLDER / "records"
SEEDS = range(3)
NUM_STEPS = 1000
NUM_EXPERTS = (0, 8)
ROUTERS = Routers("*.router", num_active=2, num_batches=8)


class Validations(Callback):
    """All metrics of each validation."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            metrics = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
            self.found.append({"step": trainer.global_step, **metrics})


def train(num_experts: int, seed: int) -> dict[str, Any]:
    """One run; what it was and what came of it."""
    merges = {"late": Window(span=0.1)}
    routers = ROUTERS if num_experts else None
    callbacks = [MergeCallback(merges=merges, parts=Parts(routers=routers))]
    if num_experts:
        callbacks.append(MergeCallback(merges=merges, parts=Parts(exclude="*.router.*", routers=routers), name="kept"))
    validations = Validations()
    options = {"demo.seed": seed, "trainer.max_steps": NUM_STEPS, "trainer.val_check_interval": NUM_STEPS // 10}
    demo_run([*callbacks, validations], **options, **{"model.num_experts": num_experts}).fit()
    return {"num_experts": num_experts, "seed": seed, "validations": validations.found}


def record() -> None:
    """Trains everything, and keeps what came."""
    with ProcessPoolExecutor(2) as pool:
        runs = list(pool.map(train, *zip(*product(reversed(NUM_EXPERTS), SEEDS), strict=True)))
    write_runs(RECORDS / "runs.jsonl", runs)


def later(run: dict[str, Any], name: str) -> float:
    """Mean of a metric over the validations after the first quarter."""
    return mean(each[name] for each in run["validations"] if each["step"] > NUM_STEPS / 4)


def table() -> str:
    """Gains, routers, and what the rules say."""
    runs = {(run["num_experts"], run["seed"]): run for run in read_runs(RECORDS / "runs.jsonl")}
    dense, experts = ([runs[num, seed] for seed in SEEDS] for num in NUM_EXPERTS)
    gains = {
        "dense": [later(run, "merge_gain/val_loss") for run in dense],
        "experts, routers merged": [later(run, "merge_gain/val_loss") for run in experts],
        "experts, newest routers": [later(run, "merge_gain_kept/val_loss") for run in experts],
    }
    lines = ["| gain of the merge | seed 0 | seed 1 | seed 2 | mean |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {name} | {' | '.join(f'{g:.4f}' for g in of)} | {mean(of):.4f} |" for name, of in gains.items()]
    lines += ["", "| routers | seed | live | merged | newest, all else merged |", "| --- | --- | --- | --- | --- |"]
    for what in ("agreement", "jaccard", "entropy", "violation"):
        for run in experts:
            name = f"router_{what}"
            live = f"{later(run, f'merge/{name}_live'):.4f}" if f"{name}_live" in LOGGED else "-"
            both = [f"{later(run, f'merge{label}/{name}'):.4f}" for label in ("", "_kept")]
            lines.append(f"| {what} | {run['seed']} | {live} | {' | '.join(both)} |")
    merged, kept = gains["experts, routers merged"], gains["experts, newest routers"]
    difference = [one - other for one, other in zip(merged, kept, strict=True)]
    is_kept = all(later(r, "merge/router_entropy") >= later(r, "merge/router_entropy_live") - 0.01 for r in experts)
    away = abs(mean(merged) - mean(gains["dense"]))
    noise = max(stdev(merged), stdev(gains["dense"]))
    verdicts = {
        "harmless": mean(difference) >= -0.001,
        "better": min(difference) > 0,
        "balance kept": is_kept,
        "gains as a dense model does": away < noise,
    }
    said = "; ".join(f"{what}: {'yes' if is_so else 'no'}" for what, is_so in verdicts.items())
    changes = " ".join(f"{each:+.5f}" for each in difference)
    return "\n".join(
        [
            *lines,
            "",
            f"Merging the routers too changes the gain by {changes} nats. By the rules set before it was run,",
            f"{said} (the means differ by {away:.4f}, seeds deviate by {noise:.4f}).",
        ]
    )


def page() -> str:
    """The report."""
    return f"""# Merging a mixture of experts

Written by `benchmarks/experts/run.py report`; question and rules stand there.
Means over the validations after the first
quarter, losses in nats a byte.

{table()}
"""


def report() -> None:
    """Writes the report, and the tables in the docs."""
    (FOLDER / "REPORT.md").write_text(page())
    put_into(ROOT / "docs" / "experts.md", "experts", table())


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        {"run": record, "report": report}[wanted]()
