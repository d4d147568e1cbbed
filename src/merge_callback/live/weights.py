"""Which tensors of a live model are merged, under which names. The only reader of a live model."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import is_lazy

from merge_callback.live.names import EVERYTHING, Selection, clean_name
from merge_callback.live.sharding import is_shard, local_tensors, reshard


def merged_parameters(module: nn.Module, selection: Selection = EVERYTHING) -> dict[str, nn.Parameter]:
    """The parameters that a merge averages: trainable, floating point, each once however often it is tied.

    Args:
        module: The live model.
        selection: Leaves some of them out; a tied one is known by the first of its names.

    Returns:
        Clean name -> live parameter, in the module's order; of a sharded model the sharded ones. Frozen ones are
        absent: they come from the live model.
    """
    reshard(module)
    named = ((clean_name(name), parameter) for name, parameter in module.named_parameters())
    return {
        name: parameter
        for name, parameter in named
        if parameter.requires_grad and parameter.is_floating_point() and selection(name)
    }


def describe_left_out(module: nn.Module, selection: Selection) -> str:
    """Which trainable parameters a selection leaves to the live model, in words; empty if it leaves none."""
    if selection.is_everything:
        return ""
    out = {name: p for name, p in merged_parameters(module).items() if not selection(name)}
    num = sum(parameter.numel() for parameter in out.values())
    names = ", ".join([*list(out)[:3], *(["..."] if len(out) > 3 else [])])
    return f", without {len(out)} parameters of {num:,} elements, which stay live ({names})" if out else ""


def snapshot_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a merge takes from the newest snapshot: floating point and part of the state dict.

    Returns:
        Clean name -> live buffer. Integer buffers (counters, position ids) and non-persistent ones (caches, masks) are
        absent: they come from the live model and are never averaged.
    """
    return _owned_buffers(_buffer_owners(module))


def _buffer_owners(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where `snapshot_buffers` finds them: the submodule and the name in it."""
    owners = {}
    for name, buffer in module.named_buffers():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if buffer.is_floating_point() and leaf not in owner._non_persistent_buffers_set:
            owners[clean_name(name)] = owner, leaf
    return owners


def _owned_buffers(owners: Mapping[str, tuple[nn.Module, str]]) -> dict[str, Tensor]:
    return {name: owner._buffers[leaf] for name, (owner, leaf) in owners.items()}  # type: ignore[misc]


class LiveTensors:
    """What of a module is merged, found anew only when the module has changed.

    A walk over the names of many submodules takes longer than averaging their weights does, and is due at every step.

    Args:
        module: The live model.
        selection: As for `merged_parameters`.
    """

    def __init__(self, module: nn.Module, selection: Selection = EVERYTHING) -> None:
        self.module = module
        self.selection = selection
        self._num_found = 0
        self._find()

    def find(self) -> int:
        """Looks whether the module has changed; returns a number that goes up when it has."""
        for submodule in self._resharded:
            submodule.reshard()
        if self._is_changed():
            self._find()
        return self._num_found

    def parameters(self) -> Mapping[str, Tensor]:
        """`merged_parameters`, or of a sharded model what this process holds of them; as of the last `find`."""
        return self._own(self._parameters)

    def buffers(self) -> dict[str, Tensor]:
        """`snapshot_buffers`; as of the last `find`."""
        return _owned_buffers(self._owners)

    def _find(self) -> None:
        self._num_found += 1
        submodules = list(self.module.modules())
        self._resharded = [submodule for submodule in submodules if isinstance(submodule, FSDPModule)]
        self._parameters = merged_parameters(self.module, self.selection)
        self._owners = _buffer_owners(self.module)
        # Plain parameters are their own local tensors; to ask each of thousands at every step takes too long.
        self._own: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = (
            local_tensors if any(map(is_shard, self._parameters.values())) else _same
        )
        fixed: list[Mapping[str, Any]] = [
            contents for submodule in submodules for contents in (submodule._modules, submodule._parameters)
        ]
        buffers = [submodule._buffers for submodule in submodules]
        # Most are empty; that they still are is seen by their sizes.
        self._contents = [*fixed, *buffers]
        self._num_entries = sum(map(len, self._contents))
        self._fixed, self._buffers = [each for each in fixed if each], [each for each in buffers if each]
        self._not_persistent = [each._non_persistent_buffers_set for each in submodules if each._buffers]
        # Held, so that no others can pass for them.
        self._found = _values(self._fixed)
        self._all_parameters = [each for each in self._found if isinstance(each, Tensor)]
        self._decisive = self._look()

    def _is_changed(self) -> bool:
        if sum(map(len, self._contents)) != self._num_entries:
            return True
        now = _values(self._fixed)
        is_same = len(now) == len(self._found) and all(map(is_, now, self._found))
        return not is_same or self._look() != self._decisive

    def _look(self) -> list[Any]:
        """What decides whether parameters and buffers are merged, and as what; other buffers may take their places."""
        parameters = [(each.dtype, each.shape) if each.requires_grad else None for each in self._all_parameters]
        buffers = [None if buffer is None else buffer.dtype for buffer in _values(self._buffers)]
        names = chain.from_iterable([*self._fixed, *self._buffers])
        return [*parameters, *buffers, *names, *map(len, self._not_persistent)]


def _values(contents: Iterable[Mapping[str, Any]]) -> list[Any]:
    return list(chain.from_iterable([content.values() for content in contents]))


def _same(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return tensors


def tensors_by_name(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The module's live parameters and buffers of those clean names, whether trainable or not.

    Raises:
        ValueError: If the module has no tensor of a name.
    """
    reshard(module)
    live: dict[str, Tensor] = {clean_name(name): tensor for name, tensor in module.named_parameters()}
    live.update((clean_name(name), tensor) for name, tensor in module.named_buffers())
    if missing := [name for name in names if name not in live]:
        raise ValueError(f"{type(module).__name__} has no {missing[0]}, which is part of the merge")
    return {name: live[name] for name in names}


def has_lazy_parameters(module: nn.Module) -> bool:
    """Whether some parameters get their shapes only in the first forward pass."""
    return any(is_lazy(parameter) for parameter in module.parameters())


@torch.no_grad()
def nonfinite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity; reads each tensor once and synchronises once."""
    norms = torch._foreach_norm(list(tensors.values()))
    if norms and torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).isfinite().all():
        return []
    # A norm may overflow where no element does, so the verdict is by element.
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def size_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that the tensors' elements take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
