"""Which tensors of a live model are merged, under which names. The only reader of a live model."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from merge_callback.shards import reshard

# Names that wrappers put into the path of a parameter: torch.compile, activation checkpointing, FSDP.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def clean_name(name: str) -> str:
    """The name that a tensor has in the module as its author wrote it, without what wrappers add.

    >>> clean_name("gpt._orig_mod.blocks.0._checkpoint_wrapped_module.mlp.weight")
    'gpt.blocks.0.mlp.weight'
    """
    return _WRAPPERS.sub("", name)


def merged_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a merge averages: trainable, floating point, each once however often it is tied.

    Returns:
        Clean name -> live parameter, in the module's order; of a sharded model the sharded ones. Frozen ones are
        absent: they come from the live model.
    """
    reshard(module)
    return {
        clean_name(name): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    }


def snapshot_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a merge takes from the newest snapshot: floating point and part of the state dict.

    Returns:
        Clean name -> live buffer. Integer buffers (counters, position ids) and non-persistent ones (caches, masks) are
        absent: they come from the live model and are never averaged.
    """
    buffers = {}
    for name, buffer in module.named_buffers():
        path, _, leaf = name.rpartition(".")
        if buffer.is_floating_point() and leaf not in module.get_submodule(path)._non_persistent_buffers_set:
            buffers[clean_name(name)] = buffer
    return buffers


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


def nonfinite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity; reads each tensor once and synchronises once."""
    norms = torch._foreach_norm([tensor.detach() for tensor in tensors.values()])
    if torch.stack([norm.float() for norm in norms]).isfinite().all():
        return []
    # A norm may overflow where no element does, so the verdict is by element.
    return [name for name, tensor in tensors.items() if not tensor.detach().isfinite().all()]


def size_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that the tensors' elements take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
