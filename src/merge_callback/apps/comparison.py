"""Compares the jobs of a Hydra multirun in one table: which snapshots, interval or rule give the best model."""

import csv
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from merge_callback.utilities.csv_cells import cell_of_text
from merge_callback.utilities.tables import NOTHING, number, text_table
from merge_callback.validation.directions import first_loss
from merge_callback.validation.results import FitResult, MetricResult, collecting_results, result_of_last_fit

# What each job writes into its folder.
RESULT = "merge_result.json"
# "span": steps from the first to the last snapshot of the merge; "seconds": time that its validation took.
RESULTS = ["step", "live", "merged", "gain", "predicted", "span", "seconds"]


@dataclass(frozen=True)
class Job:
    """One job of a multirun: its folder, its overrides, and its last validation; None if it had none."""

    folder: Path
    overrides: dict[str, str]
    result: FitResult | None

    def values(self, metric: str) -> MetricResult | None:
        """Returns a metric's values at the last validation; None if there are none."""
        return None if self.result is None else self.result.metrics.get(metric)


def read_jobs(folder: Path, metric: str | None = None) -> tuple[str | None, list[Job]]:
    """Reads the jobs in the folder of a multirun, in the order of their numbers.

    Args:
        folder: Hydra's ``sweep.dir``.
        metric: Name of the metric; None takes the first where less is better, else the first.

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
        # Hydra writes "???" where a job has no number.
        job_number = int(num) if isinstance(num := config["job"].get("num"), int) else 0
        found.append((job_number, Job(file.parent.parent, overrides, _read_result(file.parent.parent / RESULT))))
    jobs = [job for _, job in sorted(found, key=lambda each: each[0])]
    known: dict[str, bool] = {}
    for job in jobs:
        for name, values in job.result.metrics.items() if job.result is not None else ():
            known.setdefault(name, values.higher_is_better)
    if metric is not None and known and metric not in known:
        raise ValueError(f"no job has logged {metric!r} in its validation; there are: {', '.join(known)}")
    return metric or first_loss(known), jobs


def best(jobs: Sequence[Job], metric: str) -> tuple[Job, Literal["live", "merged"]] | None:
    """Returns the job whose last validation had the best value, and whether that was the live or the merged one.

    None if there is no finite value. Of equal values the live one counts, since it needs no merge.
    """
    found: list[tuple[float, Job, Literal["live", "merged"]]] = []
    for job in jobs:
        if (values := job.values(metric)) is None:
            continue
        sign = -1 if values.higher_is_better else 1
        found.append((sign * values.live, job, "live"))
        if values.merged is not None:
            found.append((sign * values.merged, job, "merged"))
    finite = [each for each in found if math.isfinite(each[0])]
    return min(finite, key=lambda each: each[0])[1:] if finite else None


def comparison_table(jobs: Sequence[Job], metric: str) -> str:
    """Returns a text table with one row per job: what differs, its last validation, and a star at the best value."""
    keys, winner = _varied(jobs), best(jobs, metric)
    # Leaves out the seconds, which only programs use, and the step if it is the same for all jobs.
    shown = dict(zip(RESULTS, zip(*(_cells(job, metric) for job in jobs), strict=True), strict=True))
    del shown["seconds"]
    if len(set(shown["step"])) == 1:
        del shown["step"]
    header = [*_short(keys), *shown, "best"]
    columns = [*([job.overrides.get(key, NOTHING) for job in jobs] for key in keys), *shown.values()]
    columns.append([f"* {winner[1]}" if winner is not None and job is winner[0] else "" for job in jobs])
    title = f"{metric} at the last validation of each job"
    return text_table(header, list(zip(*columns, strict=True)), title=title, num_left=len(keys))


def write_comparison(file: Path, jobs: Sequence[Job], metric: str) -> None:
    """Writes the same table as CSV, with full precision and the folders of the jobs."""
    keys = _varied(jobs)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["folder", *keys, *RESULTS])
        for job in jobs:
            numbers = ["" if number is None else number for number in _numbers(job, metric)]
            settings = (cell_of_text(job.overrides.get(key, "")) for key in keys)
            writer.writerow([cell_of_text(str(job.folder)), *settings, *numbers])


class ComparisonTable(Callback):
    """A Hydra callback (``hydra/callbacks=merge_comparison``) that ends a multirun with one table of its jobs.

    Args:
        metric: Name of the metric, such as ``"val_loss"``; None takes the first loss that a job has logged.
    """

    def __init__(self, metric: str | None = None) -> None:
        self.metric = metric
        self._job = ExitStack()
        self._fits: list[list[FitResult]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Says before the first job what would be missing after the last one."""
        if not _makes_merges(config):
            sys.stdout.write(
                "merge_comparison: this config has no MergeCallback, so jobs that do not make one themselves cannot be"
                " compared. Add `callbacks/merge: pma` to its defaults, or callbacks/merge=pma to the command\n"
            )

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Collects the results of the fits of a job, in its process."""
        self._fits = self._job.enter_context(collecting_results())

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Writes the result of the job's last fit into its folder.

        Prints the table so far after a failed job, which ends the multirun with most launchers.
        """
        self._job.close()
        if (result := result_of_last_fit(self._fits)) is not None:
            file = Path(config.hydra.runtime.output_dir) / RESULT
            file.write_text(json.dumps(asdict(result), indent=1))
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
                f"No comparison: no job in {folder} has a {RESULT}. A job writes one if a fit with a MergeCallback ends"
                " in its own process that was validated and logged a metric (not in processes that ddp_spawn starts)\n"
            )
            return
        write_comparison(folder / "comparison.csv", jobs, metric)
        sys.stdout.write(f"{comparison_table(jobs, metric)}\nComparison: {folder / 'comparison.csv'}\n")


