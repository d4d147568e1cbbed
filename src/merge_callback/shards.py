"""Sharded models: what a rank holds of each tensor, and how it is told to the rest of the world.

Merging is elementwise, so every rank captures and merges its own shards, and nothing is communicated. Facts of torch's
FSDP2 and tensor parallelism that decide how:

- After a forward pass FSDP2 may leave gathered, plain parameters in the place of the sharded ones. Whoever reads or
  writes a model has to put the shards back first (`reshard`).
- Its all-gather reads a buffer of its own that the shards are views of, so shards are written in place; another pointer
  would be ignored.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement


def is_shard(tensor: Tensor) -> bool:
    """Whether this process holds only its part of the tensor."""
    return isinstance(tensor, DTensor)


def reshard(module: nn.Module) -> None:
    """Puts FSDP2's sharded parameters in their place; nothing is communicated, and the next forward pass gathers."""
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of the tensor, by reference and without a graph; a plain tensor itself."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor.detach()


def added_up(tensor: Tensor) -> Tensor:
    """The sum over all ranks of a job."""
    if torch.distributed.is_initialized():
        # NCCL knows tensors of a GPU only.
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        tensor = tensor.to(device)
        torch.distributed.all_reduce(tensor)
    return tensor.cpu()


def local_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`local` of each."""
    return {name: local(tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _Spec:
    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]


class Sharding:
    """How the tensors of a model are spread over ranks, so that tensors shaped like its shards can be, too.

    Args:
        tensors: Name -> live tensor, sharded or plain.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._specs = {
            # Global shape and stride have to be told: shards may be uneven.
            name: _Spec(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride())
            for name, tensor in tensors.items()
            if isinstance(tensor, DTensor)
        }

    @property
    def is_sharded(self) -> bool:
        """Whether any tensor is."""
        return bool(self._specs)

    def copies(self, names: Iterable[str]) -> dict[str, int]:
        """How many ranks hold the same elements of each tensor; of a model that is not sharded, one."""
        if not self.is_sharded:
            return dict.fromkeys(names, 1)
        return {name: self._num_copies(name) for name in names}

    def _num_copies(self, name: str) -> int:
        num_ranks = torch.distributed.get_world_size()
        if (spec := self._specs.get(name)) is None:
            return num_ranks
        shards = [spec.mesh.size(axis) for axis, placed in enumerate(spec.placements) if not placed.is_replicate()]
        return num_ranks // math.prod(shards)

    def distributed(self, locals_: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as parts of distributed ones where the model's are; nothing is copied or communicated."""
        return {name: self._distributed(name, tensor) for name, tensor in locals_.items()}

    def _distributed(self, name: str, tensor: Tensor) -> Tensor:
        if (spec := self._specs.get(name)) is None:
            return tensor
        return DTensor.from_local(
            tensor, spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride
        )
