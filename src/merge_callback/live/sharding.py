"""Sharded models: local shards, gathering them, and communication between ranks.

Merging is elementwise, so every rank captures and merges its own shards, and nothing is communicated. Two facts of
torch's FSDP2 and tensor parallelism decide how:

- After a forward pass FSDP2 may leave gathered, plain parameters in place of the sharded ones. Code that reads or
  writes a model must put the shards back first (`reshard`).
- Its all-gather reads an internal buffer, and the shards are views of it. So shards must be written in place; exchanged
  pointers would be ignored.
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
    """Returns True if this process holds only a part of the tensor (a DTensor)."""
    return isinstance(tensor, DTensor)


def is_offloaded(tensor: Tensor) -> bool:
    """Returns whether a shard is kept in host memory, and copied to an accelerator to compute with it."""
    return isinstance(tensor, DTensor) and tensor.device_mesh.device_type != local(tensor).device.type


def reshard(module: nn.Module) -> None:
    """Puts FSDP2's sharded parameters back, without communication. The next forward pass gathers them again."""
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


def local(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a tensor, or a plain tensor itself. It shares memory and has no graph."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor.detach()


def rank() -> int:
    """Returns the global rank of this process; zero without torch.distributed."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def num_ranks() -> int:
    """Returns the number of ranks; one without torch.distributed."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Returns the sum of the tensor over all ranks, on the CPU."""
    if torch.distributed.is_initialized():
        # Such as "cpu:gloo,cuda:nccl". NCCL alone supports GPU tensors only.
        devices = [entry.partition(":")[0] for entry in torch.distributed.get_backend_config().split(",")]
        tensor = tensor.to("cpu" if "cpu" in devices else devices[0])
        torch.distributed.all_reduce(tensor)
    return tensor.cpu()


def local_clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a copy of this process's shard of each tensor (see `local`)."""
    return {name: local(tensor).clone() for name, tensor in tensors.items()}


def export_copy(tensor: Tensor) -> Tensor:
    """Returns a copy for rank 0 to save, in host memory; on other ranks the tensor itself, which nobody saves.

    A shard is copied on all ranks, and stays on its device, since it must still be gathered.
    """
    if is_shard(tensor):
        return tensor.detach().clone()
    return tensor.detach().to("cpu", copy=True) if rank() == 0 else tensor.detach()


def all_gather_dict(found: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns the entries of all ranks, sorted by key. If ranks share a key, the lowest rank's value counts."""
    if not torch.distributed.is_initialized():
        return dict(found)
    entries: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(entries, dict(found))
    together = {key: value for entry in reversed(entries) for key, value in entry.items()}
    return {key: together[key] for key in sorted(together)}


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the whole tensor. A sharded one is gathered from all ranks, on the device of its mesh."""
    if not isinstance(tensor, DTensor):
        return tensor
    # `join` moves an offloaded shard from host memory to the mesh's device.
    return _Spec.of(tensor).join(local(tensor)).full_tensor()


def real_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns `local` of each tensor, complex ones as views of real numbers with a last dimension of two.

    A merge of complex numbers is that of their real and imaginary parts.
    """
    found = ((name, local(tensor)) for name, tensor in tensors.items())
    return {name: torch.view_as_real(own) if own.is_complex() else own for name, own in found}


def as_in(live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns views of values of `real_tensors` as complex numbers again, where the live tensors of the names are."""
    return {name: torch.view_as_complex(v) if live[name].is_complex() else v for name, v in values.items()}


@dataclass(frozen=True)
class _Spec:
    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: DTensor) -> "_Spec":
        """Returns the layout of a DTensor, with global shape and stride: uneven shards do not determine them."""
        return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride())

    @classmethod
    def of_real(cls, tensor: DTensor) -> "_Spec":
        """Returns the layout that a DTensor has among `real_tensors`."""
        spec = cls.of(tensor)
        if not tensor.is_complex():
            return spec
        return replace(spec, shape=torch.Size((*spec.shape, 2)), stride=(*(2 * step for step in spec.stride), 1))

    def join(self, part: Tensor) -> DTensor:
        """Returns the DTensor of which ``part`` is this process's shard. Moves the part to the mesh's device."""
        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


class Sharding:
    """The sharding of a model's tensors, to gather or shard other tensors in the same way.

    Args:
        tensors: Name -> live tensor, sharded or plain.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._specs = {name: _Spec.of_real(tensor) for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        # Cache of `_mesh`, by the model's mesh and device type.
        self._meshes: dict[tuple[DeviceMesh, str], DeviceMesh] = {}

    @property
    def is_sharded(self) -> bool:
        """Whether any tensor is sharded."""
        return bool(self._specs)

    @property
    def ranks(self) -> list[int]:
        """This rank and the number of ranks that hold the tensors together; empty if each holds all of them."""
        return [rank(), num_ranks()] if self._specs else []

    def gather(self, found: Mapping[Any, Any]) -> dict[Any, Any]:
        """Returns the entries of all ranks. For an unsharded model: those of this process, without communication."""
        return all_gather_dict(found) if self._specs else dict(found)

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum over all ranks. For an unsharded model: the tensor itself, without communication."""
        return all_reduce_sum(tensor) if self._specs else tensor

    def num_replicas(self, names: Iterable[str]) -> dict[str, int]:
        """Returns how many ranks hold the same elements of each tensor; one for an unsharded model."""
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
        """Returns the shapes of the whole tensors, given the shapes of this process's shards."""
        return {
            name: list(self._specs[name].shape if name in self._specs else shape) for name, shape in locals_.items()
        }

    def full_tensor(self, name: str, part: Tensor) -> Tensor:
        """Returns the whole tensor, gathered from every rank's part if the live tensor of that name is sharded."""
        return self._specs[name].join(part).full_tensor() if name in self._specs else part

    def as_dtensor(self, name: str, part: Tensor) -> Tensor:
        """Wraps this process's part of a tensor as a DTensor, to save or load it. It stays on its device, ungathered.

        Args:
            name: Name of the live tensor with the same shape. If that is plain, the part itself is returned.
            part: This process's part.
        """
        if (spec := self._specs.get(name)) is None:
            return part
        return replace(spec, mesh=self._mesh(spec, part.device)).join(part)

    def own_part(self, name: str, tensor: Tensor) -> Tensor:
        """Returns this process's part of a whole tensor with the shape of a live one, without communication."""
        if (spec := self._specs.get(name)) is None:
            return tensor
        mesh = self._mesh(spec, tensor.device)
        return distribute_tensor(tensor, mesh, spec.placements, src_data_rank=None).to_local()

    def _mesh(self, spec: _Spec, device: torch.device) -> DeviceMesh:
        """Returns a copy of the live tensor's mesh for another type of device.

        With the live mesh, torch would move tensors from host memory to the GPU, which may have no room for them. The
        dimensions have their own names: torch looks results up by mesh, and must not take this one for the model's.
        """
        if (key := (spec.mesh, device.type)) not in self._meshes:
            names = tuple(f"of_snapshots_{axis}" for axis in range(spec.mesh.ndim))
            self._meshes[key] = DeviceMesh(key[1], spec.mesh.mesh, mesh_dim_names=names, _init_backend=False)
        return self._meshes[key]
