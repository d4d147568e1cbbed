"""Sharded and replicated models, in real processes: merges, evaluation, observer and resume as in one process."""

import json
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, strategies
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from merge_callback import (
    AnnealBranch,
    Ema,
    MergeCallback,
    MergedCheckpoint,
    Parts,
    Routers,
    SpikeDetector,
    SpikeRecovery,
)
from merge_callback.callbacks.arguments import refuse_strategy
from merge_callback.checkpoints.write import read_provenance, save, weights_checkpoint
from merge_callback.live.batch_norm import RecentInputs, batch_statistics
from merge_callback.live.sharding import Sharding, local, rank
from merge_callback.prediction.records import read_records
from tests.helpers import reference
from tests.helpers.ranks import Ranks
from tests.helpers.sharded_toys import WIDTH, FullTracker, Sharded, fit_sharded, full, merge_by_hand, strategy, weights
from tests.helpers.toys import ResumableBatches, batches, make, same

pytestmark = pytest.mark.slow

MERGES: dict[str, Any] = {"sma": "sma", "sqrt": "1-sqrt", "ema": Ema(half_life_steps=3)}


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


def watched(folder: Path, form: str, options: dict) -> dict:
    callback, tracker = MergeCallback(2, 3, merges=MERGES), FullTracker()
    run = fit_sharded(folder / f"{form}-watched", form, tracker, callback, **options)
    merged = {name: callback.merged_state_dict(name) for name in MERGES}
    return {
        "merged": {name: {k: full(v) for k, v in state.items()} for name, state in merged.items()},
        "is_sharded": any(isinstance(value, DTensor) for value in merged["sma"].values()),
        "by_hand": {name: merge_by_hand(tracker, callback, name) for name in ("sma", "sqrt")},
        "shadow_by_hand": tracker.parameters,
        "metrics": [{k: float(v) for k, v in epoch.items()} for epoch in run.epoch_metrics],
        "weights": weights(run.module),
        "rng": run.rng,
    }


def unwatched(folder: Path, form: str, options: dict) -> dict:
    run = fit_sharded(folder / f"{form}-alone", form, **options)
    metrics = [{k: float(v) for k, v in epoch.items()} for epoch in run.epoch_metrics]
    return {"weights": weights(run.module), "rng": run.rng, "metrics": metrics}


FORMS: list[tuple[str, dict[str, Any]]] = [
    ("fsdp", {}),
    ("fsdp", {"reshard": False}),
    ("fsdp", {"narrow": True}),
    ("fsdp", {"accumulate_grad_batches": 2}),
    ("tp", {}),
    ("ddp", {}),
]


@pytest.mark.parametrize(("form", "options"), FORMS, ids=[f"{form}-{'-'.join(o) or 'plain'}" for form, o in FORMS])
def test_training_on_two_ranks_is_bit_identical_with_and_without_the_callback(tmp_path, two_ranks, form, options):
    results = [two_ranks.run(function, tmp_path, form, options) for function in (watched, unwatched)]
    for with_it, without in zip(*results, strict=True):
        assert same(with_it["weights"], without["weights"])
        assert same(with_it["rng"], without["rng"])
        for ours, theirs in zip(with_it["metrics"], without["metrics"], strict=True):
            assert {name: ours[name] for name in theirs} == theirs
            assert {"merged/val_loss", "merged_sqrt/val_loss", "merged_ema/val_loss"} <= ours.keys()


@pytest.mark.parametrize(("form", "options"), FORMS, ids=[f"{form}-{'-'.join(o) or 'plain'}" for form, o in FORMS])
def test_merges_of_shards_are_the_shards_of_the_merge(tmp_path, two_ranks, form, options):
    for found in two_ranks.run(watched, tmp_path, form, options):
        assert found["is_sharded"] == (form != "ddp")
        for name, expected in found["by_hand"].items():
            for key, value in expected.items():
                torch.testing.assert_close(found["merged"][name][key].double(), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["fsdp", "tp", "ddp"])
def test_merged_values_on_two_ranks_are_those_of_one_process(tmp_path, two_ranks, form):
    alone = watched(tmp_path, "", {})
    for found in two_ranks.run(watched, tmp_path, form, {}):
        for ours, theirs in zip(found["metrics"], alone["metrics"], strict=True):
            names = [name for name in theirs if not name.endswith("seconds")]
            assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], abs=1e-4)


