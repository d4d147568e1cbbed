"""The table at the end of a multirun: what jobs were told, what came of it, and which merge is the best."""

import csv
import json
import math

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from merge_callback import MergeCallback
from merge_callback.apps.comparison import ComparisonTable, best, comparison_table, read_jobs, write_comparison
from merge_callback.validation.results import FitResult, collecting_results, result_of_last_fit
from tests.helpers.toys import Toy, batches, fit, make

# Step, and live and merged value of a loss and of an accuracy. The third job has the best merged loss, the first the
# best merged accuracy, and the last one the best live accuracy of all.
VALUES = {
    0: (100, (2.5, 2.25), (0.5, 0.75)),
    2: (100, (2.5, 2.125), (0.5, 0.625)),
    10: (100, (2.5, 2.75), (0.875, 0.25)),
}


def write_result(folder, step, loss, accuracy, **more):
    """What a job writes."""
    metrics = {}
    for name, (live, merged), is_higher_better in (("val_acc", accuracy, True), ("val_loss", loss, False)):
        gain = merged - live if is_higher_better else live - merged
        values = {"live": live, "merged": merged, "gain": gain, "predicted": None, **more}
        metrics[name] = values | {"higher_is_better": is_higher_better}
    result = {"callback": "merge", "step": step, "span_steps": 18.0, "seconds": 0.5, "metrics": metrics}
    (folder / "merge_result.json").write_text(json.dumps(result))


@pytest.fixture
def sweep(tmp_path):
    """The folder of a multirun of four jobs, of which one failed before its first validation."""
    for number in (10, 2, 0, 3):
        job = tmp_path / "sweep" / str(number)
        overrides = [f"callbacks.merge.num_snapshots={number}", "callbacks/merge=wma", "+seed=1"]
        config = {"job": {"num": number}, "overrides": {"task": overrides}, "runtime": {"output_dir": str(job)}}
        (job / ".hydra").mkdir(parents=True)
        OmegaConf.save({"hydra": config}, job / ".hydra" / "hydra.yaml")
        if number in VALUES:
            write_result(job, *VALUES[number])
    return tmp_path / "sweep"


def test_jobs_come_in_order_with_what_they_were_told_and_their_last_validation(sweep):
    metric, jobs = read_jobs(sweep)
    assert metric == "val_loss"
    assert [job.folder.name for job in jobs] == ["0", "2", "3", "10"]
    assert jobs[1].overrides == {"callbacks.merge.num_snapshots": "2", "callbacks/merge": "wma", "seed": "1"}
    assert (jobs[1].result.step, jobs[1].values("val_loss").merged, jobs[1].result.span_steps) == (100, 2.125, 18)
    assert jobs[2].result is None


@pytest.mark.parametrize(("metric", "winner"), [("val_loss", ("2", "merged")), ("val_acc", ("10", "live"))])
def test_the_best_is_found_whether_live_or_merged_and_whether_less_or_more_is_better(sweep, metric, winner):
    job, which = best(read_jobs(sweep, metric)[1], metric)
    assert (job.folder.name, which) == winner


def test_of_equal_values_the_live_one_counts(sweep):
    write_result(sweep / "3", 100, (1.0, 1.0), (0.5, 0.5))
    job, which = best(read_jobs(sweep)[1], "val_loss")
    assert (job.folder.name, which) == ("3", "live")


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
    assert [row[-2:] == ["*", "merged"] for row in rows] == [False, True, False, False]
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
    for number in VALUES:
        write_result(sweep / str(number), 100_000 + number, (12345.5, 12345.25), (0.5, 0.5), predicted=12345.0)
    _, jobs = read_jobs(sweep)
    for place, job in enumerate(jobs):
        job.overrides["callbacks.merge.every_n_train_steps"] = str(1000 + place)
    text = comparison_table(jobs, "val_loss")
    for cell in ("12345.5000", "12345.0000", "100010", "1003", "num_snapshots", "every_n_train_steps"):
        assert cell in text, cell


def test_a_job_that_diverged_is_not_the_best_and_makes_no_other_so(sweep):
    write_result(sweep / "0", 100, (math.nan, math.nan), (0.5, 0.5))
    assert best(read_jobs(sweep)[1], "val_loss")[0].folder.name == "2"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"metrics": {"val_loss": 3}}', '{"metrics": {"a": {"live": "x"}}}', "[" * 10_000]
)
def test_what_is_no_result_is_left_out(sweep, content):
    (sweep / "2" / "merge_result.json").write_text(content)
    assert read_jobs(sweep)[1][1].result is None


