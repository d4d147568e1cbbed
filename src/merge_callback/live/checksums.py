"""Checksums of what a merge takes from the live model, which tell whether it has changed."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from merge_callback.live.names import clean_name
from merge_callback.live.sharding import local, reshard

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements that are read at once, so that little memory is needed beside the tensor.
_CHUNK_NUMEL = 2**20


def checksums_without(module: nn.Module, names: Collection[str]) -> list[object]:
    """Returns a checksum of each parameter and buffer of a module, except those with these clean names.

    Two results are equal only if the tensors have the same names, shapes and bits, but for a rare coincidence. A tensor
    whose bits cannot be read, such as a sparse one, always counts as changed.
    """
    reshard(module)
    every = ((clean_name(name), t) for name, t in (*module.named_parameters(), *module.named_buffers()))
    own = {name: local(tensor) for name, tensor in every if name not in names and not is_lazy(tensor)}
    readable = {name: tensor for name, tensor in own.items() if _is_readable(tensor)}
    sums: dict[str, object] = {}
    for device in {tensor.device for tensor in readable.values()}:
        names_there = [name for name, tensor in readable.items() if tensor.device == device]
        # One wait for each device.
        numbers = torch.stack([_checksum(readable[name]) for name in names_there]).tolist()
        sums |= dict(zip(names_there, numbers, strict=True))
    return [(name, tensor.shape, sums.get(name, object())) for name, tensor in own.items()]


def _is_readable(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


@torch.no_grad()
def _checksum(tensor: Tensor) -> Tensor:
    """Returns the sum of the elements' bits, each times a number that depends on its place."""
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = numbers.contiguous().view(_INTEGERS[numbers.element_size()]).view(-1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, bits.numel(), _CHUNK_NUMEL):
        chunk = bits[begin : begin + _CHUNK_NUMEL].to(torch.int64)
        places = torch.arange(begin, begin + chunk.numel(), device=tensor.device)
        total += (chunk * (2 * places + 1)).sum()
    return total
