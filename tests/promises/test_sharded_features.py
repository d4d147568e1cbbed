"""Several ranks: branches, recovery, parts of a model, routers and batch norm."""

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from merge_callback import (
    AnnealBranch,
    Ema,
    MergeCallback,
    Parts,
    Routers,
    SpikeDetector,
    SpikeRecovery,
)
from merge_callback.live.batch_norm import RecentInputs, batch_statistics
from merge_callback.live.sharding import local, rank
from merge_callback.prediction.records import read_records
from tests.helpers import reference
from tests.helpers.sharded_toys import WIDTH, FullTracker, Sharded, fit_sharded, full, merge_by_hand, weights
from tests.helpers.toys import ResumableBatches, make, same

pytestmark = pytest.mark.slow


def trunk_and_branch(folder: Path, form: str) -> dict[str, Any]:
    """A trunk of 16 steps, and a decay over its steps 8 to 16 for real; the branch learns of the trunk what it can."""
    form_folder = folder / (form or "alone")
    first, last = (form_folder / f"at-{step}.ckpt" for step in (8, 16))

    def goes_on(path: Path | None, *callbacks: Any, max_steps: int) -> Any:
        options = {"train": ResumableBatches(), "ckpt_path": path and str(path), "max_steps": max_steps}
        return fit_sharded(form_folder / "run", form, MergeCallback(2, 3), *callbacks, **options)

    goes_on(None, max_steps=8).trainer.save_checkpoint(first)
    goes_on(first, max_steps=16).trainer.save_checkpoint(last)
    run = goes_on(first, AnnealBranch(8, record=form_folder / "anneals.jsonl", trunk=last), max_steps=40)
    return {"steps": run.trainer.global_step, "is_folder": last.is_dir()}


@pytest.mark.parametrize("form", ["fsdp", "tp", "ddp"])
def test_a_branch_of_a_sharded_run_is_recorded_once_as_that_of_one_process(tmp_path, two_ranks, form):
    trunk_and_branch(tmp_path, "")
    for found in two_ranks.run(trunk_and_branch, tmp_path, form):
        assert found == {"steps": 16, "is_folder": form != "ddp"}
    files = [tmp_path / name / "anneals.jsonl" for name in ("alone", form)]
    assert [len(file.read_text().splitlines()) for file in files] == [1, 1]
    (alone,), (ours,) = map(read_records, files)
    assert (ours.start_step, ours.step, ours.span_steps) == (8, 16, 8)
    assert ours.annealed == pytest.approx(alone.annealed, abs=1e-4)
    assert ours.matched is not None
    assert alone.matched is not None
    assert ours.matched.merged == pytest.approx(alone.matched.merged, abs=1e-4)
    assert ours.matched.live == pytest.approx(alone.matched.live, abs=1e-4)


class AccidentOn(Callback):
    """At one step, NaN in the gradients of one rank alone, or on all ranks a weight fifty times as large."""

    def __init__(self, step: int, rank: int | None) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and self.rank is None:
            with torch.no_grad():
                local(pl_module.out.weight).mul_(50)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            local(pl_module.out.weight.grad).fill_(float("nan"))


