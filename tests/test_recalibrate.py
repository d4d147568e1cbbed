"""Batch norm statistics of the merge from the latest training batches, with nothing left behind."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from merge_callback import Ema, MergeCallback
from merge_callback.recalibrate import RecentBatches
from tests.toys import ResumableBatches, Toy, assert_same_training, batches, fit, make, same

STATISTICS = ("norm.running_mean", "norm.running_var")


def seeded():
    module = make(Toy)
    module.dropout.p = 0.0
    return module


def test_statistics_are_those_that_torch_calculates_from_the_same_batches(tmp_path):
    callback = MergeCallback(3, 4, merges={"sma": "sma", "ema": Ema(half_life_steps=3)}, recalibrate_batches=3)
    train = ResumableBatches()
    run = fit(seeded(), tmp_path, callback, train=train)
    latest = [x for x, _ in train.batches[21:24]]
    plain = MergeCallback(3, 4)
    fit(seeded(), tmp_path / "plain", plain, train=ResumableBatches())
    for merge in ("sma", "ema"):
        merged = callback.merged_state_dict(merge)
        expected = seeded()
        expected.load_state_dict(merged)
        update_bn(latest, expected)
        for name in STATISTICS:
            torch.testing.assert_close(merged[name], expected.state_dict()[name])
            assert not torch.equal(merged[name], plain.merged_state_dict()[name])
    merged = callback.merged_state_dict()
    assert all(torch.equal(merged[n], plain.merged_state_dict()[n]) for n in merged if n not in STATISTICS)
    # What was validated is what is exported.
    fresh = seeded()
    fresh.load_state_dict(merged)
    (values,) = run.trainer.validate(fresh, batches(24, 8, shuffle=False, seed=1), verbose=False)
    assert run.logged("merged/val_loss")[-1][1] == pytest.approx(values["val_loss"], abs=1e-6)


class Counting(Toy):
    """A training step that draws, counts, logs in two ways and changes a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("num_seen", torch.zeros(()))
        self.steps = []

    def training_step(self, batch, batch_idx):
        self.num_seen += 1
        self.steps.append(batch_idx)
        self.log_dict({"noise": torch.rand(())})
        return super().training_step(batch, batch_idx)


@pytest.mark.usefixtures("both_lightnings")
@pytest.mark.parametrize("arguments", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}])
def test_training_is_bit_identical_whatever_the_training_step_does(tmp_path, arguments):
    without = fit(make(Counting), tmp_path / "without", **arguments)
    callback = MergeCallback(2, 4, recalibrate_batches=3)
    watched = fit(make(Counting), tmp_path / "with", callback, **arguments)
    assert watched.logged("merged/val_loss")
    assert_same_training(without, watched)
    assert without.module.steps == watched.module.steps
    assert torch.equal(without.module.num_seen, watched.module.num_seen)
    before = {name: tensor.clone() for name, tensor in watched.module.state_dict().items()}
    modes = [module.training for module in watched.module.modules()]
    callback.merged_state_dict()
    assert same(dict(watched.module.state_dict()), before)
    assert [module.training for module in watched.module.modules()] == modes
    assert watched.module.norm.momentum == 0.1
    assert not {"log", "log_dict"} & vars(watched.module).keys()


def test_a_resumed_run_recalibrates_from_the_batches_of_the_one_that_was_interrupted(tmp_path):
    whole = MergeCallback(2, 4, recalibrate_batches=5)
    uninterrupted = fit(seeded(), tmp_path / "whole", whole, train=ResumableBatches())
    first = fit(
        seeded(), tmp_path / "first", MergeCallback(2, 4, recalibrate_batches=5), train=ResumableBatches(), max_steps=14
    )
    path = str(tmp_path / "at-14.ckpt")
    first.trainer.save_checkpoint(path)
    second = MergeCallback(2, 4, recalibrate_batches=5)
    resumed = fit(seeded(), tmp_path / "second", second, train=ResumableBatches(), ckpt_path=path)
    assert resumed.logged("merged/val_loss") == uninterrupted.logged("merged/val_loss")[3:]
    assert same(second.merged_state_dict(), whole.merged_state_dict())


def test_batches_that_a_safe_load_would_refuse_stay_out_of_checkpoints():
    class Batch(dict):
        """A class of the user's."""

    recent = RecentBatches(2)
    recent.append({"x": [torch.ones(2), ("text", 3, None)]})
    state = recent.state_dict()
    assert state == [{"x": [state[0]["x"][0], ("text", 3, None)]}]
    recent.append(Batch(x=torch.ones(2)))
    assert recent.state_dict() is None


def test_batches_are_copies():
    recent, batch = RecentBatches(2), torch.ones(2)
    recent.append(batch)
    batch.zero_()
    assert torch.equal(next(iter(recent)), torch.ones(2))


class Plain(Toy):
    """Without batch norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()


def test_models_for_which_it_makes_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="recalibrate_batches is for batch norm layers, of which Plain has none"):
        fit(make(Plain), tmp_path, MergeCallback(recalibrate_batches=3))
    manual = make(Toy)
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="not possible with manual optimization"):
        fit(manual, tmp_path, MergeCallback(recalibrate_batches=3))
    with pytest.raises(ValueError, match="recalibrate_batches must be >= 1, got 0"):
        MergeCallback(recalibrate_batches=0)
