"""Runs that are really killed and started again end as the run that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.toys import same

ROOT = Path(__file__).parents[2]


def start(folder, *arguments):
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.killable_run", str(folder), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder):
    process = start(folder)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output, torch.load(folder / "end.pt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return finish(folder)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "arguments"),
    [("step 7", ()), ("merged 12 1", ()), ("live 16 0", ()), ("saving 14", ("14",)), ("step 23", ())],
    ids=[
        "in a window",
        "in a merged validation",
        "in a live validation",
        "in the writing of a checkpoint",
        "at the end",
    ],
)
def test_a_run_that_was_killed_and_resumed_ends_as_the_one_that_was_not(tmp_path, uninterrupted, where, arguments):
    process = start(tmp_path, *arguments)
    said = []
    for line in process.stdout:
        said.append(line.strip())
        if said[-1] == where:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert said[-1] == where
    assert not (tmp_path / "end.pt").exists()
    # The last checkpoint is whole, also where the kill fell into the writing of the next.
    last_step = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert last_step == int(where.split()[1]) - (1 if where.startswith("saving") else 0)
    output, end = finish(tmp_path)
    assert f"step {last_step + 1}" in output.splitlines()
    assert f"step {last_step}" not in output.splitlines()
    for key in end:
        assert same(end[key], uninterrupted[key]), key


TERMINATED = """
import os, signal, sys, torch
from pathlib import Path
from tests.helpers.killable_run import Talking
from tests.helpers.toys import fit, make, same
from merge_callback import MergeCallback

class Terminated(Talking):
    trained = None

    def on_train_batch_end(self, *args):
        self.trained = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.trained and not same(dict(self.state_dict()), self.trained):
            print("terminated in the merge", flush=True)
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))

# A shell that starts its jobs in the background has them ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
module = make(Terminated)
try:
    fit(module, Path(sys.argv[1]), MergeCallback(2, 3))
except BaseException as error:
    print("ended with", type(error).__name__)
assert same(dict(module.state_dict()), module.trained)
print("live weights are back")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_in_the_merged_validation_leaves_live_weights(tmp_path, name):
    command = [sys.executable, "-W", "ignore", "-c", TERMINATED, str(tmp_path), name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "terminated in the merge" in done.stdout, done.stderr
    assert "ended with" in done.stdout
    assert "live weights are back" in done.stdout, done.stderr
