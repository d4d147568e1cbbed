"""Several ranks: interrupted runs, shards in checkpoints, and exports."""

import inspect
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from merge_callback import (
    Ema,
    MergeCallback,
    MergedCheckpoint,
)
from merge_callback.capture.state import TensorReader
from merge_callback.checkpoints.write import read_provenance, save, weights_checkpoint
from merge_callback.live.sharding import Sharding, local
from tests.helpers.ranks import Ranks
from tests.helpers.sharded_toys import WIDTH, Sharded, fit_sharded, full, strategy, weights
from tests.helpers.toys import ResumableBatches, make, same

pytestmark = pytest.mark.slow

MERGES: dict[str, Any] = {"sma": "sma", "sqrt": "1-sqrt", "ema": Ema(half_life_steps=3)}


def resumed(folder: Path, form: str, options: dict[str, Any], path: str | None, max_steps: int) -> dict[str, Any]:
    callback, means = MergeCallback(2, 3, merges=MERGES), MergeCallback(5, 2, snapshot="mean", name="means")
    run = fit_sharded(
        folder, form, callback, means, train=ResumableBatches(), ckpt_path=path, max_steps=max_steps, **options
    )
    if path is None:
        run.trainer.save_checkpoint(folder.parent / f"at-{max_steps}.ckpt")
    merged = {name: callback.merged_state_dict(name) for name in MERGES} | {"means": means.merged_state_dict()}
    return {
        "steps": [*callback.snapshot_steps, *means.snapshot_steps],
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
    for name in (*MERGES, "means"):
        for key, tensor in whole["merged"][name].items():
            torch.testing.assert_close(alone["merged"][name][key], tensor, rtol=0, atol=1e-5)


def reads_of_metadata(folder: Path) -> list[str]:
    """Every opening of a checkpoint's metadata that the capture asked for, when a run is resumed."""
    opened, ours = [], inspect.getfile(TensorReader)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        is_metadata = event == "open" and str(arguments[0]).endswith(".metadata")
        if is_metadata and any(frame.f_code.co_filename == ours for frame, _ in traceback.walk_stack(None)):
            opened.append(str(arguments[0]))

    # It cannot be taken away again, so this process is no other test's.
    sys.addaudithook(watch)
    resumed_form(folder / "again", "fsdp1", "shards", str(folder / "at-7.ckpt"), 12)
    return opened


def test_the_metadata_of_a_checkpoint_are_read_once_by_each_callback(tmp_path, two_ranks):
    two_ranks.run(resumed_form, tmp_path / "first", "fsdp", "shards", None, 7)
    ranks = Ranks(1)
    (opened,) = ranks.run(reads_of_metadata, tmp_path)
    ranks.stop()
    # There are two callbacks, the one with three snapshots and an average.
    assert opened == [str(tmp_path / "at-7.ckpt" / ".metadata")] * 2


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


def test_four_ranks_go_on_where_they_were_interrupted(tmp_path, four_ranks):
    whole = four_ranks.run(resumed_form, tmp_path / "whole", "fsdp+tp", "shards", None, 12)
    four_ranks.run(resumed_form, tmp_path / "first", "fsdp+tp", "shards", None, 7)
    again = four_ranks.run(resumed_form, tmp_path / "again", "fsdp+tp", "shards", str(tmp_path / "at-7.ckpt"), 12)
    assert same(again, whole)
