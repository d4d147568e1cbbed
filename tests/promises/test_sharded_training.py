"""Several ranks: the observer rule, merges of shards, and what happens when one rank fails."""

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, strategies
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional as F

from merge_callback import (
    Ema,
    MergeCallback,
)
from merge_callback.callbacks.arguments import refuse_strategy
from merge_callback.live.sharding import local
from tests.helpers import reference
from tests.helpers.ranks import Ranks
from tests.helpers.sharded_toys import FullTracker, Sharded, fit_sharded, full, merge_by_hand, weights
from tests.helpers.toys import ResumableBatches, batches, make, same

pytestmark = pytest.mark.slow

MERGES: dict[str, Any] = {"sma": "sma", "sqrt": "1-sqrt", "ema": Ema(half_life_steps=3)}


def watched(folder: Path, form: str, options: dict) -> dict:
    callback, tracker = MergeCallback(2, 3, merges=MERGES), FullTracker()
    means = MergeCallback(3, 2, merges={"wma": "wma"}, snapshot="mean", name="means")
    run = fit_sharded(folder / f"{form}-watched", form, tracker, callback, means, **options)
    merged = {name: callback.merged_state_dict(name) for name in MERGES} | {"means": means.merged_state_dict()}
    per_step = {step: c / 3 for end, c in means.coefficients().items() for step in range(end - 2, end + 1)}
    by_hand = {name: merge_by_hand(tracker, callback, name) for name in ("sma", "sqrt")}
    by_hand["means"] = reference.merge([tracker.parameters[step] for step in per_step], list(per_step.values()))
    return {
        "merged": {name: {k: full(v) for k, v in state.items()} for name, state in merged.items()},
        "is_sharded": any(isinstance(value, DTensor) for value in merged["sma"].values()),
        "by_hand": by_hand,
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
    assert any("left out of merges and checkpoints: No snapshot at step 6: up.weight" in text for text in first["said"])


def test_a_nan_in_every_sample_of_one_rank_refuses_the_mean_on_all(tmp_path, two_ranks):
    arguments = {"every_n_train_steps": 2, "num_snapshots": 4, "snapshot": "mean", "mean_samples": 1}
    first, second = two_ranks.run(poisoned, tmp_path, arguments, 6)
    assert first["steps"] == second["steps"] == [2, 4]
    said = "No sample at step 6: up.weight holds NaN or inf on rank 1. Its interval has no snapshot"
    assert any(said in text for text in second["said"])
    assert any(
        "No snapshot at step 6: at step 6, up.weight holds NaN or inf on rank 1" in text for text in first["said"]
    )


class Curing(PoisonOneRank):
    """Takes the NaN away again before the next step, listed behind what must see it."""

    def __init__(self, poison):
        self.poison = poison

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        if trainer.global_step == 6:
            local(pl_module.up.weight).copy_(self.poison.kept)


def poisoned_and_resumed(folder: Path, path: str | None, max_steps: int) -> dict[str, Any]:
    """Intervals of four steps. One rank alone cannot use step 6; after step 7 there may be a checkpoint."""
    callback = MergeCallback(4, 4, snapshot="mean")
    options: dict[str, Any] = {"max_steps": max_steps, "val_check_interval": 32, "ckpt_path": path}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        poison = PoisonOneRank()
        run = fit_sharded(folder, "fsdp", poison, callback, Curing(poison), train=ResumableBatches(), **options)
        if path is None:
            run.trainer.save_checkpoint(folder.parent / f"at-{max_steps}.ckpt")
        merged = callback.merged_state_dict()
    return {"steps": callback.snapshot_steps, "merged": {name: full(value) for name, value in merged.items()}}


def test_a_run_that_is_interrupted_in_an_interval_that_one_rank_has_spoilt_goes_on_alike(tmp_path, two_ranks):
    whole = two_ranks.run(poisoned_and_resumed, tmp_path / "whole", None, 16)
    two_ranks.run(poisoned_and_resumed, tmp_path / "first", None, 7)
    again = two_ranks.run(poisoned_and_resumed, tmp_path / "again", str(tmp_path / "at-7.ckpt"), 16)
    assert whole[0]["steps"] == whole[1]["steps"] == [4, 12, 16]
    assert same(again, whole)


def test_an_average_with_nan_on_one_rank_begins_anew_on_all(tmp_path, two_ranks):
    arguments = {"merges": {"ema": Ema(half_life_steps=3), "sma": "sma"}}
    first, second = two_ranks.run(poisoned, tmp_path, arguments, 8)
    assert any("no merge 'ema' at step 6: its average holds NaN or inf" in text for text in first["said"])
    assert first["steps"] == second["steps"]


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


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_whose_merges_would_be_wrong_are_refused_with_what_to_use(name):
    strategy_class = getattr(strategies, name)

    class Here(strategy_class):
        """Neither can be made on this machine."""

        def __init__(self):
            pass

    with pytest.raises(NotImplementedError, match=f"does not work under {name}, .*; use ModelParallelStrategy"):
        refuse_strategy(Here())


class Losses(Sharded):
    """Logs a loss by batch, each rank with sizes of its own, and what only some ranks know.

    Args:
        kind: "plain", "rank zero at the end", "rank zero by batch" or "tokens".
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        size = 4 + batch_idx + self.trainer.global_rank if self.kind == "tokens" else 4
        self.log("val_loss", loss, sync_dist=True, batch_size=size)
        if self.kind == "rank zero by batch" and self.trainer.is_global_zero:
            self.log("best", loss, rank_zero_only=True, sync_dist=True, batch_size=4)

    def on_validation_epoch_end(self) -> None:
        if self.kind == "rank zero at the end" and self.trainer.is_global_zero:
            self.log("best", 1.0, rank_zero_only=True)


def compared(folder: Path, kind: str, limit_batches: int = 2, **options: Any) -> dict[str, Any]:
    callback = MergeCallback(2, 3, limit_batches=limit_batches)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "It is recommended to use .*sync_dist=True")
        run = fit_sharded(folder / kind, "ddp", callback, module=make(Losses, kind=kind), **options)
    names = ("val_loss", "merged/val_loss", "merge_gain/val_loss", "merge_gain_stderr/val_loss")
    return {name: float(run.epoch_metrics[-1][name]) for name in names}


@pytest.mark.parametrize("kind", ["plain", "rank zero at the end", "rank zero by batch", "tokens"])
def test_ranks_agree_on_gains_from_few_batches_whatever_each_of_them_logs(tmp_path, two_ranks, kind):
    first, second = two_ranks.run(compared, tmp_path, kind)
    assert first == second
    assert first["merge_gain_stderr/val_loss"] > 0


def compared_unevenly(folder: Path) -> dict[str, Any]:
    """Rank 0 validates on more batches than the limit, and rank 1 on as many."""
    num_batches = 6 - 2 * int(os.environ["RANK"])
    return compared(folder, "plain", 4, validation=batches(4 * num_batches, 4, shuffle=False, seed=1))


def test_a_limit_that_is_one_for_some_ranks_alone_holds_for_all(tmp_path, two_ranks):
    first, second = two_ranks.run(compared_unevenly, tmp_path)
    assert first == second
    assert first["merge_gain_stderr/val_loss"] > 0
    assert first["merged/val_loss"] == pytest.approx(first["val_loss"] - first["merge_gain/val_loss"], abs=1e-6)
