import torch
from torch import nn

from merge_callback.weights import (
    has_lazy_parameters,
    merged_parameters,
    nonfinite_names,
    snapshot_buffers,
    tensors_by_name,
)
from tests.toys import Toy, make


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
