"""How well is the gain of a merge known from a quarter of the validation batches, and at which cost?

One run of the demo's model with two callbacks that see the same weights and make the same merge: one validates it on
all batches, the other with `limit_batches=0.25`. Two seeds.

Statistics, over the validations after the first quarter of the steps: the size of the difference of the two gains as a
share of the gain on all batches (mean and largest); the standard error that is logged as a share of the gain, and how
often it holds the difference twice over; seconds of merged validations with the limit over those without.
Pass rule: a mean difference of at most 3 % of the gain, and a cost of at most 0.27 (a quarter, and a little for what
does not depend on the number of batches).

    python benchmarks/gain/run.py run     # ten minutes on one core
    python benchmarks/gain/run.py report  # REPORT.md from the records
"""

import sys
from pathlib import Path
from statistics import mean
from typing import Any

from lightning.pytorch import Callback

from merge_callback import MergeCallback, Window

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import demo_run, read_runs, write_runs

FOLDER = Path(__file__).parent
SEEDS = range(2)
NUM_STEPS = 1000
METRIC = "val_loss"
SHARE = 0.25
MAX_ERROR, MAX_COST = 0.03, 0.27


class Gains(Callback):
    """What the two callbacks log at each validation."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        metrics = trainer.callback_metrics
        if not trainer.sanity_checking and f"merge_gain_quarter/{METRIC}" in metrics:
            self.found.append(
                {
                    "step": trainer.global_step,
                    "whole": float(metrics[f"merge_gain/{METRIC}"]),
                    "quarter": float(metrics[f"merge_gain_quarter/{METRIC}"]),
                    "stderr": float(metrics[f"merge_gain_stderr_quarter/{METRIC}"]),
                    "seconds_whole": float(metrics["merge/seconds"]),
                    "seconds_quarter": float(metrics["merge_quarter/seconds"]),
                }
            )


def record() -> None:
    """Trains, and writes what was logged."""
    runs = []
    for seed in SEEDS:
        merge: dict[str, Any] = {"num_snapshots": 20, "merges": Window("wma", span=0.1)}
        gains = Gains()
        both = MergeCallback(**merge), MergeCallback(**merge, limit_batches=SHARE, name="quarter")
        options = {"demo.seed": seed, "trainer.max_steps": NUM_STEPS, "trainer.val_check_interval": NUM_STEPS // 20}
        demo_run([*both, gains], **options).fit()
        runs.append({"seed": seed, "validations": gains.found})
    write_runs(FOLDER / "records" / "gains.jsonl", runs)


def page() -> str:
    """The report."""
    found = [each for run in read_runs(FOLDER / "records" / "gains.jsonl") for each in run["validations"]]
    late = [each for each in found if each["step"] > NUM_STEPS / 4]
    errors = [abs(each["quarter"] - each["whole"]) / each["whole"] for each in late]
    held = mean(abs(each["quarter"] - each["whole"]) <= 2 * each["stderr"] for each in late)
    cost = sum(each["seconds_quarter"] for each in late) / sum(each["seconds_whole"] for each in late)
    rows = [
        ("gain on all batches, mean", f"{mean(each['whole'] for each in late):.4f} nats", ""),
        (
            "difference with a quarter of them, share of the gain, mean",
            f"{mean(errors):.1%}",
            f"at most {MAX_ERROR:.0%}",
        ),
        ("largest difference", f"{max(errors):.1%}", ""),
        (
            "standard error that is logged, share of the gain, mean",
            f"{mean(e['stderr'] / e['whole'] for e in late):.1%}",
            "",
        ),
        ("differences within two standard errors", f"{held:.0%} of {len(late)}", ""),
        ("seconds with the limit, over those without", f"{cost:.2f}", f"at most {MAX_COST}"),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (("", "found", "limit"), ("---", "---", "---"), *rows))
    is_reached = mean(errors) <= MAX_ERROR and cost <= MAX_COST
    question = (__doc__ or "").partition("    python")[0].strip()
    verdict = "Both limits are kept." if is_reached else "A limit is missed."
    parts = ["# A gain from few batches", "> Made by `run.py report` from `records/`.", question, table, verdict]
    return "\n\n".join(parts) + "\n"


def report() -> None:
    """Writes the report."""
    (FOLDER / "REPORT.md").write_text(page())


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        {"run": record, "report": report}[wanted]()
