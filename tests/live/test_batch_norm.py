"""Batch norm statistics of the merge from the latest training batches, with nothing left behind."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from merge_callback import Ema, MergeCallback
from merge_callback.live.batch_norm import RecentInputs
from tests.helpers.toys import ResumableBatches, Toy, Tracker, assert_same_training, batches, fit, make, same

# Lightning's; what these toys do is on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*`dataloader_iter`"),
]
STATISTICS = ("norm.running_mean", "norm.running_var")


def seeded():
    module = make(Toy)
    module.dropout.p = 0.0
    return module


@pytest.mark.slow
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


class Busy(Toy):
    """A forward pass that draws, counts, changes its input, and has layers that are frozen or seldom reached."""

    def __init__(self):
        super().__init__()
        self.register_buffer("num_seen", torch.zeros(()))
        self.shapes = []
        self.frozen_norm = nn.BatchNorm1d(6).requires_grad_(False).eval()
        self.frozen_norm.running_mean.fill_(0.5)
        self.rare = nn.BatchNorm1d(6)
        self.num_steps = 0

    def forward(self, x):
        self.num_seen += 1
        self.frozen.bias.data += 0.01
        self.shapes.append(tuple(x.shape))
        x = self.frozen_norm(x.mul_(1.5) + 0.01 * torch.rand(()))
        return super().forward(self.rare(x) if self.is_rare else x)

    @property
    def is_rare(self):
        return self.num_steps == 4

    def training_step(self, batch, batch_idx):
        self.num_steps += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.usefixtures("both_lightnings")
@pytest.mark.parametrize("arguments", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}])
@pytest.mark.sample(1)
def test_training_is_bit_identical_whatever_the_forward_pass_does(tmp_path, arguments):
    without = fit(make(Busy), tmp_path / "without", **arguments)
    callback = MergeCallback(2, 4, recalibrate_batches=3)
    watched = fit(make(Busy), tmp_path / "with", callback, **arguments)
    assert watched.logged("merged/val_loss")
    assert_same_training(without, watched)
    assert without.module.shapes == watched.module.shapes
    assert torch.equal(without.module.num_seen, watched.module.num_seen)
    before = {name: tensor.clone() for name, tensor in watched.module.state_dict().items()}
    modes = [module.training for module in watched.module.modules()]
    first, second = callback.merged_state_dict(), callback.merged_state_dict()
    # Asking changes nothing, not even what is answered; but dropout and noise are drawn anew.
    watched.module.dropout.p = 0.0
    assert same(dict(watched.module.state_dict()), before)
    assert [module.training for module in watched.module.modules()] == modes
    assert watched.module.norm.momentum == 0.1
    torch.testing.assert_close(first["norm.running_var"], second["norm.running_var"], rtol=0.5, atol=0.1)


def test_frozen_layers_and_those_that_no_input_reaches_keep_their_statistics(tmp_path):
    callback, tracker = MergeCallback(2, 4, recalibrate_batches=3), Tracker()
    run = fit(make(Busy), tmp_path, callback, tracker, train=ResumableBatches())
    merged, newest = callback.merged_state_dict(), tracker.buffers[24]
    assert not run.module.frozen_norm.training
    assert torch.equal(merged["frozen_norm.running_mean"], torch.full((6,), 0.5))
    for name in ("rare.running_mean", "rare.running_var"):
        assert torch.equal(merged[name], newest[name])
        assert not torch.equal(merged[name], torch.full((6,), float(name.endswith("var"))))
    assert not torch.equal(merged["norm.running_mean"], newest["norm.running_mean"])
    assert merged["norm.num_batches_tracked"] == 24
    # What comes after a frozen layer has seen its outputs as they are; but for the noise that it draws.
    by_hand = make(Busy)
    by_hand.load_state_dict(merged)
    by_hand.norm.reset_running_stats()
    by_hand.norm.momentum = None
    # Others than those of the run, which its forward passes have changed.
    for x, _ in ResumableBatches().batches[21:24]:
        by_hand(x)
    torch.testing.assert_close(merged["norm.running_mean"], by_hand.norm.running_mean, rtol=0, atol=0.02)


def test_a_checkpoint_that_a_signal_handler_saves_meanwhile_is_the_live_one(tmp_path):
    class Signalled(Toy):
        def forward(self, x):
            trainer = self._trainer
            if (
                trainer is not None
                and trainer.validating
                and self.norm.training
                and not (tmp_path / "saved.ckpt").exists()
            ):
                trainer.save_checkpoint(tmp_path / "saved.ckpt")
            return super().forward(x)

    tracker = Tracker()
    fit(make(Signalled), tmp_path, tracker, MergeCallback(1, 4, recalibrate_batches=2))
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    step = saved["global_step"]
    expected = tracker.parameters[step] | tracker.buffers[step]
    for name in ("inner.weight", "out.weight", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(saved["state_dict"][name], expected[name]), name


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


class Own:
    """An input of a class of the user's."""

    def __init__(self, x):
        self.x = x


