"""A grid of merges of stored checkpoints: which ones there are, what they are worth, and that none is run twice."""

import csv
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F
from torchmetrics import MinMetric

import merge_callback
from merge_callback import MergeCallback
from merge_callback.apps.grid import LIVE, Cell, CellFile, Grid
from merge_callback.apps.sweep import heat_maps, sweep_table
from merge_callback.apps.sweep import run as run_command
from merge_callback.merging.rules import sma, wma
from tests.helpers.toys import Toy, batches, fit, make

GRID = Path(merge_callback.__file__).parent / "apps" / "commands" / "groups" / "sweep" / "grid.yaml"
SILENT = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class WideToy(Toy):
    """Another model."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(7, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint at every snapshot of its callback, and the callback."""
    folder = tmp_path_factory.mktemp("run")
    callback = MergeCallback(4, 5, merges={"sma": "sma", "wma": "wma"})
    checkpoints = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=4, save_top_k=-1)
    fit(make(Toy), folder, callback, checkpoints, max_steps=24, enable_checkpointing=True)
    return callback, folder / "checkpoints"


def config(run, output, **changes):
    sweep = OmegaConf.to_container(OmegaConf.load(GRID))
    sweep |= {"checkpoints": f"{run[1]}/*.ckpt", "output": str(output)}
    sweep |= {"rules": ["sma", "wma"], "num_snapshots": [3, 5], "every": [1]}
    toy = {"_target_": "hydra.utils.get_class", "path": "tests.helpers.toys.Toy"}
    return OmegaConf.create(
        {
            "model": {"_target_": "tests.helpers.toys.make", "toy_class": toy},
            "data": {"_target_": "tests.helpers.toys.batches", "shuffle": False},
            "trainer": {"_target_": "lightning.pytorch.Trainer", "enable_model_summary": False},
            "callbacks": {"left_out": {"_target_": "no.such.Callback"}},
            "sweep": sweep | changes,
        }
    )


