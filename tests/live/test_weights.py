import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from merge_callback.live.weights import (
    LiveTensors,
    has_lazy_parameters,
    merged_parameters,
    nonfinite_names,
    snapshot_buffers,
    tensors_by_name,
)
from tests.helpers.toys import Toy, make


def test_trainable_floating_parameters_are_merged_once_each():
    names = list(merged_parameters(make(Toy)))
    assert names == ["inner.weight", "inner.bias", "norm.weight", "norm.bias", "out.weight", "out.bias"]


def test_persistent_floating_buffers_come_from_the_snapshot_and_no_others():
    assert list(snapshot_buffers(make(Toy))) == ["norm.running_mean", "norm.running_var"]


def test_wrappers_leave_no_trace_in_names():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plain = list(merged_parameters(module))
    module[0] = torch.compile(module[0], backend="eager")
    assert list(merged_parameters(module)) == plain
    assert list(tensors_by_name(module, plain)) == plain


def test_nan_and_infinity_are_found_by_name():
    found = {"good": torch.ones(3), "nan": torch.tensor([1.0, torch.nan]), "inf": torch.tensor([torch.inf])}
    assert nonfinite_names(found) == ["nan", "inf"]


def test_large_but_finite_values_are_no_false_alarm():
    assert nonfinite_names({"large": torch.full((4,), 1e30), "half": torch.full((4,), 6e4).half()}) == []


def test_lazy_parameters_are_recognised_until_they_have_a_shape():
    module = nn.LazyLinear(3)
    assert has_lazy_parameters(module)
    module(torch.ones(1, 2))
    assert not has_lazy_parameters(module)


def remove_a_layer_and_add_another(module):
    del module.out
    module.other = nn.Linear(6, 3)


CHANGES = {
    "unfrozen": lambda module: module.frozen.requires_grad_(True),
    "frozen": lambda module: module.out.bias.requires_grad_(False),
    "replaced layer": lambda module: setattr(module, "out", nn.Linear(6, 3)),
    "replaced parameter": lambda module: setattr(module.out, "bias", nn.Parameter(torch.ones(3))),
    "added layer": lambda module: setattr(module.out, "inside", nn.Linear(2, 2)),
    "layer for layer": remove_a_layer_and_add_another,
    "pruned": lambda module: prune.l1_unstructured(module.out, "weight", 0.5),
    "parametrised": lambda module: parametrizations.weight_norm(module.out),
    "compiled": lambda module: setattr(module, "out", torch.compile(module.out, backend="eager")),
    "dtype": lambda module: module.out.double(),
    "shape": lambda module: setattr(module.out.weight, "data", torch.ones(5, 6)),
    "added buffer": lambda module: module.out.register_buffer("seen", torch.zeros(2)),
    "renamed layer": lambda module: module.add_module("head", module._modules.pop("out")),
    "buffer that is saved no more": lambda module: module.norm.register_buffer(
        "running_mean", module.norm.running_mean, persistent=False
    ),
    "removed buffer": lambda module: delattr(module, "position_ids"),
    "buffer of another kind": lambda module: setattr(module, "position_ids", torch.zeros(6)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_live_tensors_are_found_again_after_any_change_of_the_module(change):
    module = make(Toy)
    live = LiveTensors(module)
    assert live.find() == live.find()
    before = live.find()
    CHANGES[change](module)
    assert live.find() > before
    expected = merged_parameters(module), snapshot_buffers(module)
    for found, wanted in zip((live.parameters(), live.buffers()), expected, strict=True):
        assert list(found) == list(wanted)
        assert all(found[name] is tensor for name, tensor in wanted.items())


def test_a_buffer_that_another_one_replaced_is_the_one_that_is_copied():
    module = make(Toy)
    live = LiveTensors(module)
    before = live.find()
    module.norm.running_mean = torch.full((6,), 7.0)
    assert live.find() == before
    assert live.buffers()["norm.running_mean"] is module.norm.running_mean