def _makes_merges(config: DictConfig) -> bool:
    """Returns whether a config names a MergeCallback, or a sweep may choose one."""
    known = OmegaConf.to_container(config, resolve=False)
    assert isinstance(known, dict)
    told = known.get("hydra", {}).get("overrides", {}).get("task", [])
    targets = [value for key, value in _entries(known) if key in ("_target_", "class_path")]
    return any("MergeCallback" in str(target) for target in targets) or any("merge" in str(each) for each in told)


def _entries(config: Any) -> Iterator[tuple[Any, Any]]:
    """Yields all keys and values of nested containers."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        yield key, value
        if isinstance(value, dict | list):
            yield from _entries(value)


def _read_result(file: Path) -> FitResult | None:
    """Returns what a job has written; None if there is nothing, or somebody else's."""
    try:
        found = json.loads(file.read_text())
        metrics = {str(name): MetricResult(**_numbers_only(values)) for name, values in found["metrics"].items()}
        step, span_steps, seconds = (found[key] for key in ("step", "span_steps", "seconds"))
        return FitResult(str(found["callback"]), int(step), _number(span_steps), _number(seconds), metrics)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return None


def _numbers_only(values: Mapping[str, Any]) -> dict[str, Any]:
    is_higher_better = bool(values["higher_is_better"])
    known = {name: _number(values[name]) for name in ("merged", "gain", "predicted")}
    return {"live": float(values["live"]), **known, "higher_is_better": is_higher_better}


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


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


def _numbers(job: Job, metric: str) -> list[float | None]:
    result, values = job.result, job.values(metric)
    if result is None or values is None:
        return [None] * len(RESULTS)
    return [result.step, values.live, values.merged, values.gain, values.predicted, result.span_steps, result.seconds]


def _cells(job: Job, metric: str) -> list[str]:
    step, *losses, better, predicted, span, seconds = _numbers(job, metric)
    whole = [NOTHING if each is None else f"{each:.0f}" for each in (step, span)]
    values = [NOTHING if each is None else number(each) for each in (*losses, predicted, seconds)]
    return [whole[0], *values[:2], NOTHING if better is None else number(better, "+"), values[2], whole[1], values[3]]