def count_communication(folder: Path, form: str) -> list[int]:
    counts = []

    class Counting(MergeCallback):
        def on_train_batch_end(self, *arguments):
            with CommDebugMode() as mode:
                super().on_train_batch_end(*arguments)
            counts.append(mode.get_total_counts())

        def on_train_start(self, *arguments):
            super().on_train_start(*arguments)
            self.session.merges.rows = partial(counted, self.session.merges.rows)

    def counted(rows, step):
        made = rows(step)
        for _ in MERGES:
            with CommDebugMode() as mode:
                row = next(made)
            counts.append(mode.get_total_counts())
            yield row

    fit_sharded(folder, form, Counting(2, 3, merges=MERGES))
    return counts


@pytest.mark.parametrize("form", ["fsdp", "tp", "ddp"])
def test_capturing_and_merging_communicate_nothing(tmp_path, two_ranks, form):
    for counts in two_ranks.run(count_communication, tmp_path, form):
        # Twelve steps, and three validations of three merges.
        assert counts == [0] * 21


def resumed(folder: Path, form: str, options: dict[str, Any], path: str | None, max_steps: int) -> dict[str, Any]:
    callback = MergeCallback(2, 3, merges=MERGES)
    run = fit_sharded(folder, form, callback, train=ResumableBatches(), ckpt_path=path, max_steps=max_steps, **options)
    if path is None:
        run.trainer.save_checkpoint(folder.parent / f"at-{max_steps}.ckpt")
    merged = {name: callback.merged_state_dict(name) for name in MERGES}
    return {
        "steps": callback.snapshot_steps,
        "merged": {name: {k: full(v) for k, v in state.items()} for name, state in merged.items()},
        "weights": weights(run.module),
        "last": {k: float(v) for k, v in run.epoch_metrics[-1].items() if not k.endswith("seconds")},
    }


SAVED: dict[str, dict[str, Any]] = {"shards": {}, "whole": {"save_distributed_checkpoint": False}}


@pytest.mark.parametrize("form", ["fsdp", "tp"])
@pytest.mark.parametrize("how", SAVED)
def test_a_sharded_run_that_was_interrupted_equals_the_one_that_was_not(tmp_path, two_ranks, form, how):
    whole = two_ranks.run(resumed_form, tmp_path / "whole", form, how, None, 12)
    two_ranks.run(resumed_form, tmp_path / "first", form, how, None, 7)
    again = two_ranks.run(resumed_form, tmp_path / "again", form, how, str(tmp_path / "at-7.ckpt"), 12)
    assert same(again, whole)


def resumed_form(folder: Path, form: str, how: str, path: str | None, max_steps: int) -> dict[str, Any]:
    return resumed(folder, form, strategy(form, **SAVED[how]), path, max_steps)


@pytest.mark.parametrize("how", SAVED)
def test_a_run_on_two_ranks_goes_on_with_its_window_on_one(tmp_path, two_ranks, how):
    (whole, _) = two_ranks.run(resumed_form, tmp_path / "whole", "fsdp", how, None, 12)
    two_ranks.run(resumed_form, tmp_path / "first", "fsdp", how, None, 7)
    ranks = Ranks(1)
    (alone,) = ranks.run(resumed_form, tmp_path / "alone", "fsdp1", how, str(tmp_path / "at-7.ckpt"), 12)
    ranks.stop()
    assert alone["steps"] == whole["steps"]
    for name in MERGES:
        for key, tensor in whole["merged"][name].items():
            torch.testing.assert_close(alone["merged"][name][key], tensor, rtol=0, atol=1e-5)


class Normed(Sharded):
    """Has batch-norm statistics, and is trained on other batches on each rank."""

    def __init__(self):
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return super().forward(self.batch_norm(x))


def normed(folder: Path, *, is_watched: bool) -> dict[str, Any]:
    callback = MergeCallback(2, 3)
    callbacks = [callback] if is_watched else []
    options = {"validation": batches(24, 4, shuffle=False, seed=1), "use_distributed_sampler": True}
    run = fit_sharded(folder, "ddp", *callbacks, module=make(Normed), **options)
    return {
        "state": {name: tensor.clone() for name, tensor in run.module.state_dict().items()},
        "merged": callback.merged_state_dict() if is_watched else {},
        "logged": float(run.epoch_metrics[-1]["merged/val_loss"]) if is_watched else 0.0,
    }