def recovered(folder: Path, form: str, options: dict, rank: int | None) -> dict:
    merge, tracker = MergeCallback(5, 6), FullTracker()
    recovery = SpikeRecovery(merge, detector=SpikeDetector(threshold=8, patience=2, window=20))
    module = make(Sharded, form="" if form == "ddp" else form, **options)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=1e-4, foreach=False)
    callbacks = [merge, recovery, tracker, AccidentOn(32, rank)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SpikeRecovery")
        run = fit_sharded(folder / f"{form}-recovered", form, *callbacks, module=module, max_steps=60)
    (acted,) = recovery.recoveries
    by_hand = reference.merge([tracker.parameters[step] for step in (20, 25, 30)], [1 / 3] * 3)
    return {"acted": acted, "by_hand": by_hand, "written": tracker.parameters[acted], "weights": weights(run.module)}


ACCIDENTS: list[tuple[str, dict[str, Any], int | None]] = [
    ("ddp", {}, 1),
    ("ddp", {}, None),
    ("fsdp", {}, 1),
    ("fsdp", {"reshard": False}, None),
    ("fsdp", {"narrow": True}, None),
    ("tp", {}, None),
]


@pytest.mark.parametrize(("form", "options", "rank"), ACCIDENTS)
def test_all_ranks_recover_alike_from_an_accident_even_of_one_of_them(tmp_path, two_ranks, form, options, rank):
    first, second = two_ranks.run(recovered, tmp_path, form, options, rank)
    assert first["acted"] == second["acted"]
    assert 33 <= first["acted"] <= 36
    for found in (first, second):
        for name, expected in found["by_hand"].items():
            torch.testing.assert_close(found["written"][name].double(), expected, rtol=1e-6, atol=1e-7)
        assert all(tensor.isfinite().all() for tensor in found["weights"].values())
    assert same(first["weights"], second["weights"])


def guarded(folder: Path, form: str, with_it: bool) -> dict:
    merge = MergeCallback(2, 3)
    callbacks = [merge, SpikeRecovery(merge)] if with_it else []
    run = fit_sharded(folder / f"{form}-{with_it}", form, *callbacks)
    return {"weights": weights(run.module), "rng": run.rng}


@pytest.mark.parametrize("form", ["ddp", "fsdp", "tp"])
def test_a_healthy_run_on_two_ranks_is_bit_identical_with_and_without_recovery(tmp_path, two_ranks, form):
    for ours, theirs in zip(
        *(two_ranks.run(guarded, tmp_path, form, with_it) for with_it in (True, False)), strict=True
    ):
        assert same(ours, theirs)


def partly(folder: Path, form: str) -> dict:
    callback, tracker = MergeCallback(2, 3, parts=Parts(exclude="down.*")), FullTracker()
    run = fit_sharded(folder / f"{form}-partly", form, tracker, callback)
    state = {name: full(tensor) for name, tensor in callback.merged_state_dict().items()}
    return {"state": state, "by_hand": merge_by_hand(tracker, callback), "live": weights(run.module)}


@pytest.mark.parametrize("form", ["fsdp", "tp", "ddp"])
def test_what_is_excluded_stays_live_on_every_rank(tmp_path, two_ranks, form):
    for found in two_ranks.run(partly, tmp_path, form):
        for name, live in found["live"].items():
            if name.startswith("down."):
                assert torch.equal(found["state"][name], live)
            else:
                torch.testing.assert_close(found["state"][name].double(), found["by_hand"][name], rtol=0, atol=1e-6)


def routed(folder: Path, form: str) -> list[dict[str, float]]:
    # Any layer that scores something can be looked at as a router.
    callback = MergeCallback(2, 3, parts=Parts(routers=Routers("out", num_active=2, num_batches=9)))
    run = fit_sharded(folder / f"{form}-routed", form, callback)
    return [{k: float(v) for k, v in epoch.items() if k.startswith("merge/router")} for epoch in run.epoch_metrics]


@pytest.mark.parametrize("form", ["fsdp", "tp", "ddp"])
def test_routers_on_two_ranks_agree_as_those_of_one_process_do(tmp_path, two_ranks, form):
    alone = routed(tmp_path, "")
    assert 0 < alone[-1]["merge/router_agreement"] < 1
    for found in two_ranks.run(routed, tmp_path, form):
        for ours, theirs in zip(found, alone, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


class WithBatchNorm(Sharded):
    """With statistics that differ by rank, as the data do."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.batch_norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.scale * self.norm(self.down(self.batch_norm(torch.relu(self.up(x))))))


def one_sided(folder: Path) -> bool:
    module = fit_sharded(folder, "fsdp", module=make(WithBatchNorm, form="fsdp"), max_steps=2).module.train()
    spoilt, good = torch.randn(4, 6), torch.randn(4, 6)
    if rank() == 1:
        spoilt[0, 0] = float("nan")
    found = []
    for inputs in ([spoilt, good], [good]):
        recent = RecentInputs(2)
        for each in inputs:
            recent.append(module, each)
        ((_, statistics),) = batch_statistics(module, recent, nullcontext)
        found.append(statistics)
    return same(*found)


def test_a_batch_that_is_not_finite_on_one_rank_is_left_out_on_all_where_they_communicate(tmp_path, two_ranks):
    assert two_ranks.run(one_sided, tmp_path) == [True, True]


def recalibrated(folder: Path, form: str, with_it: bool) -> dict:
    callback = MergeCallback(2, 3, recalibrate_batches=3)
    module = make(WithBatchNorm, form="" if form == "ddp" else form)
    callbacks = [callback] if with_it else []
    run = fit_sharded(folder / f"{form}-{with_it}", form, *callbacks, module=module)
    merged = {name: full(t) for name, t in callback.merged_state_dict().items()} if with_it else {}
    buffers = {name: tensor.clone() for name, tensor in run.module.named_buffers()}
    return {"weights": weights(run.module), "buffers": buffers, "rng": run.rng, "merged": merged}


@pytest.mark.parametrize("form", ["fsdp", "ddp"])
def test_recalibration_on_two_ranks_changes_nothing_but_the_statistics_of_the_merge(tmp_path, two_ranks, form):
    ours, theirs = (two_ranks.run(recalibrated, tmp_path, form, with_it) for with_it in (True, False))
    alone = recalibrated(tmp_path, "", True)
    for one, other in zip(ours, theirs, strict=True):
        for what in ("weights", "buffers", "rng"):
            assert same(one[what], other[what])
        for name in ("batch_norm.running_mean", "batch_norm.running_var"):
            assert not torch.equal(one["merged"][name], one["buffers"][name])
            torch.testing.assert_close(one["merged"][name], alone["merged"][name], rtol=1e-4, atol=1e-5)


class Fourier(nn.Module):
    """A complex parameter, five rows on two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.spectrum.sum(0) + self.spectrum[0], n=6)


class Spectral(Sharded):
    """With a Fourier layer, which FSDP2 takes only by itself: a group of parameters has one dtype."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.fourier = Fourier()

    def sharded_alone(self) -> tuple[nn.Module, ...]:
        return (self.fourier,)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.fourier(x))


def with_complex_parameters(folder: Path, form: str) -> dict:
    form_of_toy = "" if form == "ddp" else form
    merges: dict[str, Any] = {"sma": "sma", "ema": Ema(half_life_steps=2)}
    callback, tracker = MergeCallback(2, 3, merges=merges), FullTracker()
    first = {"module": make(Spectral, form=form_of_toy), "train": ResumableBatches(), "max_steps": 9}
    run = fit_sharded(folder / f"{form}-complex", form, tracker, callback, **first)
    path = folder / f"{form}-complex.ckpt"
    run.trainer.save_checkpoint(path)
    state = {name: full(tensor) for name, tensor in callback.merged_state_dict().items()}
    by_hand = merge_by_hand(tracker, callback)
    ends = []
    for name, start in (("whole", None), ("resumed", str(path))):
        callback, module = MergeCallback(2, 3, merges=merges), make(Spectral, form=form_of_toy)
        options = {"train": ResumableBatches(), "max_steps": 14}
        fit_sharded(folder / f"{form}-{name}", form, callback, module=module, ckpt_path=start, **options)
        ends.append([{k: full(v) for k, v in callback.merged_state_dict(m).items()} for m in merges])
    return {"state": state, "by_hand": by_hand, "ends": ends}


@pytest.mark.parametrize("form", ["fsdp", "ddp"])
def test_complex_parameters_are_merged_and_resumed_on_two_ranks(tmp_path, two_ranks, form):
    for found in two_ranks.run(with_complex_parameters, tmp_path, form):
        for name, expected in found["by_hand"].items():
            torch.testing.assert_close(found["state"][name].to(expected.dtype), expected, rtol=0, atol=1e-6)
        assert same(*found["ends"])
