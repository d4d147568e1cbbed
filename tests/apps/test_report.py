"""The report: what is read back, what the figures show, and a page that needs nothing else."""

import re
import sys
from dataclasses import replace
from html import escape

import pytest
import torch

from merge_callback.apps.demo.command import closing_table
from merge_callback.apps.figures import plot_errors, plot_predicted_against_actual, plot_validations
from merge_callback.apps.report import find, page, run, summary
from merge_callback.apps.runs import Validation, read_validations
from merge_callback.apps.wrong_call import WrongCallError
from merge_callback.prediction.assessment import (
    Assessed,
    Case,
    cases_of,
    errors_by_span,
    from_earlier,
    from_earlier_and_others,
    from_other_runs,
    summarise,
)
from merge_callback.prediction.bias import BranchOutcome, Prediction
from merge_callback.prediction.records import AnnealRecord, append_record
from merge_callback.prediction.validations import StableValidation
from tests.helpers.commands import merge_callback

PREDICTED = Prediction(2.0, 1.875, 2.25)
ROWS = [Validation(75, 2.5, None, None), Validation(150, 2.25, 2.125, 0.125, PREDICTED)]
CSV = (
    "step,train_loss,val_loss,merged/val_loss,merge_gain/val_loss,"
    "annealed/val_loss,annealed/val_loss/low,annealed/val_loss/high\n"
    "74,,2.5,,,,,\n99,2.4,,,,,,\n149,,2.25,2.125,0.125,2.0,1.875,2.25\n"
)


def record(step, annealed, run="a", shape="linear", span_steps=None):
    span_steps = span_steps or step // 10
    matched = StableValidation(step, span_steps, {"val_loss": 2.25}, {"val_loss": 2.125})
    return AnnealRecord(run, step - span_steps, step, span_steps, shape, {"val_loss": annealed}, matched=matched)


