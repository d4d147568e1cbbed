"""Lets the hooks of an extra validation write to copies of the tensors that training continues from."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from merge_callback.live.sharding import is_shard, local, local_clones, reshard
from merge_callback.live.swap import is_swapped, restored_contents, swapped_weights
from merge_callback.live.weights import is_number
from merge_callback.utilities.devices import free_bytes

# Share of a device's free memory that copies of parameters, and copies of optimizer states, may take.
ROOM_SHARE = 0.25


@contextmanager
def isolated_tensors(module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> Iterator[None]:
    """Restores buffers, parameters and the tensors of optimizer states after the context, whoever writes to them.

    Inside the context they are copies, except for parameters that `swapped_weights` has exchanged already. Buffers are
    always copied. Parameters, and the states of optimizers, are copied if they fit into a quarter of the free memory.
    Otherwise they stay where they are, and a warning names those that were written to.

    Args:
        module: The live model.
        optimizers: Its optimizers.
    """
    reshard(module)
    buffers = dict(module.named_buffers())
    parameters = {name: each for name, each in module.named_parameters() if not is_swapped(each)}
    states = {
        f"{type(optimizer).__name__}.state[{number}][{key!r}]": value
        for optimizer in optimizers
        for number, state in enumerate(optimizer.state.values())
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    with ExitStack() as stack:
        for found, is_always_copied in ((buffers, True), (parameters, False), (states, False)):
            tensors = {name: tensor for name, tensor in found.items() if _can_be_copied(tensor)}
            if is_always_copied or _is_room_for(tensors.values()):
                shards = {name: tensor for name, tensor in tensors.items() if is_shard(tensor)}
                stack.enter_context(restored_contents(shards, partial(reshard, module)))
                plain = {name: tensor for name, tensor in tensors.items() if name not in shards}
                stack.enter_context(swapped_weights(plain, local_clones(plain)))
            else:
                stack.enter_context(_noticed(tensors))
        yield


def _can_be_copied(tensor: Tensor) -> bool:
    # Wrappers of other tensors have no memory of their own.
    is_ordinary = is_shard(tensor) or type(tensor.data) is Tensor
    return is_ordinary and not is_lazy(tensor) and not tensor.is_meta and tensor.layout is torch.strided


def _is_room_for(tensors: Iterable[Tensor]) -> bool:
    required: dict[torch.device, int] = {}
    for tensor in map(local, tensors):
        required[tensor.device] = required.get(tensor.device, 0) + tensor.nbytes
    return all(size <= ROOM_SHARE * (free_bytes(device) or 0) for device, size in required.items())


@contextmanager
def _noticed(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Warns of tensors that were written to inside the context."""
    before = _fingerprints(tensors)
    yield
    after = _fingerprints(tensors)
    if changed := [name for name, found in before.items() if after[name] != found]:
        more = f" and to {len(changed) - 1} more" if len(changed) > 1 else ""
        warnings.warn(
            f"A validation hook writes to {changed[0]}{more}. There is no room for a copy, so the validation of a merge"
            " cannot undo this: training differs from a run without the merge callback.",
            stacklevel=2,
        )


@torch.no_grad()
def _fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int, float]]:
    """Returns what changes if a tensor is written to or replaced: its place, torch's count of writes, and its norm."""
    own = {name: local(tensor) for name, tensor in tensors.items()}
    places = {name: (tensor.data_ptr(), tensors[name]._version) for name, tensor in own.items()}
    norms = dict.fromkeys(own, 0.0)
    floating = {name: tensor for name, tensor in own.items() if is_number(tensor) and tensor.numel()}
    if floating:
        found = torch._foreach_norm(list(floating.values()))
        of_all = torch.stack([norm.to("cpu", torch.float64).nan_to_num() for norm in found])
        norms.update(zip(floating, of_all.tolist(), strict=True))
    return {name: (*place, norms[name]) for name, place in places.items()}
