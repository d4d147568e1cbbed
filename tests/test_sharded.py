"""Sharded and replicated models, in real processes: merges, evaluation, observer and resume as in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from merge_callback import Ema, MergeCallback
from tests.ranks import Ranks
from tests.sharded_toys import FullTracker, fit_sharded, full, merge_by_hand, weights
from tests.toys import same

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

        def _row(self, name):
            with CommDebugMode() as mode:
                row = super()._row(name)
            counts.append(mode.get_total_counts())
            return row

    fit_sharded(folder, form, Counting(2, 3, merges=MERGES))
    return counts


@pytest.mark.parametrize("form", ["fsdp", "tp", "ddp"])
def test_capturing_and_merging_communicate_nothing(tmp_path, two_ranks, form):
    for counts in two_ranks.run(count_communication, tmp_path, form):
        # Twelve steps, and three validations of three merges.
        assert counts == [0] * 21
