"""Swaps other weights into the live model and always restores the live ones. Only this file writes to a live model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from merge_callback.live.sharding import is_offloaded, is_shard, local, local_clones
from merge_callback.merging.combine import ScratchBuffer, flat_chunks

# The active swaps, outermost first.
_swaps: list["_Exchange"] = []


def _nothing() -> None:
    pass


@contextmanager
def swapped_weights(
    live: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    before: Callable[[], None] = _nothing,
    *,
    in_place: bool = False,
) -> Iterator[None]:
    """Gives live tensors other values inside the context, and always restores their own afterwards.

    For plain tensors only pointers are exchanged and nothing is copied. So the live values are never touched, tied
    tensors stay tied, optimizers keep their parameters, and compiled code is not recompiled. Two kinds are written in
    place instead: shards (DTensors), since FSDP2 would ignore another pointer, and tensors whose other values are on
    another device. For these, ``other`` is the storage for the live values, and keeps them from then on.

    Args:
        live: Name -> parameter or buffer of the live model.
        other: Name -> tensor, for every name in ``live``, with the shape and dtype of this process's part of the live
            tensor. The context owns these tensors while it lasts.
        before: Called before each exchange. For a sharded model this must call `merge_callback.live.sharding.reshard`.
        in_place: Whether all tensors are written in place. CUDA graphs need this, since they use fixed addresses.

    Raises:
        ValueError: If a tensor is missing, differs in shape or dtype, or has no values (meta device). Nothing is
            exchanged then.

    Examples:
        >>> import torch
        >>> weight = torch.zeros(2)
        >>> with swapped_weights({"weight": weight}, {"weight": torch.ones(2)}):
        ...     print(weight)
        tensor([1., 1.])
        >>> weight
        tensor([0., 0.])
    """
    exchange = _Exchange(live, other, before, in_place)
    _swaps.append(exchange)
    try:
        exchange.put_in()
        yield
    finally:
        try:
            exchange.put_back(for_good=True)
        except BaseException:
            # A second interrupt may have stopped the restore halfway. Restoring can be repeated, so do all of it again.
            exchange.put_back(for_good=True)
            raise
        finally:
            _swaps.pop()


@torch.no_grad()
def overwrite_(live: Mapping[str, Tensor], values: Mapping[str, Tensor], before: Callable[[], None] = _nothing) -> None:
    """Copies values into live tensors permanently; training continues from them.

    Args:
        live: Name -> parameter or buffer of the live model.
        values: Name -> tensor, for every name in ``live``, with the shape of this process's part of the live tensor.
        before: Called before writing, as in `swapped_weights`.

    Raises:
        ValueError: If a tensor is missing or has another shape. Nothing is written then.
    """
    before()
    pairs = []
    for name, tensor in live.items():
        if name not in values:
            raise ValueError(f"no tensor to put in the place of {name}")
        own = local(tensor)
        if own.shape != values[name].shape:
            raise ValueError(_misfit(name, own, values[name]))
        pairs.append((own, values[name]))
    for own, value in pairs:
        own.copy_(value)


@contextmanager
def restored_contents(live: Mapping[str, Tensor], before: Callable[[], None]) -> Iterator[None]:
    """Restores the contents of tensors after the context, whoever writes to them inside it.

    For shards, whose pointers cannot be exchanged. It takes less time than exchanging their contents.

    Args:
        live: Name -> tensor.
        before: Called before the contents are written back, as in `swapped_weights`.
    """
    copies = local_clones(live)
    try:
        yield
    finally:
        before()
        for name, tensor in live.items():
            local(tensor).copy_(copies[name])


@contextmanager
def live_weights() -> Iterator[None]:
    """Restores the live values of all active `swapped_weights` inside the context, and swaps the others in afterwards.

    For code that runs in the middle of a swap, such as a signal handler that saves the run.
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


def is_swapped(tensor: Tensor) -> bool:
    """Returns whether an active `swapped_weights` has given a live tensor other values."""
    return any(id(tensor) in exchange.live for exchange in _swaps)


