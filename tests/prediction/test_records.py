"""Records of anneals: written by many at once, read while they grow, completed by the trunk."""

import json
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

import pytest

from merge_callback.prediction.records import (
    AnnealRecord,
    RecordsFile,
    StableValidation,
    append_record,
    completed,
    read_records,
    records_and_problems,
    run_identity,
    validation_at,
)


def record(start=90, step=100, run="a", shape="linear", **more):
    return AnnealRecord(run, start, step, step - start, shape, {"val_loss": 1.25}, **more)


def values(step, live=1.5, merged=1.375, span_steps=10):
    return StableValidation(step, span_steps, {"val_loss": live}, {"val_loss": merged}, "sma")


def append_many(path, writer):
    for index in range(200):
        append_record(path, record(run=f"{writer}", start=index, step=index + 10))


def test_concurrent_writers_lose_nothing(tmp_path):
    path = tmp_path / "anneals.jsonl"
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(append_many, [path] * 4, range(4)))
    found = read_records(path)
    assert {r.identity for r in found} == {(str(w), i, i + 10, "linear") for w in range(4) for i in range(200)}
    # A writer that looks while another one writes may begin a new line too many.
    assert sum(bool(line) for line in path.read_text().splitlines()) == 800


def test_what_is_written_is_read(tmp_path):
    whole = record(forecast=values(90), matched=values(100))
    append_record(tmp_path / "new" / "anneals.jsonl", whole)
    append_record(tmp_path / "new" / "anneals.jsonl", record(step=110))
    assert read_records(tmp_path / "new" / "anneals.jsonl") == [whole, record(step=110)]


def test_a_line_says_what_a_record_is(tmp_path):
    append_record(tmp_path / "anneals.jsonl", record(matched=values(100)))
    line = json.loads((tmp_path / "anneals.jsonl").read_text())
    assert (line["run"], line["start_step"], line["step"], line["span_steps"]) == ("a", 90, 100, 10)
    assert (line["shape"], line["annealed"], line["forecast"]) == ("linear", {"val_loss": 1.25}, None)
    assert (line["matched"]["live"], line["matched"]["merged"]) == ({"val_loss": 1.5}, {"val_loss": 1.375})


def test_of_two_records_of_a_branch_the_later_counts(tmp_path):
    append_record(tmp_path / "anneals.jsonl", record())
    append_record(tmp_path / "anneals.jsonl", record(shape="cosine"))
    append_record(tmp_path / "anneals.jsonl", record(matched=values(100)))
    assert read_records(tmp_path / "anneals.jsonl") == [record(matched=values(100)), record(shape="cosine")]


def test_no_file_holds_no_records_and_half_a_line_waits(tmp_path):
    path = tmp_path / "anneals.jsonl"
    assert read_records(path) == []
    append_record(path, record())
    whole = path.read_text()
    path.write_text(whole + "\n" + whole[:20])
    assert read_records(path) == [record()]


def test_a_writer_that_died_in_its_line_costs_no_later_record(tmp_path):
    path = tmp_path / "anneals.jsonl"
    append_record(path, record())
    path.write_text(path.read_text() + '{"run": "b", "sta')
    append_record(path, record(step=110))
    assert read_records(path) == [record(), record(step=110)]


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"run": "a"}', '{"forecast": null, "matched": null, "other": 1}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "anneals.jsonl"
    append_record(path, record())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"anneals.jsonl, line 2, is not a record of an anneal"):
        read_records(path)


def test_what_cannot_be_written_is_in_the_error(tmp_path):
    with pytest.raises(OSError, match=r'was not added to .*Record: {"run": "a"'):
        append_record(tmp_path, record())


def test_the_trunk_at_a_step_is_its_validation_or_lies_between_two():
    history = [values(80, 2.0, 1.0, 8), values(100, 3.0, 2.0, 10), values(200, 4.0, 3.0, 20)]
    assert validation_at(history, 100, 0) == history[1]
    assert validation_at(history, 85, 20) == StableValidation(85, 8, {"val_loss": 2.25}, {"val_loss": 1.25}, "sma")
    for step, max_gap_steps in ((85, 19), (150, 50), (70, 100), (210, 100)):
        assert validation_at(history, step, max_gap_steps) is None
    assert validation_at([], 100, 100) is None


def test_a_record_is_completed_with_what_the_trunk_knows():
    history = [values(90), values(98), values(102)]
    whole = completed(record(), history)
    assert (whole.forecast, whole.matched) == (values(90), values(100))
    assert completed(record(), history[:2]).matched is None
    assert completed(record(matched=values(100, 9.0)), history).matched == values(100, 9.0)


