"""The only writer of a live model: other values in, and always the live ones back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

# What is swapped at the moment, outermost first: the live tensors and their own values.
_swaps: list[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = []


@contextmanager
def swapped_weights(live: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the context the live tensors hold other values; afterwards, whatever happened, their own again.

    Pointers are exchanged, nothing is copied: the live values are never touched, tied tensors stay tied, optimizers
    keep their parameters, and compiled code is not compiled anew.

    Args:
        live: Name -> parameter or buffer of the live model.
        other: Name -> tensor of the same shape, dtype and device, for every name in ``live``.

    Raises:
        ValueError: If a tensor is missing or differs in shape, dtype or device; nothing was exchanged then.

    >>> import torch
    >>> weight = torch.zeros(2)
    >>> with swapped_weights({"weight": weight}, {"weight": torch.ones(2)}):
    ...     print(weight)
    tensor([1., 1.])
    >>> weight
    tensor([0., 0.])
    """
    for name, tensor in live.items():
        if name not in other:
            raise ValueError(f"no tensor to put in the place of {name}")
        # A wrong dtype would be taken without a word, and the forward pass would then run in it.
        for attribute in ("shape", "dtype", "device"):
            ours, theirs = getattr(tensor, attribute), getattr(other[name], attribute)
            if ours != theirs:
                raise ValueError(f"{name} has {attribute} {ours} in the model, but {theirs} in what should replace it")
    saved = {name: tensor.data for name, tensor in live.items()}
    _swaps.append((live, saved))
    try:
        for name, tensor in live.items():
            tensor.data = other[name]
        yield
    finally:
        for name, tensor in live.items():
            tensor.data = saved[name]
        _swaps.pop()


@contextmanager
def live_weights() -> Iterator[None]:
    """Inside the context all that `swapped_weights` holds swapped has its live values; afterwards the others again.

    For whoever comes in between, such as a signal handler that saves the run.
    """
    exchanged = []
    try:
        for live, saved in reversed(_swaps):
            exchanged.append((live, {name: tensor.data for name, tensor in live.items()}))
            for name, tensor in live.items():
                tensor.data = saved[name]
        yield
    finally:
        for live, others in reversed(exchanged):
            for name, tensor in live.items():
                tensor.data = others[name]
