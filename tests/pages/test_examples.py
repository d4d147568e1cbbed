"""The examples of the docs run as they stand: plain Python, and LightningCLI by file, by name and with its help."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import run_program

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
CLI = ["cli.py", "fit"]


def example(*arguments, cwd):
    # A wide terminal, so that help texts are not broken where they are looked for.
    done = run_program(str(EXAMPLES / arguments[0]), *arguments[1:], cwd=cwd, environment={"COLUMNS": "400"})
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_plain_example_trains_and_exports(tmp_path):
    output = example("plain.py", cwd=tmp_path)
    live, merged = (float(line.split()[1]) for line in output.splitlines() if line.startswith(("live ", "merged ")))
    assert merged < live
    assert torch.load(tmp_path / "merged.ckpt", weights_only=True)["state_dict"].keys() == {"net.weight", "net.bias"}


@pytest.mark.slow
def test_lightning_cli_takes_the_callback_from_a_file_with_merges_that_are_objects(tmp_path):
    output = example(*CLI, "--config", str(EXAMPLES / "cli.yaml"), cwd=tmp_path)
    assert "sma, late, ema: up to" in output
    # What it saved of its own config is taken again, and overridden.
    (saved,) = tmp_path.rglob("config.yaml")
    output = example(*CLI, "--config", str(saved), "--trainer.max_epochs=1", cwd=tmp_path / "lightning_logs")
    assert "sma, late, ema: up to" in output


def made(class_name, **arguments):
    """An object as a config describes it."""
    return {"class_path": f"merge_callback.{class_name}", "init_args": arguments}


@pytest.mark.slow
def test_lightning_cli_takes_the_callback_by_its_name_on_the_command_line(tmp_path):
    callback = ["--trainer.callbacks+=MergeCallback", "--trainer.callbacks.num_snapshots=5"]
    merges = {"a": "wma", "b": made("Extrapolate", rule=made("Window", span_steps=9), gap=0.1)}
    parts = made("Parts", exclude=["*.bias"])
    objects = {"merges": merges, "storage": made("SnapshotDirectory", path="s"), "parts": parts}
    callback += [f"--trainer.callbacks.{name}={json.dumps(value)}" for name, value in objects.items()]
    output = example(*CLI, "--trainer.max_epochs=1", *callback, cwd=tmp_path)
    assert "up to 5 snapshots" in output
    assert "files in s," in output
    assert "without 1 parameters" in output
    assert "a, b: up to" in output
    assert (tmp_path / "s").is_dir()


@pytest.mark.slow
def test_lightning_cli_explains_every_argument_from_its_docstring(tmp_path):
    output = example(*CLI, "--trainer.callbacks.help=MergeCallback", cwd=tmp_path)
    assert "Optimizer steps between two snapshots; with several optimizers a step is one round of them." in output
    assert "Capacity of the ring of snapshots." in output
