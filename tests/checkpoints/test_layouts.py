"""Checkpoints as other trainers leave them: the model is found, whatever else lies beside it, and nothing is run."""

import argparse
import collections
import functools
import io
import json
import pathlib
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import checkpoint as dcp

from merge_callback import AnnealBranch, MergeCallback, MergedCheckpoint
from merge_callback.apps.merge import find_checkpoints
from merge_callback.checkpoints.inert import Inert, inert_names
from merge_callback.checkpoints.merge import merge_checkpoints
from merge_callback.checkpoints.read import open_checkpoint
from merge_callback.checkpoints.torch_file import plain, read_torch_file
from merge_callback.checkpoints.write import read_provenance
from merge_callback.prediction.records import read_records
from tests.helpers.toys import Base, ResumableBatches, Toy, averages_weights, fit, lightning, make, same


def weights(step):
    return {"w": torch.full((3, 2), float(step)), "b": torch.full((2,), float(step))}


def optimizer(step):
    state = {"w": {"step": torch.tensor(float(step)), "exp_avg": torch.full((3, 2), float(step))}}
    return {"state": state, "param_groups": [{"lr": 0.1, "params": ["w", "b"]}]}


def torch_file(content):
    def write(folder, step):
        torch.save(content(step), path := folder / f"step={step}.pt")
        return path

    return write


def distributed(content, name="step-{}"):
    def write(folder, step):
        dcp.save(content(step), checkpoint_id=(path := folder / name.format(step)), no_dist=True)
        return path

    return write