def test_inputs_that_a_safe_load_would_refuse_stay_out_of_checkpoints_and_a_warning_says_so(tmp_path):
    recent = RecentInputs(2)
    recent.append(nn.Identity(), [{"x": [torch.ones(2), ("text", 3, None)]}, torch.zeros(2)])
    (plain,) = recent.state_dict()["inputs"]
    assert same(plain, {"x": [torch.ones(2), ("text", 3, None)]})
    recent.append(nn.Identity(), [Own(torch.ones(2)), torch.zeros(2)])
    assert recent.state_dict()["inputs"] == []

    class Objects(Toy):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return Own(batch[0]), batch[1]

        def forward(self, x):
            return super().forward(x.x)

    with pytest.warns(UserWarning, match="do not go into checkpoints; after a resume"):
        run = fit(make(Objects), tmp_path, MergeCallback(2, 4, recalibrate_batches=3))
    path = tmp_path / "saved.ckpt"
    run.trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["global_step"] == 24


def test_inputs_are_copies_of_the_first_item_of_a_batch():
    recent, x = RecentInputs(2), torch.ones(2)
    recent.append(nn.Identity(), (x, torch.zeros(3)))
    x.zero_()
    assert torch.equal(next(iter(recent)), torch.ones(2))
    recent.append(nn.Identity(), {"x": torch.ones(3)})
    assert same(list(recent)[1], {"x": torch.ones(3)})


class Plain(Toy):
    """Without batch norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()


def test_a_forward_pass_that_takes_something_else_is_named_before_the_first_step(tmp_path):
    class TwoArguments(Toy):
        def forward(self, x, mask):
            return super().forward(x * mask)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0], 1.0), batch[1])

    module = make(TwoArguments)
    message = "calls TwoArguments with the first item of a training batch that is a list or tuple.*'mask'"
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path, MergeCallback(2, 4, recalibrate_batches=3), num_sanity_val_steps=0)
    assert module._trainer.global_step == 0


def test_a_forward_pass_may_log(tmp_path):
    class Logging(Toy):
        def forward(self, x):
            if self._trainer is not None and self._trainer.training:
                self.log("input", x.mean())
            return super().forward(x)

    without = fit(make(Logging), tmp_path / "without")
    watched = fit(make(Logging), tmp_path / "with", MergeCallback(2, 4, recalibrate_batches=3))
    assert watched.logged("merged/val_loss")
    assert_same_training(without, watched)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_inputs_that_are_not_finite_are_left_out(tmp_path):
    class Skipping(Toy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch[0].isfinite().all() else None

    class Spoil(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 21:
                batch[0][0, 0] = float("nan")

    run = fit(make(Skipping), tmp_path, Spoil(), MergeCallback(2, 4, recalibrate_batches=5))
    assert all(math.isfinite(value) for _, value in run.logged("merged/val_loss"))


def test_models_for_which_it_makes_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="recalibrate_batches is for batch norm layers, of which Plain has none"):
        fit(make(Plain), tmp_path, MergeCallback(recalibrate_batches=3))

    class Iterating(Toy):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return super().training_step(batch, 0)

    with pytest.raises(ValueError, match="needs a training step that takes batches, not dataloader_iter"):
        fit(make(Iterating), tmp_path, MergeCallback(recalibrate_batches=3))
    with pytest.raises(ValueError, match="recalibrate_batches must be >= 1, got 0"):
        MergeCallback(recalibrate_batches=0)


def test_modes_are_those_of_the_latest_batch_also_after_a_resume():
    module, recent, x = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)), RecentInputs(2), torch.ones(2)
    recent.append(module, x)
    state = recent.state_dict()
    module[1].eval()
    recent.append(module, x)
    assert recent.in_training == {"", "0"}
    recent.load_state_dict(state, torch.device("cpu"))
    assert recent.in_training == {"", "0", "1"}
    recent.append(module, x)
    assert recent.in_training == {"", "0"}
