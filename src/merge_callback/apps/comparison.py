"""Compares the jobs of a Hydra multirun in one table: which snapshots, interval or rule give the best merge."""

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from merge_callback.apps.runs import Validation, merged_metrics, read_validations
from merge_callback.utilities.csv_cells import cell_of_text
from merge_callback.utilities.tables import NOTHING, number, text_table

# "span": steps from the first to the last snapshot of the merge; "seconds": time that its validation took.
RESULTS = ["step", "live", "merged", "gain", "predicted", "span", "seconds"]


@dataclass(frozen=True)
class Job:
    """One job of a multirun: its overrides, and its last validation; None if it logged none."""

    folder: Path
    overrides: dict[str, str]
    last: Validation | None


def read_jobs(folder: Path, metric: str | None = None) -> tuple[str | None, list[Job]]:
    """Reads the jobs in the folder of a multirun, in the order of their numbers.

    Args:
        folder: Hydra's ``sweep.dir``. The metrics of a job are read from the ``metrics.csv`` of Lightning's CSVLogger.
        metric: Name of the metric; None takes the first that has a merged value.

    Returns:
        The name of the metric, None if no job has one; and the jobs.

    Raises:
        ValueError: If no job has that metric; the message names the metrics that jobs have.
    """
    found = []
    for file in folder.rglob(".hydra/hydra.yaml"):
        # Not as a config: whoever wrote the file could have it read the environment.
        config = yaml.safe_load(file.read_text())["hydra"]
        # `~key` deletes an entry and has no value.
        pairs = [override.lstrip("+~").partition("=") for override in config["overrides"]["task"]]
        overrides = {key: value for key, _, value in pairs}
        job_folder = file.parent.parent
        # Hydra writes "???" where a job has no number.
        job_number = int(num) if isinstance(num := config["job"].get("num"), int) else 0
        found.append((job_number, job_folder, overrides, next(iter(sorted(job_folder.rglob("metrics.csv"))), None)))
    jobs = sorted(found, key=lambda job: job[0])
    known = dict.fromkeys(name for *_, file in jobs if file is not None for name in merged_metrics(file))
    if metric is not None and known and metric not in known:
        raise ValueError(f"no job has a merged {metric!r}; there are: {', '.join(known)}")
    metric = metric or next(iter(known), None)
    return metric, [Job(where, overrides, _last(file, metric)) for _, where, overrides, file in jobs]


def best(jobs: Sequence[Job]) -> Job | None:
    """Returns the job with the best merged value at its last validation; None if no job has a finite one."""
    known = [(job, job.last.live, job.last.merged, job.last.gain) for job in jobs if job.last is not None]
    finite = [
        (job, live, merged, better)
        for job, live, merged, better in known
        if merged is not None and better is not None and all(map(math.isfinite, (live, merged, better)))
    ]
    if not finite:
        return None
    # The gain is positive where the merge is better, so its sign shows whether less is better.
    sign = 1 if sum((live - merged) * better for _, live, merged, better in finite) >= 0 else -1
    return min(finite, key=lambda each: sign * each[2])[0]


def comparison_table(jobs: Sequence[Job], metric: str) -> str:
    """Returns a text table with one row per job: its differing overrides and last validation. The best is marked."""
    keys, winner = _varied(jobs), best(jobs)
    # Leaves out the seconds, which only programs use, and the step if it is the same for all jobs.
    shown = dict(zip(RESULTS, zip(*map(_cells, jobs), strict=True), strict=True))
    del shown["seconds"]
    if len(set(shown["step"])) == 1:
        del shown["step"]
    header = [*_short(keys), *shown, "best"]
    columns = [*([job.overrides.get(key, NOTHING) for job in jobs] for key in keys), *shown.values()]
    columns.append(["*" if job is winner else "" for job in jobs])
    title = f"{metric} at the last merged validation of each job"
    return text_table(header, list(zip(*columns, strict=True)), title=title, num_left=len(keys))


def write_comparison(file: Path, jobs: Sequence[Job]) -> None:
    """Writes the same table as CSV, with full precision and the folders of the jobs."""
    keys = _varied(jobs)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["folder", *keys, *RESULTS])
        for job in jobs:
            numbers = ["" if number is None else number for number in _numbers(job.last)]
            settings = (cell_of_text(job.overrides.get(key, "")) for key in keys)
            writer.writerow([cell_of_text(str(job.folder)), *settings, *numbers])


class ComparisonTable(Callback):
    """A Hydra callback (``hydra/callbacks=merge_comparison``) that ends a multirun with one table of its jobs.

    Args:
        metric: Name of the metric, such as ``"val_loss"``; None takes the first that has a merged value.
    """

    def __init__(self, metric: str | None = None) -> None:
        self.metric = metric

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Prints the table so far after a failed job, which ends the multirun with most launchers."""
        if config.hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.FAILED:
            self._show(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table and writes ``comparison.csv`` into the folder of the multirun."""
        self._show(Path(config.hydra.sweep.dir))

    def _show(self, folder: Path) -> None:
        try:
            metric, jobs = read_jobs(folder, self.metric)
        except ValueError as error:
            sys.stdout.write(f"No comparison: {error}\n")
            return
        if metric is None:
            sys.stdout.write(
                f"No comparison: in {folder} no job has a metrics.csv with a metric merged/... beside its .hydra."
                " Jobs need Lightning's CSVLogger, writing below ${hydra:runtime.output_dir}, and MergeCallback\n"
            )
            return
        write_comparison(folder / "comparison.csv", jobs)
        sys.stdout.write(f"{comparison_table(jobs, metric)}\nComparison: {folder / 'comparison.csv'}\n")


def _last(metrics_file: Path | None, metric: str | None) -> Validation | None:
    if metrics_file is None or metric is None:
        return None
    try:
        validations = read_validations(metrics_file, metric)
    except ValueError:
        return None
    # Some validations may not have evaluated the merge.
    with_merge = [validation for validation in validations if validation.merged is not None]
    return next(reversed(with_merge or validations), None)


def _varied(jobs: Sequence[Job]) -> list[str]:
    """Returns the keys whose values differ between jobs."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    return [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]


def _short(keys: Sequence[str]) -> list[str]:
    """Returns as many last parts of dotted keys as are needed to distinguish them."""
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


def _cells(job: Job) -> list[str]:
    step, *losses, better, predicted, span, seconds = _numbers(job.last)
    whole = [NOTHING if each is None else f"{each:.0f}" for each in (step, span)]
    values = [NOTHING if each is None else number(each) for each in (*losses, predicted, seconds)]
    return [whole[0], *values[:2], NOTHING if better is None else number(better, "+"), values[2], whole[1], values[3]]
