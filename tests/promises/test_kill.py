"""Runs that are really killed and started again end as the run that was not."""

import json
import os
import signal

import pytest
import torch

from tests.helpers.killable_run import Talk, main, terminated
from tests.helpers.toys import same
from tests.interrupts.run import NUM_INTERRUPTS, NUM_KILLS, PLACES, RECORD, interrupt, kill


def finish(folder):
    talk = Talk(main, folder)
    said = list(talk)
    assert talk.process.exitcode == 0, said
    return said, torch.load(folder / "end.pt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return finish(folder)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "arguments"),
    [("step 7", ()), ("merged 12 1", ()), ("live 16 0", ()), ("saving 14", (14,)), ("step 23", ())],
    ids=[
        "in a window",
        "in a merged validation",
        "in a live validation",
        "in the writing of a checkpoint",
        "at the end",
    ],
)
def test_a_run_that_was_killed_and_resumed_ends_as_the_one_that_was_not(tmp_path, uninterrupted, where, arguments):
    talk = Talk(main, tmp_path, *arguments)
    said = []
    for line in talk:
        said.append(line)
        if line == where:
            os.kill(talk.process.pid, signal.SIGKILL)
            break
    talk.process.join()
    assert talk.process.exitcode == -signal.SIGKILL
    assert said[-1] == where
    assert not (tmp_path / "end.pt").exists()
    # The last checkpoint is whole, also where the kill fell into the writing of the next.
    last_step = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert last_step == int(where.split()[1]) - (1 if where.startswith("saving") else 0)
    said, end = finish(tmp_path)
    assert f"step {last_step + 1}" in said
    assert f"step {last_step}" not in said
    for key in end:
        assert same(end[key], uninterrupted[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_merged_validation_leaves_live_weights(tmp_path, number):
    *_, first, ended, last = Talk(terminated, tmp_path, number)
    assert first == "terminated in the merge"
    assert ended.startswith("ended with")
    assert last == "live weights are back"


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_at_any_moment_leaves_nothing_under_a_wrong_step_and_a_kill_costs_nothing(
    tmp_path, uninterrupted, place
):
    (tmp_path / "interrupted").mkdir()
    (tmp_path / "killed").mkdir()
    # A seed that no record was made with.
    assert not interrupt(tmp_path / "interrupted", 1000, place)
    assert not kill(tmp_path / "killed", 1000, place, uninterrupted)


def test_the_record_of_many_signals_has_found_nothing():
    found = json.loads(RECORD.read_text())
    assert list(found) == list(PLACES)
    for of_place in found.values():
        assert (of_place["interrupts"], of_place["kills"]) == (NUM_INTERRUPTS, NUM_KILLS)
        assert of_place["wrong after interrupts"] == of_place["wrong after kills"] == []