class _Exchange:
    """Live tensors and the values that replace them. Both directions can be repeated, also after an interrupt."""

    def __init__(
        self, live: Mapping[str, Tensor], other: Mapping[str, Tensor], before: Callable[[], None], in_place: bool
    ) -> None:
        self._before = before
        # Identities of the live tensors.
        self.live = {id(tensor) for tensor in live.values()}
        # FSDP2 may still be copying offloaded shards from host memory to the device, which runs asynchronously.
        self._is_offloaded = any(map(is_offloaded, live.values()))
        # Live tensor, its own values, its other values.
        self._pointers: list[tuple[Tensor, Tensor, Tensor]] = []
        self._contents: list[_Contents] = []
        scratches: dict[tuple[torch.dtype, torch.device], ScratchBuffer] = {}
        for name, tensor in live.items():
            if (values := other.get(name)) is None:
                raise ValueError(f"no tensor to put in the place of {name}")
            is_part = is_shard(tensor)
            own = local(tensor) if is_part else tensor.data
            # torch accepts `data` of another dtype silently, and the forward pass would run in that dtype.
            if own.shape != values.shape or own.dtype != values.dtype or own.is_meta != values.is_meta:
                raise ValueError(_misfit(name, own, values))
            if in_place or is_part or own.device != values.device:
                scratch = scratches.setdefault((own.dtype, own.device), ScratchBuffer(own.dtype))
                self._contents += [_Contents(part, other, scratch) for part, other in flat_chunks(own, values)]
                if not is_part:
                    # Whoever moves the module inside the context, as `Trainer.test` does, gives it other memory.
                    self._pointers.append((tensor, own, own))
            else:
                self._pointers.append((tensor, own, values))

    @torch.no_grad()
    def put_in(self) -> None:
        self._settle()
        for tensor, _, values in self._pointers:
            tensor.data = values
        for contents in self._contents:
            contents.put_in()

    @torch.no_grad()
    def put_back(self, *, for_good: bool = False) -> None:
        self._settle()
        for tensor, own, _ in self._pointers:
            tensor.data = own
        # In reverse order: an interrupted exchange has its live values only in the shared scratch buffer, and must be
        # restored before others use it.
        for contents in reversed(self._contents):
            contents.put_back(for_good=for_good)

    def _settle(self) -> None:
        self._before()
        if self._is_offloaded:
            torch.accelerator.synchronize()


def _misfit(name: str, own: Tensor, values: Tensor) -> str:
    attribute = next(each for each in ("shape", "dtype", "device") if getattr(own, each) != getattr(values, each))
    ours, theirs = getattr(own, attribute), getattr(values, attribute)
    return f"{name} has {attribute} {ours} in the model, but {theirs} in what should replace it"


class _Contents:
    """Exchanges the contents of two tensors through a scratch buffer, which all exchanges share."""

    def __init__(self, live: Tensor, other: Tensor, scratch: ScratchBuffer) -> None:
        self._live, self._other, self._scratch = live, other, scratch
        self._is_in = False
        # The live values in the scratch buffer, while an exchange is incomplete.
        self._own: Tensor | None = None

    def put_in(self) -> None:
        if self._is_in:
            return
        own = self._scratch.like(self._live).copy_(self._live)
        # A signal handler may run after a copy and complete the whole exchange.
        if self._is_in:
            return
        self._own = own
        self._live.copy_(self._other)
        if self._is_in:
            return
        self._other.copy_(own)
        self._is_in, self._own = True, None

    def put_back(self, *, for_good: bool) -> None:
        if self._own is not None:
            # Interrupted halfway: the live tensor may already hold the other values.
            if not for_good:
                self._other.copy_(self._live)
            self._live.copy_(self._own)
            self._is_in, self._own = False, None
        elif self._is_in and for_good:
            self._live.copy_(self._other)
            self._is_in = False
        elif self._is_in:
            values = self._scratch.like(self._live).copy_(self._live)
            self._live.copy_(self._other)
            self._is_in = False
            self._other.copy_(values)
