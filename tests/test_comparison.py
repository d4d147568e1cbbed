"""The table at the end of a multirun: what jobs were told, what came of it, and which merge is the best."""

import csv
import re

import pytest
from omegaconf import OmegaConf

from merge_callback.comparison import ComparisonTable, best, comparison_table, read_jobs

HEADER = "step,val_loss,merged/val_loss,merge_gain/val_loss,val_acc,merged/val_acc,merge_gain/val_acc,merge/span_steps"
# Two validations; in the metric where less is better the third job wins, in the other one the first.
ROWS = {
    0: "49,3,2.9,0.1,0.1,0.2,0.1,8\n99,2.5,2.25,0.25,0.5,0.75,0.25,18",
    2: "49,3,2.9,0.1,0.1,0.2,0.1,8\n99,2.5,2.125,0.375,0.5,0.625,0.125,36",
    10: "49,3,2.9,0.1,0.1,0.2,0.1,8\n99,2.5,2.75,-0.25,0.5,0.25,-0.25,45",
}


@pytest.fixture
def sweep(tmp_path):
    """The folder of a multirun of four jobs, of which one failed before its first validation."""
    for number in (10, 2, 0, 3):
        job = tmp_path / "sweep" / str(number)
        overrides = [f"callbacks.merge.num_snapshots={number}", "callbacks/merge=wma", "+seed=1"]
        config = {"job": {"num": number}, "overrides": {"task": overrides}, "runtime": {"output_dir": str(job)}}
        (job / ".hydra").mkdir(parents=True)
        OmegaConf.save({"hydra": config}, job / ".hydra" / "hydra.yaml")
        if number in ROWS:
            (job / "csv").mkdir()
            (job / "csv" / "metrics.csv").write_text(f"{HEADER}\n{ROWS[number]}\n")
    return tmp_path / "sweep"


def test_jobs_come_in_order_with_what_they_were_told_and_their_last_validation(sweep):
    metric, jobs = read_jobs(sweep)
    assert metric == "val_loss"
    assert [job.folder.name for job in jobs] == ["0", "2", "3", "10"]
    assert jobs[1].overrides == {"callbacks.merge.num_snapshots": "2", "callbacks/merge": "wma", "seed": "1"}
    assert (jobs[1].last.step, jobs[1].last.merged, jobs[1].last.span_steps) == (100, 2.125, 36)
    assert jobs[2].last is None


@pytest.mark.parametrize(("metric", "winner"), [("val_loss", "2"), ("val_acc", "0")])
def test_the_best_merge_is_found_whether_less_or_more_is_better(sweep, metric, winner):
    assert best(read_jobs(sweep, metric)[1]).folder.name == winner


def test_the_table_shows_what_differs_and_fits_80_columns(sweep):
    _, jobs = read_jobs(sweep)
    text = comparison_table(jobs, "val_loss")
    assert max(map(len, text.splitlines())) <= 80
    rows = [re.split(r"\s*│\s*", line.strip("│ ")) for line in text.splitlines() if "│" in line and "┃" not in line]
    assert [row[:5] for row in rows] == [
        ["0", "100", "2.5000", "2.2500", "+0.2500"],
        ["2", "100", "2.5000", "2.1250", "+0.3750"],
        ["3", "-", "-", "-", "-"],
        ["10", "100", "2.5000", "2.7500", "-0.2500"],
    ]
    assert [row[-1] == "*" for row in rows] == [False, True, False, False]
    assert "predicted" not in text
    assert "seed" not in text


def test_a_multirun_ends_with_the_table_and_a_file(sweep, capsys):
    ComparisonTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}}))
    printed = capsys.readouterr().out
    assert "num_snapshots" in printed
    assert printed.splitlines()[-1] == f"Comparison: {sweep / 'comparison.csv'}"
    with (sweep / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["callbacks.merge.num_snapshots"] for row in rows] == ["0", "2", "3", "10"]
    assert [row["merged"] for row in rows] == ["2.25", "2.125", "", "2.75"]


def test_keys_that_end_alike_are_told_apart(sweep):
    _, jobs = read_jobs(sweep)
    for number, job in enumerate(jobs):
        job.overrides["other.merge.num_snapshots"] = str(number)
    text = "".join(comparison_table(jobs, "val_loss").split())
    assert "other" in text
    assert "callbac" in text


def test_without_anything_to_compare_it_says_what_jobs_need(tmp_path, capsys):
    ComparisonTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert "no job has a metrics.csv with a merged metric" in capsys.readouterr().out
    assert not (tmp_path / "comparison.csv").exists()
