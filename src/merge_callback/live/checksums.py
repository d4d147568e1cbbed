"""Checksums of what a merge takes from the live model, which tell whether it has changed."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from merge_callback.live.names import clean_name
from merge_callback.live.sharding import local, reshard

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums_without(module: nn.Module, names: Collection[str]) -> list[object]:
    """Returns a checksum of each parameter and buffer of a module, except those with these clean names.

    Two results are equal only if the tensors have the same names, shapes and bits, except by a coincidence of sums. A
    tensor whose bits cannot be read, such as a sparse one, always counts as changed.
    """
    reshard(module)
    own = [(clean_name(name), local(t)) for name, t in (*module.named_parameters(), *module.named_buffers())]
    return [(name, tensor.shape, _checksum(tensor)) for name, tensor in own if name not in names]


@torch.no_grad()
def _checksum(tensor: Tensor) -> object:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return object()
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return int(numbers.contiguous().view(_INTEGERS[numbers.element_size()]).sum(dtype=torch.int64))