def sweep(run, output, **changes):
    run_command(config(run, output, **changes))
    with (output / "cells.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_grid_is_every_combination_that_there_are_checkpoints_for():
    grid = Grid({"sma": sma}, num_snapshots=[2, 3], every=[1, 2], span_steps=[None, 25], ends=[None, 40])
    assert grid.cells([10, 20, 30, 40, 50, 60]) == [
        Cell(60, LIVE, 1, 1, None, (60,)),
        Cell(60, "sma", 2, 1, None, (50, 60)),
        Cell(60, "sma", 2, 2, None, (40, 60)),
        Cell(60, "sma", 3, 1, None, (40, 50, 60)),
        Cell(60, "sma", 3, 2, None, (20, 40, 60)),
        Cell(40, LIVE, 1, 1, None, (40,)),
        Cell(40, "sma", 2, 1, None, (30, 40)),
        Cell(40, "sma", 2, 2, None, (20, 40)),
        # Three of them would be those of every second step within the span, or one that there is no checkpoint for.
        Cell(40, "sma", 3, 1, None, (20, 30, 40)),
    ]


def test_a_span_takes_what_lies_in_it():
    cells = Grid({"sma": sma, "wma": wma}, num_snapshots=[10], span_steps=[15, 25]).cells([10, 20, 30, 40, 50, 60])
    assert [cell.steps for cell in cells if cell.rule == "wma"] == [(50, 60), (40, 50, 60)]


@pytest.mark.slow
def test_values_are_those_of_the_validation_of_the_live_callbacks_merge(run, tmp_path):
    callback, _ = run
    rows = sweep(run, tmp_path)
    assert [(row["rule"], row["steps"]) for row in rows] == [
        ("live", "24"),
        ("sma", "16 20 24"),
        ("sma", "8 12 16 20 24"),
        ("wma", "16 20 24"),
        ("wma", "8 12 16 20 24"),
    ]
    model = make(Toy)
    for row in rows:
        if row["num_snapshots"] == "5":
            model.load_state_dict(callback.merged_state_dict(row["rule"]))
            (expected,) = Trainer(**SILENT).validate(model, batches(shuffle=False), verbose=False)
            assert {name: float(row[name]) for name in expected} == expected


def test_merges_that_are_in_the_file_are_not_validated_again(run, tmp_path, capsys):
    before = sweep(run, tmp_path)
    lines = (tmp_path / "cells.csv").read_text().splitlines()
    # One is missing, as after an interruption; the others have a value that no validation gives.
    changed = [line.replace(before[place]["val_loss"], "99.0") for place, line in enumerate(lines[1:4])]
    (tmp_path / "cells.csv").write_text("\n".join([lines[0], *changed]) + "\n")
    capsys.readouterr()
    after = sweep(run, tmp_path, num_snapshots=[3])
    assert "3 merges, of which 2 are there already" in capsys.readouterr().out
    assert [row["val_loss"] for row in after] == ["99.0"] * 3 + [before[3]["val_loss"]]


class BestSoFar(Toy):
    """Remembers the best validation, and logs it under a name of its choice."""

    def __init__(self, name="val_best"):
        super().__init__()
        self.best, self.name = MinMetric(), name

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.best.update(F.cross_entropy(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self):
        self.log(self.name, self.best.compute())


def test_a_merge_is_worth_the_same_whatever_was_validated_before(run, tmp_path):
    def best_so_far(output, **changes):
        asked = config(run, output, **changes)
        asked.model.toy_class.path = "tests.apps.test_sweep.BestSoFar"
        run_command(asked)
        with (output / "cells.csv").open() as file:
            return {row["steps"] + row["rule"]: row["val_best"] for row in csv.DictReader(file)}

    whole = best_so_far(tmp_path / "whole")
    alone = best_so_far(tmp_path / "alone", rules=["wma"], num_snapshots=[3])
    assert alone == {key: whole[key] for key in alone}
    assert len(set(whole.values())) > 2


def test_a_metric_that_is_called_as_a_column_is_and_one_that_is_mistyped_are_refused_at_once(run, tmp_path, capsys):
    asked = config(run, tmp_path)
    asked.model.toy_class.path = "tests.apps.test_sweep.BestSoFar"
    asked.model.name = "steps"
    with pytest.raises(SystemExit, match=r"the validation logs 'steps', which is a column of .*cells.csv; rename"):
        run_command(asked)
    with pytest.raises(SystemExit, match="logs no 'val_los'"):
        run_command(config(run, tmp_path, metric="val_los"))
    assert not (tmp_path / "cells.csv").exists()


def test_values_that_lack_the_metric_are_validated_again(run, tmp_path, capsys):
    sweep(run, tmp_path, num_snapshots=[3], rules=["sma"])
    lines = (tmp_path / "cells.csv").read_text().replace("val_accuracy", "other")
    (tmp_path / "cells.csv").write_text(lines)
    capsys.readouterr()
    rows = sweep(run, tmp_path, num_snapshots=[3], rules=["sma"], metric="val_accuracy")
    assert "2 merges, of which 0 are there already" in capsys.readouterr().out
    assert [bool(row["val_accuracy"]) for row in rows] == [False, False, True, True]


def test_two_sweeps_may_share_a_file(tmp_path):
    cells = Grid({"sma": sma}, num_snapshots=[2, 3, 4]).cells([1, 2, 3, 4])
    one, other = (CellFile(tmp_path / "cells.csv", lambda cell: "same") for _ in range(2))
    one.add(cells[0], {"loss": 1.0})
    other.add(cells[1], {"loss": 2.0})
    one.add(cells[2], {"loss": 3.0})
    fresh = CellFile(tmp_path / "cells.csv", lambda cell: "same")
    assert [fresh[cell] for cell in cells] == [{"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0}, {}]


def test_a_rule_that_is_called_like_a_formula_is_text_in_the_file_and_found_again(tmp_path):
    cell = Cell(3, "=cmd", 2, 1, None, (2, 3))
    CellFile(tmp_path / "cells.csv", lambda cell: "same").add(cell, {"val_loss": -0.5})
    assert (tmp_path / "cells.csv").read_text().splitlines()[1] == "3,'=cmd,2,1,,2 3,same,-0.5"
    assert CellFile(tmp_path / "cells.csv", lambda cell: "same")[cell] == {"val_loss": -0.5}


def test_nan_is_never_the_best():
    cells = Grid({"sma": sma}, num_snapshots=[2, 3]).cells([10, 20, 30])
    values = dict(zip(cells, [0.5, math.nan, 0.25], strict=True))
    rows = [line.split() for line in sweep_table(values, "loss", "min").splitlines()[3:]]
    assert [row[0] for row in rows] == ["sma", "live", "sma"]
    assert "nan" in rows[-1]


@pytest.mark.slow
def test_tensors_that_differ_and_cannot_be_averaged_are_taken_from_the_newest_where_asked(run, tmp_path):
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in run[1].glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=False)
        checkpoint["state_dict"]["position_ids"] += checkpoint["global_step"]
        torch.save(checkpoint, copies / path.name)
    with pytest.raises(SystemExit, match=r"position_ids is torch.int64.*newest=\[position_ids\] takes the newest one"):
        sweep((run[0], copies), tmp_path)
    newest = ["*running*", "*num_batches_tracked", "position_ids"]
    rows = sweep((run[0], copies), tmp_path, newest=newest)
    assert len([row for row in rows if row["rule"] != "live"]) == 4
    # One pattern is one, and not its letters, of which the star would take everything.
    one = sweep((run[0], copies), tmp_path / "one", newest="*_*")
    assert [float(row["val_loss"]) for row in one] == [float(row["val_loss"]) for row in rows[-5:]]


def test_a_changed_checkpoint_or_config_is_validated_again(run, tmp_path):
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in run[1].glob("*.ckpt"):
        (copies / path.name).write_bytes(path.read_bytes())
    first = sweep((run[0], copies), tmp_path, num_snapshots=[3], rules=["sma"])
    assert len(first) == 2
    checkpoint = torch.load(copies / "step=16.ckpt", weights_only=False)
    # Of one class alone: a softmax does not see what is added to all of them.
    checkpoint["state_dict"]["out.bias"][0] += 1
    torch.save(checkpoint, copies / "step=16.ckpt")
    second = sweep((run[0], copies), tmp_path, num_snapshots=[3], rules=["sma"])
    assert second[:2] == first
    assert [row["steps"] for row in second[2:]] == ["16 20 24"]
    assert second[2]["val_loss"] != first[1]["val_loss"]
    other = config((run[0], copies), tmp_path, num_snapshots=[3], rules=["sma"])
    other.trainer.limit_val_batches = 2
    run_command(other)
    with (tmp_path / "cells.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5


def test_the_table_begins_with_the_best_and_the_map_shows_each_value(run, tmp_path, capsys):
    sweep(run, tmp_path)
    printed = capsys.readouterr().out
    assert (tmp_path / "val_loss-24.png").exists()
    assert f"Picture: {tmp_path / 'val_loss-24.png'}" in printed
    cells = Grid({"sma": sma}, num_snapshots=[2, 3]).cells([10, 20, 30])
    values = dict(zip(cells, [0.5, 0.75, 0.25], strict=True))
    rows = [line.split() for line in sweep_table(values, "accuracy", "max").splitlines()[3:]]
    assert [row[0] for row in rows] == ["sma", "live", "sma"]
    assert [row[-1] for row in rows] == ["+0.2500", "-", "-0.2500"]
    figure = heat_maps(values, "accuracy")
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["0.25", "0.75"]
    assert "live 0.5000" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "least"}, r"sweep.mode must be 'min' or 'max', got 'least'"),
        ({"metric": "loss"}, r"logs no 'loss', which sweep.metric names; it logs val_loss, val_accuracy"),
        ({"ends": [23]}, r"sweep.ends must be steps of checkpoints, got 23; there are \[4, 8, 12, 16, 20, 24\]"),
        ({"every": []}, r"sweep.every must list at least one value"),
        ({"num_snapshots": [0]}, r"sweep.num_snapshots must be >= 1, got 0"),
        ({"span_steps": [0]}, r"sweep.span_steps must be >= 1, got 0"),
        ({"rules": ["smaa"]}, r"unknown merge rule 'smaa'"),
        ({"rules": {"live": "sma"}}, r"no rule may be called 'live'"),
        ({"rules": {"e": {"_target_": "merge_callback.Ema", "half_life_steps": 3}}}, r"got Ema\(half_life_steps=3"),
        ({"checkpoints": "nowhere/*.ckpt"}, r"there is no checkpoint nowhere/\*.ckpt"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(run, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        run_command(config(run, tmp_path, **changes))


def test_checkpoints_of_another_model_are_refused(run, tmp_path):
    other = config(run, tmp_path)
    other.model.toy_class.path = "tests.apps.test_sweep.WideToy"
    with pytest.raises(SystemExit, match=r"(?s)checkpoints are of another model than the config's.*out\.weight"):
        run_command(other)


def test_a_missing_extra_is_named_before_anything_is_validated(run, tmp_path, monkeypatch):
    monkeypatch.setattr("merge_callback.utilities.checks.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"matplotlib is not installed: pip install 'merge-callback\[dashboards\]'"):
        run_command(config(run, tmp_path))


def test_a_config_without_a_sweep_says_how_to_give_one():
    with pytest.raises(SystemExit, match=r"no entry 'sweep'; give \+sweep=grid"):
        run_command(OmegaConf.create({}))
