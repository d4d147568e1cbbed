"""Numbers in README and docs are those of the records, and links, promises and the map name what is there."""

import json
import re
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text()


@pytest.fixture(autouse=True)
def modules_of_benchmarks_are_their_own(monkeypatch):
    """Each folder of `benchmarks/` has a protocol.py, which its scripts import by that name."""
    for name in ("protocol", "report", "trainings", "trunks", "fit", "shared"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)


def test_the_table_is_the_one_made_from_the_records():
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "demo" / "run.py"))
    begin, end = benchmark["MARKS"]
    assert README.split(begin)[1].split(end)[0].strip() == benchmark["table"]()
    assert len(benchmark["records"]()) == 3


def test_the_table_of_anneals_and_the_prior_are_those_of_the_records():
    report = runpy.run_path(str(ROOT / "benchmarks" / "annealing" / "report.py"))
    benchmark = report["Benchmark"]()
    begin, end = report["MARKS"]
    assert EVIDENCE.split(begin)[1].split(end)[0].strip() == report["evidence_table"](benchmark)
    assert README.split(begin)[1].split(end)[0].strip() == report["readme_table"]()
    assert len(benchmark.trunks) >= 4
    prior = json.loads((ROOT / "src" / "merge_callback" / "prediction" / "prior.json").read_text())
    assert prior == json.loads(json.dumps(report["prior"]()))


@pytest.mark.slow
def test_the_forecasts_and_their_numbers_are_those_of_the_records():
    folder = ROOT / "benchmarks" / "forecast"
    report, fit = (runpy.run_path(str(folder / name)) for name in ("report.py", "fit.py"))
    numbers = json.loads((ROOT / "src" / "merge_callback" / "prediction" / "river.json").read_text())
    assert numbers == json.loads(json.dumps(asdict(fit["fit"]())))
    known = report["all_outcomes"]()
    assert len(known) > 100
    assert (folder / "REPORT.md").read_text() == report["page"](known) + "\n"
    begin, end = runpy.run_path(str(ROOT / "benchmarks" / "shared.py"))["marks"]("forecast")
    for page in (README, (ROOT / "docs" / "predicting.md").read_text()):
        assert page.split(begin)[1].split(end)[0].strip() == report["rule_table"](known)


def test_the_overhead_report_and_the_plan_of_a_large_run_are_those_of_the_records(monkeypatch):
    folder = ROOT / "benchmarks" / "overhead"
    monkeypatch.syspath_prepend(str(folder))
    report, plan = (runpy.run_path(str(folder / name)) for name in ("report.py", "plan.py"))
    assert plan["PAGE"].read_text() == plan["page"]()
    assert len(report["MARKS"]) == 2
    for source, (begin, end) in report["MARKS"].items():
        records, output = report["read_records"](source), folder if source == folder / "records" else source
        assert output.joinpath("REPORT.md").read_text() == report["page"](records, output)
        assert EVIDENCE.split(begin)[1].split(end)[0].strip() == report["evidence_table"](records)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "page"), [("starts", "offline"), ("recovery", "recovery"), ("experts", "experts")])
def test_reports_and_the_tables_in_the_docs_are_those_of_the_records(monkeypatch, name, page):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / name / "run.py"))
    assert benchmark["FOLDER"].joinpath("REPORT.md").read_text() == benchmark["page"]()
    begin, end = runpy.run_path(str(ROOT / "benchmarks" / "shared.py"))["marks"](name)
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert text.split(begin)[1].split(end)[0].strip() == benchmark["table"]()


def test_the_pictures_of_the_landscape_come_from_records_that_are_there():
    for kind in ("plane", "line"):
        record = json.loads((ROOT / "benchmarks" / "landscape" / "records" / f"{kind}.json").read_text())
        assert record["metric"] == "val_loss"
        assert (ROOT / "docs" / "pictures" / f"landscape_{kind}.png").exists()


def test_every_relative_link_leads_somewhere():
    pages = [str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")]
    for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", *pages):
        # In code, brackets are no links.
        text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
            assert ((ROOT / name).parent / target).exists(), (name, target)


def test_every_promise_names_tests_that_are_there_and_every_fault_was_caught():
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    promised = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "promises.md").read_text())
    assert len(promised) > 20
    for name in promised:
        assert f"def {name}(" in tests, name
    record = json.loads((ROOT / "tests" / "faults" / "record.json").read_text())
    faults = runpy.run_path(str(ROOT / "tests" / "faults" / "faults.py"))["FAULTS"]
    assert [fault["fault"] for fault in record["faults"]] == [fault[0] for fault in faults]
    assert all(fault["caught"] for fault in record["faults"])


def test_the_table_of_versions_is_that_of_the_record():
    made = runpy.run_path(str(ROOT / "benchmarks" / "versions" / "run.py"))
    record = json.loads((ROOT / "benchmarks" / "records" / "versions.json").read_text())
    begin, end = runpy.run_path(str(ROOT / "benchmarks" / "shared.py"))["marks"]("versions")
    assert README.split(begin)[1].split(end)[0].strip() == made["table"](record)
    lowest = next(iter(record.values()))
    assert lowest["torch"].startswith("2.7.")
    assert lowest["passed"] > 1000
