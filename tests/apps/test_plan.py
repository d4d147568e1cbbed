"""`merge-callback plan`, on checkpoints of runs and on what is none."""

import re

import pytest
from lightning.pytorch import Callback

from merge_callback import AnnealBranch, Ema, MergeCallback
from merge_callback.apps.plan import run
from merge_callback.apps.wrong_call import WrongCallError
from tests.helpers.toys import ResumableBatches, fit, make
from tests.prediction.test_forecasts import RING, SHORT, Valley, in_valley


class Saving(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_validation_end(self, trainer, pl_module):
        if trainer.global_step in (380, 400):
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    in_valley(folder, MergeCallback(10, 10, merges=RING, higher_is_better=["accuracy"]), Saving(folder))
    return folder


def test_it_compares_decays_of_a_run(folder, tmp_path, capsys):
    picture = tmp_path / "decays.png"
    run(
        [
            str(folder),
            "--budget",
            "100",
            "--shapes",
            "linear",
            "1-sqrt",
            "--spans",
            "0.1",
            "0.2",
            "--output",
            str(picture),
        ]
    )
    said = capsys.readouterr().out
    # The newest checkpoint in the folder, and decays that begin now or end with the budget.
    assert said.startswith("At step 400: live ")
    rows = re.findall(r"^(linear|1-sqrt) +(\d+)% +(\d+) +(\d+) ", said, re.M)
    assert {tuple(row) for row in rows} == {
        (shape, *numbers)
        for shape in ("linear", "1-sqrt")
        for numbers in (("10", "400", "444"), ("20", "400", "500"), ("10", "450", "500"))
    }
    assert "Lowest: " in said
    assert "1000 more steps at the constant rate are beyond what can be foretold" in said
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_records_of_the_run_shift_its_forecasts(folder, tmp_path, capsys):
    records = tmp_path / "anneals.jsonl"
    branch = AnnealBranch(42, record=records)
    options = {"max_steps": -1, "max_epochs": -1, "ckpt_path": folder / "380.ckpt", **SHORT}
    fit(make(Valley), tmp_path, MergeCallback(10, 10, merges=RING), branch, train=ResumableBatches(20), **options)
    arguments = [
        str(folder / "400.ckpt"),
        "--spans",
        "0.1",
        "--shapes",
        "linear",
        "--output",
        str(tmp_path / "plan.png"),
    ]
    run(arguments)
    plain = capsys.readouterr().out
    run([*arguments, "--records", str(records)])
    assert capsys.readouterr().out != plain
    with pytest.raises(WrongCallError, match="does not exist"):
        run([*arguments, "--records", str(tmp_path / "mistyped.jsonl")])


@pytest.mark.slow
def test_what_cannot_be_read_or_told_is_named(folder, tmp_path):
    (tmp_path / "broken.ckpt").write_bytes(b"no checkpoint")
    in_valley(tmp_path, MergeCallback(merges={"e": Ema(half_life_steps=5)}), Saving(tmp_path / "ema"), max_steps=400)
    for arguments, message in (
        ([str(tmp_path / "none")], "does not exist; give a checkpoint of a run"),
        ([str(tmp_path / "broken.ckpt")], "broken.ckpt is no checkpoint that can be read"),
        ([str(tmp_path / "lightning_logs")], "holds no validation of a merge at a constant rate"),
        (
            [str(folder), "--metric", "speed"],
            "--metric 'speed' is not logged with a merge; there are: val_loss, accuracy",
        ),
        ([str(folder), "--spans", "1.5"], r"--spans must be shares of the steps in (0, 1), got 1.5"),
        ([str(folder), "--budget", "0"], "--budget must be a number of steps, got 0"),
        ([str(folder), "--budget", "5"], "--budget 5 is shorter than every decay; give smaller --spans"),
        ([str(tmp_path / "ema")], "an average over every step"),
    ):
        with pytest.raises(WrongCallError) as error:
            run(arguments)
        assert message in str(error.value)
