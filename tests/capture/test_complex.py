"""Complex parameters are merged as their real and imaginary parts, live and on disk alike; float8 is refused."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from merge_callback import Ema, MergeCallback, Parts, SpikeDetector, SpikeRecovery
from merge_callback.checkpoints.merge import merge_checkpoints
from tests.helpers.toys import Base, ResumableBatches, Toy, assert_same_training, fit, make, same


class Spectral(Toy):
    """A toy with a Fourier layer, whose running mean is complex too."""

    def __init__(self):
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64).t())
        self.register_buffer("mean_spectrum", torch.zeros(4, dtype=torch.complex64))
        self.dropout.p = 0.0

    def forward(self, x):
        found = torch.fft.rfft(x) @ self.spectrum
        if self.training:
            self.mean_spectrum.lerp_(found.detach().mean(0), 0.1)
        return super().forward(x + torch.fft.irfft(found, n=6).real)


def spectral():
    return make(Spectral)


@pytest.mark.parametrize("place", ["device", "cpu", "files"])
@pytest.mark.sample(1)
def test_complex_parameters_are_merged_live_and_on_disk_alike(tmp_path, place):
    callback = MergeCallback(1, 4, merges={"sma": "sma", "ema": Ema(half_life_steps=1)},
                             storage=tmp_path / "snapshots" if place == "files" else place)  # fmt: skip
    points = ModelCheckpoint(tmp_path / "points", "{step}", save_top_k=-1, every_n_train_steps=1)
    run = fit(spectral(), tmp_path / "run", callback, points, max_steps=12, enable_checkpointing=True)
    states = [torch.load(path, weights_only=True)["state_dict"] for path in paths_of(tmp_path, range(9, 13))]
    merged = callback.merged_state_dict()
    assert merged["spectrum"].is_complex()
    assert merged["spectrum"].shape == run.module.spectrum.shape
    expected = sum(state["spectrum"].to(torch.complex128) for state in states) / 4
    torch.testing.assert_close(merged["spectrum"].to(torch.complex128), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(merged["mean_spectrum"], states[-1]["mean_spectrum"])
    average = torch.load(paths_of(tmp_path, [1])[0], weights_only=True)["state_dict"]["spectrum"].to(torch.complex128)
    for path in paths_of(tmp_path, range(2, 13)):
        average = (average + torch.load(path, weights_only=True)["state_dict"]["spectrum"]) / 2
    found = callback.merged_state_dict("ema")["spectrum"].to(torch.complex128)
    torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-6)
    merge_checkpoints(paths_of(tmp_path, range(9, 13)), tmp_path / "merged.ckpt", newest=["norm.*", "mean_spectrum"])
    on_disk = torch.load(tmp_path / "merged.ckpt", weights_only=True)["state_dict"]
    for name in ("spectrum", "mean_spectrum", "inner.weight"):
        assert torch.equal(on_disk[name], merged[name]), name


def paths_of(folder, steps):
    return [folder / "points" / f"step={step}.ckpt" for step in steps]


@pytest.mark.slow
def test_complex_training_is_the_same_with_and_without_the_callback_and_after_an_interruption(tmp_path):
    def merging():
        return MergeCallback(2, 4, merges={"sma": "sma", "ema": Ema(half_life_steps=2)}, dtype=torch.float32)

    without = fit(spectral(), tmp_path / "without", train=ResumableBatches())
    whole, first, second = merging(), merging(), merging()
    assert_same_training(without, fit(spectral(), tmp_path / "with", whole, train=ResumableBatches()))
    stopped = fit(spectral(), tmp_path / "first", first, train=ResumableBatches(), max_steps=11)
    stopped.trainer.save_checkpoint(tmp_path / "first.ckpt")
    path = str(tmp_path / "first.ckpt")
    resumed = fit(spectral(), tmp_path / "second", second, train=ResumableBatches(), ckpt_path=path)
    assert same(dict(resumed.module.state_dict()), dict(without.module.state_dict()))
    for name in ("sma", "ema"):
        assert same(second.merged_state_dict(name), whole.merged_state_dict(name))


@pytest.mark.filterwarnings("ignore:SpikeRecovery", "ignore:No snapshot")
def test_a_recovery_brings_complex_parameters_back(tmp_path):
    merge = MergeCallback(2, 4)
    recovery = SpikeRecovery(merge, detector=SpikeDetector(threshold=8, patience=2, window=20))
    module = spectral()
    kept = {}

    def spoiled(self, batch, batch_idx):
        step = self.trainer.global_step
        if step in (6, 8, 10):
            kept[step] = self.spectrum.detach().clone()
        loss = Toy.training_step(self, batch, batch_idx)
        return loss * float("nan") if step == 11 else loss

    type(module).training_step = spoiled
    fit(module, tmp_path, merge, recovery, max_steps=12, limit_val_batches=0)
    assert recovery.recoveries == [12]
    expected = sum(each.to(torch.complex128) for each in kept.values()) / 3
    torch.testing.assert_close(module.spectrum.detach().to(torch.complex128), expected, rtol=1e-6, atol=1e-6)


class OnlyComplex(Base):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex128))

    def training_step(self, batch, batch_idx):
        return (self.weight.abs() - 1).square().sum()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self.weight.abs() - 1).square().sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_model_of_complex_numbers_alone_is_merged(tmp_path):
    callback = MergeCallback(1, 2)
    run = fit(make(OnlyComplex), tmp_path, callback)
    assert callback.merged_state_dict()["weight"].dtype == torch.complex128
    assert not torch.equal(callback.merged_state_dict()["weight"], run.module.weight)
    assert run.logged("merged/val_loss")


class Float8(OnlyComplex):
    def __init__(self):
        super().__init__()
        self.narrow = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn))


def test_parameters_of_too_few_bits_are_refused_by_name_and_can_be_left_out(tmp_path):
    with pytest.raises(ValueError, match=r"narrow is torch.float8_e4m3fn, which is not summed; parts=Parts\(exclude="):
        fit(make(Float8), tmp_path / "refused", MergeCallback())
    callback = MergeCallback(1, 2, parts=Parts(exclude=["narrow"]))
    run = fit(make(Float8), tmp_path / "left out", callback)
    merged = callback.merged_state_dict()
    assert torch.equal(merged["narrow"].float(), run.module.narrow.detach().float())
