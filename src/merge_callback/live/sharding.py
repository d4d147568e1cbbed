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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, distribute_tensor


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


def rank() -> int:
    """The number of this process among those of the job."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks of a job."""
    if torch.distributed.is_initialized():
        # NCCL knows tensors of a GPU only.
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        tensor = tensor.to(device)
        torch.distributed.all_reduce(tensor)
    return tensor.cpu()


def local_clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what this process holds of each tensor."""
    return {name: local(tensor).clone() for name, tensor in tensors.items()}


def export_copy(tensor: Tensor) -> Tensor:
    """A copy to be saved: in host memory, but of a shard where the shard is, since it is still to be gathered."""
    return tensor.detach().clone() if is_shard(tensor) else tensor.detach().to("cpu", copy=True)


def all_gather_dict(found: Mapping[Any, Any]) -> dict[Any, Any]:
    """The entries of all ranks, in an order that is the same everywhere."""
    if not torch.distributed.is_initialized():
        return dict(found)
    entries: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(entries, dict(found))
    together = {key: value for entry in reversed(entries) for key, value in entry.items()}
    return {key: together[key] for key in sorted(together)}


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks if it is sharded, on the device where they communicate."""
    if not isinstance(tensor, DTensor):
        return tensor
    # An offloaded shard lies in host memory.
    return _Spec.of(tensor).join(local(tensor)).full_tensor()


def local_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`local` of each."""
    return {name: local(tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _Spec:
    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: DTensor) -> "_Spec":
        """How a distributed tensor is spread; global shape and stride have to be told, since shards may be uneven."""
        return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride())

    def join(self, part: Tensor) -> DTensor:
        """The distributed tensor of which this process holds that part; moves it to the device of the mesh."""
        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


class Sharding:
    """How the tensors of a model are spread over ranks, so that tensors shaped like its shards can be, too.

    Args:
        tensors: Name -> live tensor, sharded or plain.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._specs = {name: _Spec.of(tensor) for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        # By the model's mesh and a kind of device; see `_mesh`.
        self._meshes: dict[tuple[DeviceMesh, str], DeviceMesh] = {}

    @property
    def is_sharded(self) -> bool:
        """Whether any tensor is."""
        return bool(self._specs)

    def gather(self, found: Mapping[Any, Any]) -> dict[Any, Any]:
        """The entries of all ranks; of a model that is not sharded, those of this process, without communication."""
        return all_gather_dict(found) if self._specs else dict(found)

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks; of a model that is not sharded, the tensor itself, without communication."""
        return all_reduce_sum(tensor) if self._specs else tensor

    def num_replicas(self, names: Iterable[str]) -> dict[str, int]:
        """How many ranks hold the same elements of each tensor; one for a model that is not sharded."""
        if not self._specs:
            return dict.fromkeys(names, 1)
        return {name: self._num_replicas_of(name) for name in names}

    def _num_replicas_of(self, name: str) -> int:
        num_ranks = torch.distributed.get_world_size()
        if (spec := self._specs.get(name)) is None:
            return num_ranks
        shards = [spec.mesh.size(axis) for axis, placed in enumerate(spec.placements) if not placed.is_replicate()]
        return num_ranks // math.prod(shards)

    def shapes(self, locals_: Mapping[str, torch.Size]) -> dict[str, list[int]]:
        """Shapes of the whole tensors, given those of this process's."""
        return {
            name: list(self._specs[name].shape if name in self._specs else shape) for name, shape in locals_.items()
        }

    def full_tensor(self, name: str, part: Tensor) -> Tensor:
        """The tensor of which every rank holds its part, gathered where the live one of that name is sharded."""
        return self._specs[name].join(part).full_tensor() if name in self._specs else part

    def as_dtensor(self, name: str, part: Tensor) -> Tensor:
        """A part of a distributed tensor as one: left where it is, to be written or read, and not gathered.

        Args:
            name: Of a live tensor; where that is plain, the part itself is returned.
            part: What this process holds of a tensor that is shaped like it.
        """
        if (spec := self._specs.get(name)) is None:
            return part
        return replace(spec, mesh=self._mesh(spec, part.device)).join(part)

    def own_part(self, name: str, tensor: Tensor) -> Tensor:
        """What this process holds of a whole tensor that is shaped like a live one; nothing is communicated."""
        if (spec := self._specs.get(name)) is None:
            return tensor
        mesh = self._mesh(spec, tensor.device)
        return distribute_tensor(tensor, mesh, spec.placements, src_data_rank=None).to_local()

    def _mesh(self, spec: _Spec, device: torch.device) -> DeviceMesh:
        """The mesh of the live tensor, for tensors on another kind of device.

        torch would move them to the device of the live tensor's mesh, and a GPU need not hold what host memory was
        chosen for. The names keep it from passing for the model's own mesh, which torch looks results up by.
        """
        if (key := (spec.mesh, device.type)) not in self._meshes:
            names = tuple(f"of_snapshots_{axis}" for axis in range(spec.mesh.ndim))
            self._meshes[key] = DeviceMesh(key[1], spec.mesh.mesh, mesh_dim_names=names, _init_backend=False)
        return self._meshes[key]