def hugging_face(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    save_file(weights(step), path / "model.safetensors")
    torch.save(optimizer(step), path / "optimizer.pt")
    return path


def hugging_face_shards(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    files = {name: f"model-0000{place}-of-00002.safetensors" for place, name in enumerate(weights(step), 1)}
    for name, file in files.items():
        save_file({name: weights(step)[name]}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return path


def hugging_face_bin(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    torch.save(weights(step), path / "pytorch_model.bin")
    return path


KINDS = {
    "Hugging Face, one file": hugging_face,
    "Hugging Face, the file itself": lambda folder, step: hugging_face(folder, step) / "model.safetensors",
    "Hugging Face, several files": hugging_face_shards,
    "Hugging Face, their index": lambda f, step: hugging_face_shards(f, step) / "model.safetensors.index.json",
    "Hugging Face, of old": hugging_face_bin,
    "torch's tutorial": distributed(lambda s: {"app": {"model": weights(s), "optim": optimizer(s)}}),
    "torchtitan": distributed(
        lambda s: {**weights(s), "optimizer": optimizer(s), "train_state": {"step": torch.tensor(s)}}
    ),
    "OLMo-core": distributed(lambda s: {"model": weights(s), "optim": optimizer(s)}, "step{}"),
    "the model alone": distributed(lambda s: {"model": weights(s)}),
    "loose": distributed(weights),
    "nanoGPT": torch_file(lambda s: {"model": weights(s), "optimizer": optimizer(s), "iter_num": s, "config": {}}),
    "model_state_dict": torch_file(lambda s: {"model_state_dict": weights(s), "epoch": 3}),
    "DeepSpeed": torch_file(lambda s: {"module": weights(s), "optimizer": None}),
    "loose in a file": torch_file(lambda s: {**weights(s), "optimizer": optimizer(s), "epoch": 3}),
    "loose with a step": lambda folder, step: torch_file(lambda s: {**weights(s), "step": s})(folder, step).rename(
        folder / f"{'early' if step == 500 else 'late'}.pt"
    ),
    "a step that is a tensor": torch_file(lambda s: {"state_dict": weights(s), "global_step": torch.tensor(s)}),
    "compiled later": torch_file(
        lambda s: {"state_dict": {("_orig_mod." if s > 500 else "") + n: v for n, v in weights(s).items()}}
    ),
    "compiled at first": torch_file(
        lambda s: {"state_dict": {("_orig_mod." if s <= 500 else "") + n: v for n, v in weights(s).items()}}
    ),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_found_among_what_trainers_leave(tmp_path, kind):
    paths = [KINDS[kind](tmp_path, step) for step in (500, 1000)]
    assert [open_checkpoint(path).step for path in paths] == [500, 1000]
    origin = merge_checkpoints(paths, tmp_path / "out.safetensors", coefficients=[1, 3])
    assert origin["steps"] == [500, 1000]
    prefix = "_orig_mod." if kind == "compiled later" else ""
    expected = {prefix + name: torch.full_like(tensor, 875) for name, tensor in weights(0).items()}
    assert same(load_file(tmp_path / "out.safetensors"), dict(sorted(expected.items())))


def test_what_modules_keep_beside_tensors_is_that_of_the_newest(tmp_path):
    for step in (1, 2):
        state = {**weights(step), "fp8._extra_state": {"step": step}, "inner._extra_state": torch.tensor([step])}
        state["none._extra_state"] = None
        torch.save({"state_dict": state, "global_step": step}, tmp_path / f"{step}.ckpt")
    paths = [tmp_path / "1.ckpt", tmp_path / "2.ckpt"]
    merge_checkpoints(paths, tmp_path / "out.ckpt")
    state = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    assert state["fp8._extra_state"] == {"step": 2}
    assert state["none._extra_state"] is None
    assert int(state["inner._extra_state"]) == 2
    assert state["b"].tolist() == [1.5, 1.5]


class Template(Base):
    """A module as templates for Hydra have it: network and optimizer are hyperparameters."""

    def __init__(self, net, optimizer, width=3):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.hparams["optimizer"](params=self.parameters())


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of", "ignore:Be aware that when using `ckpt_path`")
def test_a_run_whose_hyperparameters_are_objects_can_be_merged_exported_and_annealed(tmp_path):
    def template():
        torch.manual_seed(0)
        return make(Template, net=nn.Linear(6, 3), optimizer=functools.partial(torch.optim.SGD, lr=0.05))

    callback = MergeCallback(2, 5)
    merged = MergedCheckpoint(callback, dirpath=tmp_path / "merged")
    points = ModelCheckpoint(tmp_path / "points", filename="{step}", save_top_k=-1, every_n_train_steps=8)
    fit(template(), tmp_path / "run", callback, merged, points, train=ResumableBatches(), enable_checkpointing=True)
    assert read_provenance(merged.best_model_path)["steps"] == [16, 18, 20, 22, 24]
    paths = [tmp_path / "points" / f"step={step}.ckpt" for step in (8, 16, 24)]
    with pytest.warns(UserWarning, match=r"holds objects, which are not read \(functools.partial, .*linear.Linear"):
        merge_checkpoints(paths, tmp_path / "out.ckpt")
    content = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert content["hyper_parameters"] == {"width": 3}
    states = [torch.load(path, weights_only=False)["state_dict"] for path in paths]
    expected = sum(state["net.weight"].double() for state in states) / 3
    torch.testing.assert_close(content["state_dict"]["net.weight"].double(), expected, rtol=1e-6, atol=1e-7)
    given = {"net": nn.Linear(6, 3), "optimizer": None}
    loaded = type(template()).load_from_checkpoint(tmp_path / "out.ckpt", **given)
    assert torch.equal(loaded.net.weight, content["state_dict"]["net.weight"])
    branch = AnnealBranch(4, record=tmp_path / "records.jsonl", trunk=paths[2])
    # Lightning itself loads hyperparameters that are objects only if it is told that the file is trusted.
    resumed = {"ckpt_path": str(paths[1]), "weights_only": False}
    fit(template(), tmp_path / "branch", MergeCallback(2, 5), branch, train=ResumableBatches(), **resumed)
    (record,) = read_records(tmp_path / "records.jsonl")
    assert record.matched is not None


class Odd:
    """Of which a checkpoint may hold an object."""

    created: list = []  # noqa: RUF012

    def __init__(self):
        self.created.append(self)

    def __reduce__(self):
        return Odd, ()


SHARED = {"dim": 3}
CYCLE: dict = {"list": []}
CYCLE["list"].append(CYCLE["list"])
OBJECTS = {
    "OmegaConf": OmegaConf.create({"a": 1, "b": [1, 2]}),
    "Namespace": argparse.Namespace(a=1),
    "numpy": {"rate": np.float64(1), "array": np.arange(3)},
    "Path": {"path": pathlib.Path("x"), "pure": pathlib.PurePosixPath("y")},
    "loss": {"loss": nn.MSELoss(), "others": [nn.Linear(1, 1)]},
    "function": {"function": json.dumps, "method": "a".join},
    "deque": {"deque": collections.deque([1, 2], maxlen=3), "default": collections.defaultdict(list, a=[1])},
    "counter": {"counter": collections.Counter("aab"), "ordered": collections.OrderedDict(a=1)},
    "bytes": {"io": io.BytesIO(b"abc"), "bytes": b"abc", "array": bytearray(b"abc")},
    "odd": {"odd": Odd()},
    "in keys": {(1, torch.float32): Odd, frozenset([1]): {2, 3}},
    "below a key": {"rates": {argparse.Namespace(a=1).__class__: {"a": 1}}},
    "functions": {"kinds": [set, complex, collections.OrderedDict, torch.Size]},
    "storage": {"storage": torch.ones(2).untyped_storage()},
    "shared": {"blocks": {str(place): SHARED for place in range(50)}},
    "itself": CYCLE,
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_beside_the_weights_are_neither_created_nor_in_the_way(tmp_path, kind):
    for step in (1, 2):
        content = {"state_dict": weights(step), "global_step": step, "hyper_parameters": OBJECTS[kind]}
        torch.save({**content, "callbacks": {"x": OBJECTS[kind]}}, tmp_path / f"{step}.ckpt")
    num_created = len(Odd.created)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*holds objects, which are not read")
        for output in ("out.safetensors", "out.ckpt"):
            merge_checkpoints([tmp_path / "1.ckpt", tmp_path / "2.ckpt"], tmp_path / output)
    assert load_file(tmp_path / "out.safetensors")["b"].tolist() == [1.5, 1.5]
    assert len(Odd.created) == num_created
    # Nothing of ours is in the merge, nor anything that would have to be trusted.
    # Torch trusts no frozen sets.
    content = torch.load(tmp_path / "out.ckpt", weights_only=kind != "in keys")
    assert content["state_dict"]["b"].tolist() == [1.5, 1.5]
    if kind == "shared":
        assert content["hyper_parameters"] == OBJECTS[kind]


def test_plain_values_are_read_as_they_are_and_tensors_where_they_lie(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    content = {
        "plain": [b"", 1, 2.5, True, None, "text", b"bytes", 2**70, (1, (2,)), {3}, frozenset([4]), 1 + 2j],
        "views": [base.t(), base[1:3, ::2], base[2, 3], torch.empty(0, 3)],
        "kinds": [
            torch.tensor([1, 2]).to(dtype) for dtype in (torch.int8, torch.bfloat16, torch.complex64, torch.bool)
        ],
        "rare": [torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn), torch.tensor([7], dtype=torch.uint16)],
        "parameter": nn.Parameter(torch.ones(2)),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "module": nn.Linear(1, 1).state_dict(),
        "sparse": torch.eye(2).to_sparse(),
    }
    torch.save(content, tmp_path / "all.pt")
    found = read_torch_file(tmp_path / "all.pt")
    assert found["plain"] == content["plain"]
    assert same(plain(found)["views"], content["views"])
    assert same(plain(found)["kinds"], content["kinds"])
    for ours, theirs in zip(plain(found)["rare"], content["rare"], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert same(plain(found)["parameter"], content["parameter"].detach())
    assert (found["size"], found["dtype"]) == ((1, 2), torch.float16)
    assert same(plain(found["module"]), dict(content["module"]))
    assert isinstance(found["sparse"], Inert)
    assert inert_names(found) == {"torch._utils._rebuild_sparse_tensor"}


def test_merges_and_averages_are_merged_only_if_asked(tmp_path):
    callback = MergeCallback(1, 4)
    merged = MergedCheckpoint(callback, dirpath=tmp_path / "c", filename="{step}-merged", save_top_k=-1)
    points = ModelCheckpoint(tmp_path / "c", "{step}", save_top_k=-1, every_n_train_steps=8)
    fit(make(Toy), tmp_path / "run", callback, merged, points, enable_checkpointing=True)
    refused = r"merged.ckpt holds a merge by the rule sma of the steps \[.*\], not .*of one step.*of_averages=True"
    with pytest.raises(ValueError, match=refused):
        merge_checkpoints(find_checkpoints(str(tmp_path / "c" / "*.ckpt")), tmp_path / "out.ckpt")
    merges = sorted((tmp_path / "c").glob("*-merged.ckpt"))
    assert len(merge_checkpoints(merges, tmp_path / "out.ckpt", of_averages=True)["steps"]) == len(merges)
    callback.save_merged(tmp_path / "step=1.safetensors")
    with pytest.raises(ValueError, match=r"step=1.safetensors holds a merge by the rule"):
        merge_checkpoints([tmp_path / "step=1.safetensors", merges[0]], tmp_path / "out.ckpt")


@averages_weights
def test_files_of_an_average_are_merged_only_if_asked(tmp_path):
    points = ModelCheckpoint(tmp_path / "c", "{step}", save_top_k=-1, every_n_train_steps=8)
    average = lightning(".callbacks").EMAWeightAveraging(decay=0.9)
    fit(make(Toy), tmp_path / "run", average, points, enable_checkpointing=True)
    paths = find_checkpoints(str(tmp_path / "c" / "*.ckpt"))
    with pytest.raises(ValueError, match=r"step=16.ckpt holds an average over steps, not the weights of one step"):
        merge_checkpoints(paths, tmp_path / "out.ckpt")
    assert merge_checkpoints(paths, tmp_path / "out.ckpt", of_averages=True)["steps"] == [8, 16, 24]


def test_names_of_which_wrappers_would_make_one_stay_two(tmp_path):
    both = {"_orig_mod.w": torch.ones(2), "w": torch.zeros(2)}
    torch.save({"state_dict": both}, tmp_path / "step=1.ckpt")
    torch.save({"state_dict": {"w": torch.zeros(2)}}, tmp_path / "step=2.ckpt")
    with pytest.raises(ValueError, match=r"step=2.ckpt has no tensor _orig_mod.w, which .*step=1.ckpt has"):
        merge_checkpoints([tmp_path / "step=1.ckpt", tmp_path / "step=2.ckpt"], tmp_path / "out.ckpt")


def test_a_checkpoint_with_very_many_dictionaries_is_opened_at_once(tmp_path):
    states = {place: {"step": place} for place in range(30_000)}
    torch.save({"state_dict": weights(1), "global_step": 1, "optimizer": {"state": states}}, tmp_path / "1.ckpt")
    assert open_checkpoint(tmp_path / "1.ckpt").step == 1
