"""The only writer of a live model: other values in, and always the live ones back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from merge_callback.shards import is_shard, local

# What is swapped at the moment, outermost first.
_swaps: list["_Exchange"] = []


def _nothing() -> None:
    pass


@contextmanager
def swapped_weights(
    live: Mapping[str, Tensor], other: Mapping[str, Tensor], before: Callable[[], None] = _nothing
) -> Iterator[None]:
    """Inside the context the live tensors hold other values; afterwards, whatever happened, their own again.

    Of plain tensors the pointers are exchanged, nothing is copied: the live values are never touched, tied tensors stay
    tied, optimizers keep their parameters, and compiled code is not compiled anew. Shards (DTensors) are written in
    place, since FSDP2 would ignore another pointer; meanwhile ``other`` holds the live values.

    Args:
        live: Name -> parameter or buffer of the live model.
        other: Name -> tensor of the same shape, dtype and device as what this process holds of the live one, for every
            name in ``live``. Its own while the context lasts.
        before: Called before each exchange; for a sharded model, `merge_callback.shards.reshard` of it.

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
        own = local(tensor)
        # A wrong dtype would be taken without a word, and the forward pass would then run in it.
        for attribute in ("shape", "dtype", "device"):
            ours, theirs = getattr(own, attribute), getattr(other[name], attribute)
            if ours != theirs:
                raise ValueError(f"{name} has {attribute} {ours} in the model, but {theirs} in what should replace it")
    exchange = _Exchange(live, other, before)
    _swaps.append(exchange)
    try:
        exchange.put_in()
        yield
    finally:
        exchange.put_back()
        _swaps.pop()


@contextmanager
def live_weights() -> Iterator[None]:
    """Inside the context all that `swapped_weights` holds swapped has its live values; afterwards the others again.

    For whoever comes in between, such as a signal handler that saves the run.
    """
    put_back = []
    try:
        for exchange in reversed(_swaps):
            put_back.append(exchange)
            exchange.put_back()
        yield
    finally:
        for exchange in reversed(put_back):
            exchange.put_in()


class _Exchange:
    """Live tensors and what takes their place; both ways can be repeated, also after either was cut short."""

    def __init__(self, live: Mapping[str, Tensor], other: Mapping[str, Tensor], before: Callable[[], None]) -> None:
        self._before = before
        self._plain = {name: tensor for name, tensor in live.items() if not is_shard(tensor)}
        self._others = {name: other[name] for name in self._plain}
        self._own = {name: tensor.data for name, tensor in self._plain.items()}
        self._shards = {
            name: _ShardExchange(local(tensor), other[name]) for name, tensor in live.items() if is_shard(tensor)
        }

    def put_in(self) -> None:
        self._before()
        for name, tensor in self._plain.items():
            tensor.data = self._others[name]
        for shard in self._shards.values():
            shard.put_in()

    def put_back(self) -> None:
        self._before()
        for name, tensor in self._plain.items():
            tensor.data = self._own[name]
        for shard in self._shards.values():
            shard.put_back()


class _ShardExchange:
    """Two tensors that exchange their contents through a third that lives no longer than it takes."""

    def __init__(self, live: Tensor, other: Tensor) -> None:
        self._live, self._other = live, other
        self._is_in = False
        self._own: Tensor | None = None

    @torch.no_grad()
    def put_in(self) -> None:
        if self._is_in:
            return
        self._own = self._live.clone()
        self._live.copy_(self._other)
        self._other.copy_(self._own)
        self._is_in, self._own = True, None

    @torch.no_grad()
    def put_back(self) -> None:
        if self._own is not None:
            # An interrupt came in between.
            self._live.copy_(self._own)
            self._own = None
        elif self._is_in:
            values = self._live.clone()
            self._live.copy_(self._other)
            self._other.copy_(values)
            self._is_in = False
