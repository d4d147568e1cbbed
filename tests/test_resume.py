"""Interrupted equals uninterrupted, bit for bit."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from merge_callback import MergeCallback, Window
from tests.toys import ResumableBatches, Toy, assert_same_training, fit, make, same

# Lightning's advice; these runs leave callbacks out on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
# What a validation takes in seconds is nobody's to repeat.
TIMES = {"merge/seconds"}


def merging(**arguments):
    merges = {"late": Window(span=0.4), "sma": "sma"}
    return MergeCallback(num_snapshots=4, merges=merges, evaluate_every_n_validations=2, **arguments)


def seeded(**arguments):
    module = make(Toy, **arguments)
    # Lightning's checkpoints hold no random states.
    module.dropout.p = 0.0
    return module


@pytest.mark.parametrize("every", [None, 3])
def test_a_run_resumed_from_any_of_its_checkpoints_equals_the_one_that_went_on(tmp_path, every):
    whole = merging(every_n_train_steps=every)
    checkpoints = ModelCheckpoint(
        tmp_path / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}", auto_insert_metric_name=False
    )
    validated = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, filename="{step}-validated")
    uninterrupted = fit(
        seeded(warmup_steps=3),
        tmp_path / "whole",
        whole,
        checkpoints,
        validated,
        train=ResumableBatches(),
        enable_checkpointing=True,
    )
    for name, stop in [*((str(stop), stop) for stop in (1, 3, 6, 7, 12, 13)), ("step=12-validated", 12)]:
        second = merging(every_n_train_steps=every)
        path = str(tmp_path / "checkpoints" / f"{name}.ckpt")
        resumed = fit(
            seeded(warmup_steps=3), tmp_path / f"from{name}", second, train=ResumableBatches(), ckpt_path=path
        )
        assert same(dict(resumed.module.state_dict()), dict(uninterrupted.module.state_dict()))
        assert second.snapshot_steps == whole.snapshot_steps
        for merge in ("late", "sma"):
            assert second.coefficients(merge) == whole.coefficients(merge)
            assert same(second.merged_state_dict(merge), whole.merged_state_dict(merge))
        # Lightning passes over a validation that was due at the very step of the checkpoint.
        later = {row["step"]: row for row in resumed.rows if row.get("val_loss")}
        rows = {row["step"]: row for row in uninterrupted.rows if row.get("val_loss")}
        assert set(later) == {step for step in rows if int(step) + 1 > stop}
        for step, row in later.items():
            assert {k: v for k, v in row.items() if v and k not in TIMES} == {
                k: v for k, v in rows[step].items() if v and k not in TIMES
            }, (name, step)


def test_a_checkpoint_loads_without_the_callback_and_gives_live_weights(tmp_path):
    stopped = fit(seeded(), tmp_path / "with", merging(), train=ResumableBatches(), max_steps=12)
    stopped.trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same(dict(content["state_dict"]), dict(stopped.module.state_dict()))
    path = str(tmp_path / "last.ckpt")
    without = fit(seeded(), tmp_path / "without", train=ResumableBatches(), ckpt_path=path, max_steps=20)
    with_it = fit(seeded(), tmp_path / "again", merging(), train=ResumableBatches(), ckpt_path=path, max_steps=20)
    assert_same_training(without, with_it)