# Gain ratios of 1, 1.5 and 2 in the one run, of 1.2 twice in the other.
RECORDS = [
    record(100, 2.125),
    record(200, 2.0625),
    record(300, 2.0),
    record(100, 2.1, run="b"),
    record(200, 2.1, run="b"),
    record(200, 1.5, run="b", shape="cosine"),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run" / "csv").mkdir(parents=True)
    (tmp_path / "run" / "csv" / "metrics.csv").write_text(CSV)
    for each in RECORDS:
        append_record(tmp_path / "run" / "anneals.jsonl", each)
    return tmp_path / "run"


def test_validations_are_read_back_with_the_number_of_steps_done(folder):
    file = folder / "csv" / "metrics.csv"
    assert read_validations(file, "val_loss") == ROWS
    with pytest.raises(ValueError, match="has no metric 'val/loss'; it has: step, train_loss, val_loss"):
        read_validations(file, "val/loss")


def test_the_figure_shows_live_merged_predicted_and_annealed_values():
    upper, lower = plot_validations(ROWS, "val_loss (nats)", "a run", [record(150, 2.0)]).axes
    values = {line.get_label(): line.get_xydata().tolist() for line in upper.lines}
    assert values == {
        "live": [[75, 2.5], [150, 2.25]],
        "merged": [[150, 2.125]],
        "annealed, predicted": [[150, 2.0]],
        "annealed for real": [[150, 2.0]],
    }
    below = [line.get_xydata().tolist() for line in lower.lines]
    assert below[:3] == [[[150, 0.125]], [[150, 0.25]], [[150, 0.25]]]


def test_the_table_leaves_open_what_was_not_evaluated():
    _, header, _, *rows = (line.split() for line in closing_table(ROWS).splitlines())
    assert header == ["step", "live", "merged", "gain", "annealed", "(predicted)"]
    assert rows == [["75", "2.5000", "-", "-", "-"], ["150", "2.2500", "2.1250", "+0.1250", "2.0000"]]


def test_a_case_is_predicted_from_earlier_ones_of_its_run_and_kind():
    cases = cases_of(RECORDS, "val_loss")
    (assessed,) = from_earlier(cases)
    assert (assessed.case.run, assessed.case.step) == ("a", 300)
    # Ratios of 1 and 1.5 before, of which the later counts four times as much; 2 now: predicted 2.25 - 1.4 / 8.
    assert assessed.prediction.value == pytest.approx(2.075)
    assert assessed.error == pytest.approx(0.075)
    (plain,) = from_earlier(cases, weighted=False)
    assert plain.prediction.value == pytest.approx(2.09375)


def test_no_error_is_missing_where_decays_of_as_many_steps_have_other_shares():
    # A hundred steps each.
    records = [record(step, 2.0, span_steps=100) for step in range(1000, 2000, 50)]
    assessed = {"earlier": from_earlier(cases_of(records, "val_loss"))}
    found = errors_by_span(assessed)
    assert list(found) == ["5%", "6%", "7%", "8%", "9%"]
    together = [error for of_span in found.values() for error in of_span["earlier"]]
    assert sorted(together) == sorted(each.error for each in assessed["earlier"])


def test_a_case_is_predicted_from_other_runs_of_its_kind():
    assessed = from_other_runs(cases_of(RECORDS, "val_loss"))
    predicted = {(each.case.run, each.case.step): round(each.prediction.value, 6) for each in assessed}
    assert predicted == {("a", step): 2.1 for step in (100, 200, 300)} | {("b", step): 2.0625 for step in (100, 200)}
    late = from_other_runs(cases_of(RECORDS, "val_loss"), lambda case: case.step > 100)
    assert {each.case.run for each in late} == {"b"}


def test_a_case_is_predicted_from_its_run_and_from_others_that_together_count_as_two():
    (assessed,) = from_earlier_and_others(cases_of(RECORDS, "val_loss"))
    assert (assessed.case.run, assessed.case.step) == ("a", 300)
    ratios = {"own": [(1.0, 1 / 9), (1.5, 4 / 9)], "others": [(1.2, 1.0), (1.2, 1.0)]}
    pairs = [pair for each in ratios.values() for pair in each]
    ratio = sum(r * w for r, w in pairs) / sum(w for _, w in pairs)
    outcome = assessed.case.outcome
    expected = outcome.live - ratio * (outcome.live - outcome.merged)
    assert assessed.prediction.value == pytest.approx(expected)


def test_a_summary_is_of_absolute_and_signed_errors():
    def off(error, half):
        case = Case("a", 1, 0.1, "linear", BranchOutcome(2.0, 1.5, 1.0))
        return Assessed(case, Prediction(1 + error, 1 + error - half, 1 + error + half))

    summary = summarise([off(0.25, 0.5), off(-0.5, 0.25)])
    assert (summary.num_cases, summary.mean_absolute, summary.bias, summary.worst, summary.inside) == (
        2,
        0.375,
        -0.125,
        0.5,
        0.5,
    )
    assert summarise([]).num_cases == 0


def test_predictions_lie_against_what_came_and_errors_in_their_groups():
    assessed = from_other_runs(cases_of(RECORDS, "val_loss"))
    axes = plot_predicted_against_actual({"others": assessed}, "val_loss").axes[0]
    points = axes.lines[0].get_xydata().tolist()
    assert points == [[each.case.outcome.annealed, each.prediction.value] for each in assessed]
    axes = plot_errors({"10%": {"one": [0.25, -0.75]}, "20%": {"two": [0.5]}}, "nats", "span").axes[0]
    assert [sorted(line.get_ydata()) for line in axes.lines] == [[0.25, 0.75], [0.5], [0.5], [0.5]]


def test_the_page_holds_its_pictures_tables_and_numbers_and_needs_nothing_else(folder):
    html = page(find(folder))
    assert html.count("data:image/png;base64,") == 2 * 3
    assert not re.search(r'(?:src|srcset|href)="(?!data:)', html)
    for cell in ("2.0750", "+0.0750", "2.2500", "linear, 10%", "cosine, 10%", "uncalibrated"):
        assert f"<td>{cell}</td>" in html, cell


@pytest.mark.slow
def test_records_alone_and_a_run_without_anneals_have_a_page_too(folder):
    (folder / "csv" / "metrics.csv").rename(folder.parent / "metrics.csv")
    assert page(find(folder / "anneals.jsonl")).count("data:image") == 2 * 2
    found = find(folder.parent / "metrics.csv")
    assert (found.metric, found.records) == ("val_loss", [])
    assert page(found).count("data:image") == 2 * 1


@pytest.mark.slow
def test_the_command_writes_the_page_where_it_is_told(folder, capsys):
    run([str(folder), "--metric", "val_loss", "--output", str(folder / "own.html")])
    assert capsys.readouterr().out.strip() == str(folder / "own.html")
    assert "<h2>Every anneal</h2>" in (folder / "own.html").read_text()
    run([str(folder / "anneals.jsonl")])
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing does not exist; give the folder of a run, its metrics.csv, or records of anneals"),
        (["empty"], "empty holds nothing to report on: neither records of anneals nor a merged metric"),
        (["run", "--metric", "acc"], "run holds nothing to report on; there are: val_loss"),
        (["run/broken.jsonl"], "line 1, is not a record of an anneal"),
    ],
)
def test_what_cannot_be_reported_on_is_said_in_one_line(folder, monkeypatch, arguments, message):
    (folder.parent / "empty").mkdir()
    (folder / "broken.jsonl").write_text("nonsense\n")
    if arguments[0] == "run":
        (folder / "broken.jsonl").unlink()
    monkeypatch.chdir(folder.parent)
    done = merge_callback("report", *arguments)
    assert done.returncode == 2
    assert re.fullmatch(rf"merge-callback report: .*{re.escape(message)}.*\n", done.stderr)