def test_a_run_is_known_by_its_first_validation():
    assert run_identity([]) is None
    assert run_identity([values(10)]) == run_identity([values(10), values(20)])
    assert run_identity([values(10)]) != run_identity([values(10, live=1.5000000000000002)])


GOOD = asdict(record(matched=values(100), forecast=values(90)))
# What another program may write in a line that is JSON, and what is said of it.
ODD = {
    "no object": ("3", "the line must be an object, got 3"),
    "null": ("null", "the line must be an object, got None"),
    "step zero": (GOOD | {"start_step": 0, "step": 0}, "cannot go from start_step=0 to step=0"),
    "a step before the start": (GOOD | {"step": 80}, "cannot go from start_step=90 to step=80"),
    "a negative step": (GOOD | {"start_step": -1}, "cannot go from start_step=-1"),
    "no steps of decay": (GOOD | {"span_steps": 0}, "a decay over span_steps=0 steps"),
    "text for a number": (GOOD | {"step": "100"}, "step must be a whole number, got '100'"),
    "text for a value": (GOOD | {"annealed": {"a": "low"}}, r"annealed\['a'\] must be a number, got 'low'"),
    "a truth for a number": (GOOD | {"span_steps": True}, "span_steps must be a whole number, got True"),
    "half a step": (GOOD | {"step": 100.5}, "step must be a whole number, got 100.5"),
    "null for a number": (GOOD | {"step": None}, "step must be a whole number, got None"),
    "a list of values": (GOOD | {"annealed": [1.0]}, r"annealed must be an object, got \[1.0\]"),
    "a huge whole number": (GOOD | {"annealed": {"val_loss": 10**400}}, "int too large to convert to float"),
    "more steps than there are": (GOOD | {"step": 10**400}, "step is larger than any number of steps"),
    "a longer decay than there is": (GOOD | {"span_steps": 10**400}, "span_steps is larger than any number of steps"),
    "a number for a text": (GOOD | {"run": 3}, "run must be a text, got 3"),
    "text for the trunk": (GOOD | {"matched": "later"}, "matched must be an object, got 'later'"),
    "half a trunk": (GOOD | {"matched": {"step": 100}}, "it has no 'span_steps'"),
    "nested deeply": ("[" * 100_000 + "]" * 100_000, "recursion"),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_line_is_named_with_what_is_wrong_and_the_others_count(tmp_path, kind):
    line, problem = ODD[kind]
    path = tmp_path / "anneals.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{json.dumps(GOOD)}\n{text}\n{json.dumps(GOOD | {'shape': 'cosine'})}\n")
    found, problems = records_and_problems(path)
    assert [each.shape for each in found] == ["linear", "cosine"]
    assert len(problems) == 1
    assert re.search(rf"anneals.jsonl, line 2, is not a record of an anneal: .*{problem}", problems[0])


def test_what_is_unknown_or_no_number_in_a_line_costs_only_that_metric(tmp_path):
    path = tmp_path / "anneals.jsonl"
    nulls = {"annealed": {"val_loss": None, "other": 1.0}, "matched": GOOD["matched"] | {"merged": {"other": 1.0}}}
    lines = [
        GOOD | nulls,
        GOOD | {"shape": "cosine", "annealed": {"val_loss": float("nan")}, "written_by": "a later version"},
        GOOD | {"shape": "1-sqrt", "annealed": {"val_loss": 1e308}, "run": "a\u2028b"},
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    first, second, third = read_records(path)
    assert first.outcome("val_loss") is first.outcome("other") is None
    assert not second.outcome("val_loss").is_finite
    assert not third.outcome("val_loss").is_finite
    assert third.run == "a\u2028b"


def test_a_file_that_is_no_text_holds_no_records(tmp_path):
    path = tmp_path / "anneals.jsonl"
    path.write_bytes(bytes(range(256)) * 10 + b"\n")
    with pytest.raises(ValueError, match=r"anneals.jsonl, line 1, is not a record of an anneal"):
        read_records(path)


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path):
    path = tmp_path / "anneals.jsonl"
    file = RecordsFile(path)
    assert file.read() == ([], [])
    append_record(path, record())
    assert file.read()[0] == [record()]
    # The same objects: nothing was read.
    assert file.read()[0] is file.read()[0]
    kept = file.read()[0]
    append_record(path, record(step=110))
    assert file.read()[0] == [record(), record(step=110)]
    assert file.read()[0] is not kept
    # Another file of the same length takes its place.
    other = tmp_path / "other.jsonl"
    other.write_text(path.read_text().replace('"a"', '"b"'))
    other.rename(path)
    assert [each.run for each in file.read()[0]] == ["b", "b"]
    path.unlink()
    assert file.read() == ([], [])