def test_batch_norm_statistics_that_differ_by_rank_are_those_of_rank_0_as_in_a_live_validation(tmp_path, two_ranks):
    alone = two_ranks.run(partial(normed, is_watched=False), tmp_path / "alone")
    watched = two_ranks.run(partial(normed, is_watched=True), tmp_path / "watched")
    for with_it, without in zip(watched, alone, strict=True):
        assert same(with_it["state"], without["state"])
    first, second = (found["merged"] for found in watched)
    assert torch.equal(first["up.weight"], second["up.weight"])
    assert not torch.equal(first["batch_norm.running_mean"], second["batch_norm.running_mean"])
    module = make(Normed).eval()
    module.load_state_dict(first)
    with torch.no_grad():
        losses = [F.cross_entropy(module(x), y) for x, y in batches(24, 4, shuffle=False, seed=1)]
    for found in watched:
        assert found["logged"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


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


class PoisonOneRank(Callback):
    """After step 6 a weight is NaN on rank 1, and after step 7 it is as it was."""

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        weight = local(pl_module.up.weight)
        if trainer.global_step == 6:
            self.kept = weight.clone()
            if trainer.global_rank == 1:
                weight.fill_(torch.nan)
        if trainer.global_step == 7:
            weight.copy_(self.kept)


class Unharmed(Sharded):
    """Learns nothing in the step that sees the NaN."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return torch.nan_to_num(loss) * 0 if loss.isnan() else loss


def stored_in_place(folder: Path) -> dict[str, Any]:
    live = distribute_tensor(torch.zeros(5, 3), init_device_mesh("cpu", (2,)), [Shard(0)])
    read = distribute_tensor(torch.zeros(5, 3), live.device_mesh, live.placements)
    part = torch.rand_like(live.to_local())
    with CommDebugMode() as mode:
        stored = Sharding({"weight": live}).as_dtensor("weight", part)
    dcp.save({"weight": stored}, checkpoint_id=folder / "stored")
    dcp.load({"weight": read}, checkpoint_id=folder / "stored")
    assert isinstance(stored, DTensor)
    return {
        "num_messages": mode.get_total_counts(),
        "is_same_memory": local(stored).data_ptr() == part.data_ptr(),
        # torch keeps what it finds out about operations by mesh: one without groups must not stand in for the other.
        "is_same_mesh": stored.device_mesh == live.device_mesh,
        "is_read": torch.equal(local(read), part),
    }


def test_shards_are_written_from_the_memory_where_they_are(tmp_path, two_ranks):
    for found in two_ranks.run(stored_in_place, tmp_path):
        assert found == {"num_messages": 0, "is_same_memory": True, "is_same_mesh": False, "is_read": True}


def poisoned(folder: Path, arguments: dict[str, Any], max_steps: int) -> dict[str, Any]:
    callback = MergeCallback(**arguments)
    options: dict[str, Any] = {"max_steps": max_steps, "val_check_interval": 6}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_sharded(folder, "fsdp", PoisonOneRank(), callback, module=make(Unharmed, form="fsdp"), **options)
    return {"steps": callback.snapshot_steps, "said": [str(warning.message) for warning in caught]}


def test_a_nan_on_one_rank_refuses_the_snapshot_on_all(tmp_path, two_ranks):
    arguments = {"every_n_train_steps": 2, "num_snapshots": 4}
    first, second = two_ranks.run(poisoned, tmp_path, arguments, 6)
    assert first["steps"] == second["steps"] == [2, 4]
    assert any("No snapshot at step 6: up.weight holds NaN or inf on rank 1" in text for text in second["said"])
    assert any("left out of the merges: No snapshot at step 6: up.weight" in text for text in first["said"])


def test_an_average_with_nan_on_one_rank_begins_anew_on_all(tmp_path, two_ranks):
    arguments = {"merges": {"ema": Ema(half_life_steps=3), "sma": "sma"}}
    first, second = two_ranks.run(poisoned, tmp_path, arguments, 8)
    assert any("no merge 'ema' at step 6: its average holds NaN or inf" in text for text in first["said"])
    assert first["steps"] == second["steps"]


def exported(folder: Path, form: str) -> dict[str, Any]:
    callback = MergeCallback(2, 3)
    best = MergedCheckpoint(callback, monitor="merged/val_loss", dirpath=folder / "best", filename="best")
    run = fit_sharded(folder, form, callback, ModelCheckpoint(folder / "live"), best, enable_checkpointing=True)
    largest = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor):
                largest.append(result.nbytes)
            return result

    for name in ("merge.safetensors", "merge.ckpt"):
        callback.save_merged(folder / name)
    if form != "ddp":
        checkpoint = weights_checkpoint(run.module, callback.merged_state_dict(), 12)
        with Watching():
            save(folder / "again.safetensors", checkpoint, {"steps": [12]})
        callback.save_merged(folder / "merge")
        with pytest.raises(OSError, match=r"the merge of steps \[8, 10, 12\] was not saved to .*File exists"):
            callback.save_merged(folder / "merge.ckpt" / "merge.safetensors")
    state = callback.merged_state_dict()
    content = {name: torch.zeros_like(value) for name, value in state.items()}
    if form != "ddp":
        dcp.load({"state_dict": content}, checkpoint_id=folder / "merge")
    return {
        "merge": {name: full(value) for name, value in state.items()},
        "directory": {name: full(value) for name, value in content.items()},
        "largest": max(largest, default=0),
        "num_parameters": sum(parameter.numel() for parameter in run.module.parameters()),
    }


@pytest.mark.parametrize("form", ["fsdp", "tp", "ddp"])
def test_a_merge_of_several_ranks_is_exported_whole(tmp_path, two_ranks, form):
    for found in two_ranks.run(exported, tmp_path, form):
        assert same(load_file(tmp_path / "merge.safetensors"), found["merge"])
        assert read_provenance(tmp_path / "merge.safetensors")["steps"] == [8, 10, 12]
        checkpoint = torch.load(tmp_path / "merge.ckpt", weights_only=True)
        assert same(dict(checkpoint["state_dict"]), found["merge"])
        assert (tmp_path / "best" / "best.ckpt").exists()
        if form != "ddp":
            assert same(found["directory"], found["merge"])
            assert json.loads((tmp_path / "merge" / "merge.json").read_text())["coefficients"] == [1 / 3] * 3
            # Never more than the largest tensor at once, which is gathered as shards of four rows each.
            assert found["largest"] <= 4 * 8 * WIDTH < 4 * found["num_parameters"]
    whole_module = make(Sharded)
    whole_module.load_state_dict(load_file(tmp_path / "merge.safetensors"), strict=True)


def failing(folder: Path) -> None:
    class Failing(Sharded):
        def validation_step(self, batch, batch_idx):
            is_merged = type(self.trainer.fit_loop.epoch_loop.val_loop.run).__name__ != "_ObservedRun"
            if is_merged and self.trainer.global_rank == 1:
                raise ZeroDivisionError("on rank 1 alone")
            return super().validation_step(batch, batch_idx)

    fit_sharded(folder, "fsdp", MergeCallback(2, 3), module=make(Failing, form="fsdp"))


def test_a_rank_that_fails_in_the_merged_validation_ends_all_of_them_with_its_error(tmp_path):
    ranks = Ranks(2, is_ended_by_errors=True)
    (is_done, other), (is_done_too, failed) = ranks.outcomes(failing, tmp_path)
    ranks.stop()
    assert not is_done
    assert not is_done_too
    assert "ZeroDivisionError: on rank 1 alone" in failed
    assert "Connection closed by peer" in other or "connection reset" in other.lower()


@pytest.fixture(scope="module")
def four_ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


def test_four_ranks_with_shards_in_two_dimensions(tmp_path, four_ranks):
    results = [four_ranks.run(function, tmp_path, "fsdp+tp", {}) for function in (watched, unwatched)]
    alone = watched(tmp_path, "", {})
    for found, without in zip(*results, strict=True):
        assert same(found["weights"], without["weights"])
        for name, expected in found["by_hand"].items():
            for key, value in expected.items():
                torch.testing.assert_close(found["merged"][name][key].double(), value, rtol=0, atol=1e-6)
        for ours, theirs in zip(found["metrics"], alone["metrics"], strict=True):
            names = [name for name in theirs if not name.endswith("seconds")]
            assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], abs=1e-4)


def test_four_ranks_go_on_where_they_were_interrupted(tmp_path, four_ranks):
    whole = four_ranks.run(resumed_form, tmp_path / "whole", "fsdp+tp", "shards", None, 12)
    four_ranks.run(resumed_form, tmp_path / "first", "fsdp+tp", "shards", None, 7)
    again = four_ranks.run(resumed_form, tmp_path / "again", "fsdp+tp", "shards", str(tmp_path / "at-7.ckpt"), 12)
    assert same(again, whole)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_whose_merges_would_be_wrong_are_refused_with_what_to_use(name):
    strategy_class = getattr(strategies, name)

    class Here(strategy_class):
        """Neither can be made on this machine."""

        def __init__(self):
            pass

    with pytest.raises(NotImplementedError, match=f"does not work under {name}, .*; use ModelParallelStrategy"):
        refuse_strategy(Here())


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