def test_the_page_begins_with_one_sentence_and_says_what_it_was_made_of(folder):
    config = folder / ".hydra" / "config.yaml"
    config.parent.mkdir()
    config.write_text("model: ${oc.env:SECRET} <b>\n")
    append_record(folder / "anneals.jsonl", replace(record(150, 9.0, run="of another model"), matched=None))
    append_record(folder / "anneals.jsonl", record(150, 1.75))
    last = replace(ROWS[1], forecast=Prediction(1.9, 1.8, 2.0), forecast_end=167.0)
    assert summary(replace(find(folder), validations=[ROWS[0], last])) == (
        "At step 150, val_loss is 2.2500 live, 2.1250 merged, 2.0000 as predicted if it had been annealed until then"
        " (1.8750 to 2.2500), 1.9000 as forecast at the end of a decay up to step 167 (1.8000 to 2.0000) and 1.7500"
        " really annealed from step 135 on."
    )
    html = page(find(folder))
    assert "<p>At step 150, val_loss is 2.2500 live" in html
    assert f"torch {torch.__version__}" in html
    assert "model: ${oc.env:SECRET} &lt;b&gt;" in html
    assert re.search(r"on \d{4}-\d\d-\d\d \d\d:\d\d UTC", html)
    assert summary(find(folder / "anneals.jsonl")) == "8 real anneals of 3 runs, and no run of its own."


def test_without_matplotlib_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(WrongCallError, match="matplotlib is not installed: pip install"):
        run([str(folder)])


def test_where_more_is_better_the_lower_panel_shows_gains_all_the_same():
    rows = [Validation(10, 0.5, 0.75, 0.25), Validation(20, 0.75, 0.5, -0.25, Prediction(0.875, 0.75, 1.0))]
    _, lower = plot_validations(rows, "val_accuracy", "a run").axes
    merged, predicted, *_ = [line.get_xydata().tolist() for line in lower.lines]
    assert merged == [[10, 0.25], [20, -0.25]]
    assert predicted == [[20, 0.125]]


