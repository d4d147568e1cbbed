"""The jobs of a Hydra multirun in one table: which number of snapshots, interval or rule gives the better merge."""

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from merge_callback.runs import Validation, merged_metrics, read_validations
from merge_callback.tables import NOTHING, text_table

# The last two: steps from the first to the last snapshot of the merge, and seconds that its validation took.
RESULTS = ["step", "live", "merged", "gain", "predicted", "span", "seconds"]


@dataclass(frozen=True)
class Job:
    """One job of a multirun: what it was told, and its last validation, if it wrote one."""

    folder: Path
    overrides: dict[str, str]
    last: Validation | None


def read_jobs(folder: Path, metric: str | None = None) -> tuple[str | None, list[Job]]:
    """The jobs whose folders lie in that of a multirun, in the order of their numbers.

    Args:
        folder: Hydra's ``sweep.dir``. What a job measured is read from the ``metrics.csv`` of Lightning's CSVLogger.
        metric: Name of the metric; None takes the first that has a merged value.

    Returns:
        The metric's name, None where no job has any; and the jobs.
    """
    hydra_configs = [OmegaConf.load(file) for file in folder.rglob(".hydra/hydra.yaml")]
    by_number = sorted(hydra_configs, key=lambda config: int(OmegaConf.select(config, "hydra.job.num", default=0)))
    jobs = []
    for config in by_number:
        job_folder = Path(config.hydra.runtime.output_dir)
        overrides = dict(override.lstrip("+~").split("=", 1) for override in config.hydra.overrides.task)
        jobs.append((job_folder, overrides, next(iter(sorted(job_folder.rglob("metrics.csv"))), None)))
    known = [name for _, _, file in jobs if file is not None for name in merged_metrics(file)]
    metric = metric or next(iter(known), None)
    return metric, [Job(where, overrides, _last(file, metric)) for where, overrides, file in jobs]


def best(jobs: Sequence[Job]) -> Job | None:
    """The job with the best merged value at its last validation."""
    merged = [(job, job.last) for job in jobs if job.last is not None and job.last.merged is not None]
    if not merged:
        return None
    # The gain is positive where the merge is better; so its sign tells whether less is better.
    is_less_better = sum((v.live - (v.merged or 0.0)) * (v.gain or 0.0) for _, v in merged) >= 0
    return min(merged, key=lambda pair: (pair[1].merged or 0.0) * (1 if is_less_better else -1))[0]


def comparison_table(jobs: Sequence[Job], metric: str) -> str:
    """One row a job: what differs between them, and their last validations; the best merge is marked."""
    keys, winner = _varied(jobs), best(jobs)
    header = [*_short(keys), *RESULTS, "best"]
    rows = [
        [*(job.overrides.get(key, NOTHING) for key in keys), *_cells(job.last), "*" if job is winner else ""]
        for job in jobs
    ]
    return text_table(header, rows, title=f"{metric} at the last validation of each job", num_left=len(keys))


def write_comparison(file: Path, jobs: Sequence[Job]) -> None:
    """The same as CSV, with full precision and the folders of the jobs."""
    keys = _varied(jobs)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["folder", *keys, *RESULTS])
        for job in jobs:
            numbers = ["" if number is None else number for number in _numbers(job.last)]
            writer.writerow([job.folder, *(job.overrides.get(key, "") for key in keys), *numbers])


class ComparisonTable(Callback):
    """A callback of Hydra's (``hydra/callbacks=merge_comparison``): ends a multirun with one table of its jobs.

    Args:
        metric: Name of the metric, such as ``"val_loss"``; None takes the first that has a merged value.
    """

    def __init__(self, metric: str | None = None) -> None:
        self.metric = metric

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table and writes ``comparison.csv`` into the folder of the multirun."""
        folder = Path(config.hydra.sweep.dir)
        metric, jobs = read_jobs(folder, self.metric)
        if metric is None:
            sys.stdout.write(
                f"No comparison: in {folder} no job has a metrics.csv with a merged metric. Jobs need Lightning's"
                " CSVLogger, writing below ${hydra:runtime.output_dir}, and MergeCallback\n"
            )
            return
        write_comparison(folder / "comparison.csv", jobs)
        sys.stdout.write(f"{comparison_table(jobs, metric)}\nComparison: {folder / 'comparison.csv'}\n")


def _last(metrics_file: Path | None, metric: str | None) -> Validation | None:
    if metrics_file is None or metric is None:
        return None
    try:
        return read_validations(metrics_file, metric)[-1]
    except (ValueError, IndexError):
        return None


def _varied(jobs: Sequence[Job]) -> list[str]:
    """Keys that not all jobs were given the same value of."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    return [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]


def _short(keys: Sequence[str]) -> list[str]:
    """The last parts of dotted keys, as many as tell them apart."""
    parts = [key.replace("/", ".").split(".") for key in keys]
    for num_parts in range(1, max(map(len, parts), default=0)):
        short = [".".join(each[-num_parts:]) for each in parts]
        if len(set(short)) == len(keys):
            return short
    return list(keys)


def _numbers(last: Validation | None) -> list[float | None]:
    if last is None:
        return [None] * len(RESULTS)
    predicted = last.predicted.value if last.predicted is not None else None
    return [last.step, last.live, last.merged, last.gain, predicted, last.span_steps, last.seconds]


def _cells(last: Validation | None) -> list[str]:
    formats = ["{:.0f}", "{:.4f}", "{:.4f}", "{:+.4f}", "{:.4f}", "{:.0f}", "{:.2f}"]
    return [NOTHING if n is None else form.format(n) for form, n in zip(formats, _numbers(last), strict=True)]