def test_a_metric_that_no_job_has_is_named_with_those_there_are(sweep, capsys):
    with pytest.raises(
        ValueError, match="no job has logged 'val/loss' in its validation; there are: val_acc, val_loss"
    ):
        read_jobs(sweep, "val/loss")
    ComparisonTable("val/loss").on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}}))
    assert "No comparison: no job has logged 'val/loss'" in capsys.readouterr().out


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
    write_comparison(sweep / "comparison.csv", jobs, "val_loss")
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
    assert f"no job in {tmp_path} has a merge_result.json" in capsys.readouterr().out
    assert not (tmp_path / "comparison.csv").exists()


@pytest.mark.parametrize("ends", [JobStatus.COMPLETED, JobStatus.FAILED])
def test_values_come_from_the_jobs_whatever_their_logger(sweep, tmp_path, ends, capsys):
    """Hydra's hooks around a real fit without a logger."""
    comparison = ComparisonTable()
    config = OmegaConf.create(
        {"hydra": {"sweep": {"dir": str(sweep)}, "runtime": {"output_dir": str(sweep / "3")}, "mode": "MULTIRUN"}}
    )
    config.hydra.mode = RunMode.MULTIRUN
    comparison.on_job_start(config)
    trainer = Trainer(
        max_steps=12,
        val_check_interval=4,
        callbacks=[MergeCallback(1, 4), MergeCallback(1, 4, name="late", start=1000)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make(Toy), batches(), batches(24, 8, shuffle=False, seed=1))
    job_return = JobReturn()
    job_return.status = ends
    comparison.on_job_end(config, job_return)
    metric, jobs = read_jobs(sweep)
    assert metric == "val_loss"
    values, logged = jobs[2].values(metric), trainer.callback_metrics
    names = ("val_loss", "merged/val_loss", "merge_gain/val_loss")
    assert (values.live, values.merged, values.gain) == tuple(float(logged[name]) for name in names)
    assert jobs[2].values("val_accuracy").higher_is_better
    assert (jobs[2].result.step, jobs[2].result.span_steps) == (12, 3)
    # A job that fails ends the multirun with most launchers.
    assert ("Comparison: " in capsys.readouterr().out) == (ends is JobStatus.FAILED)


def test_what_would_be_missing_is_said_before_the_first_job(capsys):
    def said(config, *overrides):
        ComparisonTable().on_multirun_start(OmegaConf.create(config | {"hydra": {"overrides": {"task": overrides}}}))
        return capsys.readouterr().out

    target = {"_target_": "merge_callback.MergeCallback"}
    assert "Add `callbacks/merge: pma` to its defaults" in said({"trainer": {"max_steps": 3}})
    assert not said({"trainer": {"callbacks": [target]}})
    assert not said({"callbacks": {"merge": target, "other": "${missing}"}})
    assert not said({}, "callbacks/merge=pma,lawa")


def test_of_several_fits_and_callbacks_the_last_fit_s_first_callback_with_a_merge_counts():
    def result(callback, span_steps, seconds):
        return FitResult(callback, 100, span_steps, seconds, {})

    # Fits of as many steps, as folds are, and callbacks of other names, as of two stages of a job.
    first, second = [result("merge", 9.0, 1.0), result("late", 5.0, 2.0)], [result("finetune", 9.0, 3.0)]
    assert result_of_last_fit([first, second]).seconds == 3.0
    assert result_of_last_fit([second, first]).seconds == 1.0
    assert result_of_last_fit([second, [result("merge", None, 1.0), first[1]]]).seconds == 2.0
    assert result_of_last_fit([first, [result("merge", None, 5.0), result("late", None, 6.0)]]).seconds == 5.0
    # A fit that was not validated has none.
    assert result_of_last_fit([first, []]).seconds == 1.0
    assert result_of_last_fit([]) is None


def test_the_result_of_a_job_is_that_of_its_last_fit_whatever_its_callback_is_called(tmp_path):
    with collecting_results() as fits:
        for name in ("pretrain", "finetune"):
            fit(make(Toy), tmp_path / name, MergeCallback(2, 3, name=name), MergeCallback(1, 3, name="second"))
    assert [[result.callback for result in of_fit] for of_fit in fits if of_fit] == [
        ["pretrain", "second"],
        ["finetune", "second"],
    ]
    assert result_of_last_fit(fits).callback == "finetune"