def test_the_report_is_about_the_first_loss_and_names_the_other_metrics(tmp_path):
    header = "step,val/acc,val/loss,merged/val/acc,merged/val/loss,merge_gain/val/acc,merge_gain/val/loss\n"
    (tmp_path / "metrics.csv").write_text(header + "9,0.5,2.5,0.75,2.25,0.25,0.25\n")
    found = find(tmp_path)
    assert (found.metric, found.other_metrics) == ("val/loss", ["val/acc"])
    assert "There are also val/acc" in page(found)
    assert find(tmp_path, "val/acc").metric == "val/acc"


def test_intervals_are_drawn_whole_unless_they_are_much_wider_than_what_came():
    def assessed(*pairs):
        cases = [Case("a", 100, 0.1, "linear", BranchOutcome(2.0, 1.75, annealed)) for annealed, _ in pairs]
        return {"all": [Assessed(case, Prediction(c, c - w, c + w)) for case, (c, w) in zip(cases, pairs, strict=True)]}

    (narrow,) = plot_predicted_against_actual(assessed((1.0, 0.25), (2.0, 0.25)), "val_loss").axes
    assert narrow.get_ylim()[0] < 0.75
    assert narrow.get_ylim()[1] > 2.25
    (wide,) = plot_predicted_against_actual(assessed((1.0, 100.0), (2.0, 0.25)), "val_loss").axes
    assert wide.get_ylim()[1] < 4


NAMES = {
    "dollar": "loss$_{",
    "two dollars": "val_$x^{$",
    "formula": r"$\frac$",
    "braces": "{0}",
    "percent": "%s",
    "two lines": "a\nb",
    "half a character": "a\ud800",
    "far characters": "loss\u635f\u5931\U0001f600",
    "page": "<script>alert(1)</script>",
}


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.slow
def test_whatever_runs_and_metrics_are_called_the_page_shows_them_as_they_are(tmp_path, kind):
    folder, name = tmp_path / "run $\\alpha{$ x", NAMES[kind]
    folder.mkdir()
    for each in RECORDS:
        found = replace(each, annealed={name: each.annealed["val_loss"]}, run=each.run + name)
        values = replace(each.matched, live={name: 2.25}, merged={name: 2.125})
        append_record(folder / "anneals.jsonl", replace(found, matched=values))
    if kind not in ("two lines", "half a character"):
        (folder / "metrics.csv").write_text(CSV.replace("val_loss", name), encoding="utf-8")
    run([str(folder)])
    content = (folder / "report.html").read_text(encoding="utf-8")
    assert content.count("data:image") >= 2 * 2
    assert "<script>" not in content
    assert escape(name.replace("\ud800", "?")) in content


@pytest.mark.slow
def test_lines_of_other_programs_in_the_folder_are_left_out_and_named(folder):
    (folder / "predictions.jsonl").write_text('{"id": 1, "text": "hello"}\n' * 3)
    found = find(folder)
    assert len(found.records) == len(RECORDS)
    assert "predictions.jsonl, line 1, is not a record of an anneal" in page(found)


@pytest.mark.slow
def test_of_several_versions_of_a_run_the_newest_is_shown(tmp_path):
    for number in (2, 10, 0):
        (tmp_path / f"version_{number}").mkdir()
        (tmp_path / f"version_{number}" / "metrics.csv").write_text(CSV.replace("74,,2.5", f"74,,{number}.5"))
    (tmp_path / "version_11").mkdir()
    assert find(tmp_path).validations[0].live == 10.5
    for number in ("nan", "inf"):
        (tmp_path / "version_11" / "metrics.csv").write_text(CSV.replace("74,,2.5", f"74,,{number}"))
        assert page(find(tmp_path)).count("data:image") == 2


def test_a_callback_with_a_name_is_reported_on_too(tmp_path):
    header = "step,val_loss,merged_pma/val_loss,merged_pma_late/val_loss,merge_gain_pma/val_loss,merge_pma/span_steps\n"
    (tmp_path / "metrics.csv").write_text(header + "9,2.5,2.25,2.4,0.25,8\n")
    found = find(tmp_path)
    assert found.metric == "val_loss"
    assert [(each.step, each.merged, each.gain, each.span_steps) for each in found.validations] == [(10, 2.25, 0.25, 8)]
