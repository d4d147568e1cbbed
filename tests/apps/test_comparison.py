"""The table at the end of a multirun: what jobs were told, what came of it, and which merge is the best."""

import csv

import pytest
from omegaconf import OmegaConf

from merge_callback.apps.comparison import ComparisonTable, best, comparison_table, read_jobs, write_comparison

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
    _, header, _, *rows = (line.split() for line in text.splitlines())
    assert header == ["num_snapshots", "step", "live", "merged", "gain", "span", "best"]
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


def test_nothing_is_cut_where_numbers_need_more_than_80_columns(sweep):
    header = "step,val_loss,merged/val_loss,merge_gain/val_loss,annealed/val_loss,annealed/val_loss/low,"
    header += "annealed/val_loss/high,merge/span_steps"
    for number in ROWS:
        row = f"{99_999 + number},12345.5,12345.25,0.25,12345,12344,12346,800000"
        (sweep / str(number) / "csv" / "metrics.csv").write_text(f"{header}\n{row}\n")
    _, jobs = read_jobs(sweep)
    for place, job in enumerate(jobs):
        job.overrides["callbacks.merge.every_n_train_steps"] = str(1000 + place)
    text = comparison_table(jobs, "val_loss")
    for cell in ("12345.5000", "800000", "100010", "1003", "num_snapshots", "every_n_train_steps"):
        assert cell in text, cell


def test_a_job_that_diverged_is_not_the_best_and_makes_no_other_so(sweep):
    (sweep / "0" / "csv" / "metrics.csv").write_text(f"{HEADER}\n99,nan,nan,nan,nan,nan,nan,18\n")
    assert best(read_jobs(sweep)[1]).folder.name == "2"


def test_the_last_validation_with_a_merge_counts(sweep):
    file = sweep / "2" / "csv" / "metrics.csv"
    file.write_text(file.read_text() + "149,2.4,,,0.6,,,\n")
    assert read_jobs(sweep)[1][1].last.step == 100


def test_a_metric_that_no_job_has_is_named_with_those_there_are(sweep, capsys):
    with pytest.raises(ValueError, match="no job has a merged 'val/loss'; there are: val_loss, val_acc"):
        read_jobs(sweep, "val/loss")
    ComparisonTable("val/loss").on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}}))
    assert "No comparison: no job has a merged 'val/loss'" in capsys.readouterr().out


def test_deletions_are_overrides_without_a_value(sweep):
    file = sweep / "2" / ".hydra" / "hydra.yaml"
    file.write_text(file.read_text().replace("+seed=1", "~trainer.logger"))
    assert read_jobs(sweep)[1][1].overrides["trainer.logger"] == ""


def test_nothing_that_a_job_has_written_is_run(sweep, monkeypatch):
    monkeypatch.setenv("SECRET", "7")
    file = sweep / "2" / ".hydra" / "hydra.yaml"
    file.write_text(file.read_text().replace("+seed=1", "+seed=${oc.env:SECRET}"))
    _, jobs = read_jobs(sweep)
    assert jobs[1].overrides["seed"] == "${oc.env:SECRET}"
    jobs[1].overrides["seed"] = "=HYPERLINK(0)"
    write_comparison(sweep / "comparison.csv", jobs)
    with (sweep / "comparison.csv").open() as stream:
        assert [row["seed"] for row in csv.DictReader(stream)][1] == "'=HYPERLINK(0)"


def test_keys_that_end_alike_are_told_apart(sweep):
    _, jobs = read_jobs(sweep)
    for number, job in enumerate(jobs):
        job.overrides["other.merge.num_snapshots"] = str(number)
    text = "".join(comparison_table(jobs, "val_loss").split())
    assert "other" in text
    assert "callbac" in text


def test_without_anything_to_compare_it_says_what_jobs_need(tmp_path, capsys):
    ComparisonTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert "no job has a metrics.csv with a metric merged/..." in capsys.readouterr().out
    assert not (tmp_path / "comparison.csv").exists()
