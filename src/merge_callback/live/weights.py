"""Finds the tensors of a live model that are merged, by name. Captures read the model only through this file."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import is_lazy

from merge_callback.live.names import EVERYTHING, Selection, clean_name
from merge_callback.live.sharding import is_shard, local, real_tensors, reshard
from merge_callback.merging.combine import is_narrow


def merged_parameters(module: nn.Module, selection: Selection = EVERYTHING) -> dict[str, nn.Parameter]:
    """Returns the parameters that a merge averages: trainable, real or complex, and each tied one only once.

    Args:
        module: The live model.
        selection: Which parameters to merge; all by default. A tied parameter has the first of its names.

    Returns:
        Clean name -> live parameter, in the module's order. For a sharded model, the sharded parameters. Frozen
        parameters are absent; a merge takes them from the live model.
    """
    reshard(module)
    named = ((clean_name(name), parameter) for name, parameter in module.named_parameters())
    return {
        name: parameter
        for name, parameter in named
        if parameter.requires_grad and is_number(parameter) and not is_lazy(parameter) and selection(name)
    }


def is_number(tensor: Tensor) -> bool:
    """Returns whether the elements of a tensor are real or complex floating-point numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def refuse_narrow(parameters: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a parameter has too few bits to be summed."""
    for name, parameter in parameters.items():
        if is_narrow(parameter.dtype):
            raise ValueError(
                f"the parameter {name} is {parameter.dtype}, which is not summed; parts=Parts(exclude=[{name!r}])"
                " leaves it out of the merges, where it stays live"
            )


def describe_left_out(module: nn.Module, selection: Selection) -> str:
    """Returns a phrase about the trainable parameters that a selection excludes; empty if it excludes none."""
    if selection.is_everything:
        return ""
    out = {name: p for name, p in merged_parameters(module).items() if not selection(name)}
    num = sum(parameter.numel() for parameter in out.values())
    names = ", ".join([*list(out)[:3], *(["..."] if len(out) > 3 else [])])
    return f", without {len(out)} parameters of {num:,} elements, which stay live ({names})" if out else ""


def snapshot_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that a merge takes from the newest snapshot: real or complex, and part of the state dict.

    Returns:
        Clean name -> live buffer. Integer buffers (counters, position ids) and non-persistent ones (caches, masks) are
        absent. A merge takes them from the live model, and never averages them.
    """
    return _owned_buffers(_buffer_owners(module))


def _buffer_owners(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Returns clean name -> (submodule, name in it) for each of the `snapshot_buffers`."""
    owners = {}
    for name, buffer in module.named_buffers():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        is_saved = leaf not in owner._non_persistent_buffers_set
        if is_number(buffer) and is_saved and not is_lazy(buffer):
            owners[clean_name(name)] = owner, leaf
    return owners


def _owned_buffers(owners: Mapping[str, tuple[nn.Module, str]]) -> dict[str, Tensor]:
    return {name: owner._buffers[leaf] for name, (owner, leaf) in owners.items()}  # type: ignore[misc]


class LiveTensors:
    """The tensors of a module that are merged. They are searched again only if the module has changed.

    They are needed at every step, and a search through many submodules takes longer than averaging their weights.

    Args:
        module: The live model.
        selection: Which parameters to merge, as in `merged_parameters`.
    """

    def __init__(self, module: nn.Module, selection: Selection = EVERYTHING) -> None:
        self.module = module
        self.selection = selection
        self._num_found = 0
        self._find()

    def find(self) -> int:
        """Updates the tensors if the module has changed. Returns a number that increases with each change."""
        for submodule in self._resharded:
            submodule.reshard()
        if self._is_changed():
            self._find()
        return self._num_found

    def parameters(self) -> Mapping[str, Tensor]:
        """Returns the `real_tensors` of `merged_parameters` as of the last `find`."""
        return self._own(self._parameters)

    def buffers(self) -> dict[str, Tensor]:
        """Returns `snapshot_buffers` as of the last `find`."""
        return _owned_buffers(self._owners)

    def _find(self) -> None:
        self._num_found += 1
        submodules = list(self.module.modules())
        self._resharded = [submodule for submodule in submodules if isinstance(submodule, FSDPModule)]
        self._parameters = merged_parameters(self.module, self.selection)
        self._owners = _buffer_owners(self.module)
        # A view of each of thousands of plain parameters at every step would take too long.
        is_plain = not any(is_shard(each) or each.is_complex() for each in self._parameters.values())
        self._own: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = _same if is_plain else real_tensors
        fixed: list[Mapping[str, Any]] = [
            contents for submodule in submodules for contents in (submodule._modules, submodule._parameters)
        ]
        buffers = [submodule._buffers for submodule in submodules]
        # Most of these dicts are empty. Their total size tells if one of them is no longer empty.
        self._contents = [*fixed, *buffers]
        self._num_entries = sum(map(len, self._contents))
        self._fixed, self._buffers = [each for each in fixed if each], [each for each in buffers if each]
        self._not_persistent = [each._non_persistent_buffers_set for each in submodules if each._buffers]
        # Keeps references, so that a new object cannot have the identity of a deleted one.
        self._found = _values(self._fixed)
        all_parameters = [each for each in self._found if isinstance(each, Tensor)]
        self._all_parameters = [each for each in all_parameters if not is_lazy(each)]
        self._without_shape = [each for each in all_parameters if is_lazy(each)]
        self._decisive = self._look()

    def _is_changed(self) -> bool:
        if sum(map(len, self._contents)) != self._num_entries:
            return True
        now = _values(self._fixed)
        is_same = len(now) == len(self._found) and all(map(is_, now, self._found))
        return not is_same or self._look() != self._decisive

    def _look(self) -> list[Any]:
        """Returns all that decides which tensors are merged, and under which names. Replacing a buffer is no change."""
        parameters = [(each.dtype, each.shape) if each.requires_grad else None for each in self._all_parameters]
        buffers = [None if buffer is None else buffer.dtype for buffer in _values(self._buffers)]
        # Not the mappings themselves, since those of scripted modules cannot be gone through.
        names = chain.from_iterable(contents.keys() for contents in (*self._fixed, *self._buffers))
        return [*parameters, *map(is_lazy, self._without_shape), *buffers, *names, *map(len, self._not_persistent)]


def _values(contents: Iterable[Mapping[str, Any]]) -> list[Any]:
    return list(chain.from_iterable([content.values() for content in contents]))


def _same(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return tensors


def tensors_by_name(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns the module's live parameters and buffers with the given clean names, trainable or not.

    Raises:
        ValueError: If the module has no tensor with one of the names.
    """
    reshard(module)
    live: dict[str, Tensor] = {clean_name(name): tensor for name, tensor in module.named_parameters()}
    live.update((clean_name(name), tensor) for name, tensor in module.named_buffers())
    if missing := [name for name in names if name not in live]:
        raise ValueError(f"{type(module).__name__} has no {missing[0]}, which is part of the merge")
    return {name: live[name] for name in names}


def has_lazy_parameters(module: nn.Module) -> bool:
    """Returns True if some parameters get their shapes only in the first forward pass."""
    return any(is_lazy(parameter) for parameter in module.parameters())


@torch.no_grad()
def nonfinite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of tensors with NaN or inf. If all are finite, reads each tensor once and synchronises once."""
    norms = torch._foreach_norm(list(tensors.values()))
    if norms and torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).isfinite().all():
        return []
    # A norm may overflow although all elements are finite, so check each element.
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def describe_nonfinite(tensors: Mapping[str, Tensor]) -> str:
    """Returns which of the parameters hold NaN or inf, in words for the user; empty if none does."""
    if not (bad := nonfinite_names(tensors)):
        return ""
    return f"{bad[0]} holds NaN or inf" + (f", and {len(bad) - 1} more parameters do" if len(bad) > 1 else "")


def training_bytes(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Returns the bytes of this process's part of a module and of the states of its optimizers."""
    # Some optimizers keep more in there than a dictionary for each parameter.
    kept = [state for optimizer in optimizers for state in optimizer.state.values() if isinstance(state, dict)]
    states = chain.from_iterable(state.values() for state in kept)
    tensors = [*module.parameters(), *module.buffers(), *(each for each in states if isinstance(each, Tensor))]
    return size_bytes(local(tensor) for tensor in tensors if not is_lazy(tensor))


def size_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the total size of the tensors' elements in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
