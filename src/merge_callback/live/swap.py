"""The only writer of a live model: other values in, and always the live ones back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from merge_callback.live.sharding import is_shard, local
from merge_callback.merging.combine import ScratchBuffer, flat_chunks

# What is swapped at the moment, outermost first.
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
    """Inside the context the live tensors hold other values; afterwards, whatever happened, their own again.

    Of plain tensors the pointers are exchanged, nothing is copied: the live values are never touched, tied tensors stay
    tied, optimizers keep their parameters, and compiled code is not compiled anew. Shards (DTensors) are written in
    place, since FSDP2 would ignore another pointer, and so is what has its other values on another device; ``other``
    then holds the live values from there on.

    Args:
        live: Name -> parameter or buffer of the live model.
        other: Name -> tensor of the same shape and dtype as what this process holds of the live one, for every name in
            ``live``. Its own while the context lasts.
        before: Called before each exchange; for a sharded model, `merge_callback.live.sharding.reshard` of it.
        in_place: Whether all tensors are written in place, as a CUDA graph wants it, which knows them by address.

    Raises:
        ValueError: If a tensor is missing, differs in shape or dtype, or has no values; nothing was exchanged then.

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
            # An impatient interrupt: all of it once more.
            exchange.put_back(for_good=True)
            raise
        finally:
            _swaps.pop()


@torch.no_grad()
def overwrite_(live: Mapping[str, Tensor], values: Mapping[str, Tensor], before: Callable[[], None] = _nothing) -> None:
    """Copies values into live tensors, for good: for what acts on training, which goes on from them.

    Args:
        live: Name -> parameter or buffer of the live model.
        values: Name -> tensor of the same shape, for every name in ``live``; of shards, this process's own.
        before: As for `swapped_weights`.

    Raises:
        ValueError: If a tensor is missing or has another shape; nothing was written then.
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

    def __init__(
        self, live: Mapping[str, Tensor], other: Mapping[str, Tensor], before: Callable[[], None], in_place: bool
    ) -> None:
        self._before = before
        # FSDP2 may still be reading shards that it keeps in host memory: a GPU does what it is asked for later.
        self._is_offloaded = torch.cuda.is_initialized() and any(
            is_shard(tensor) and local(tensor).device.type == "cpu" for tensor in live.values()
        )
        # Live tensor, its own values, the others.
        self._pointers: list[tuple[Tensor, Tensor, Tensor]] = []
        self._contents: list[_Contents] = []
        scratches: dict[tuple[torch.dtype, torch.device], ScratchBuffer] = {}
        for name, tensor in live.items():
            if (values := other.get(name)) is None:
                raise ValueError(f"no tensor to put in the place of {name}")
            is_part = is_shard(tensor)
            own = local(tensor) if is_part else tensor.data
            # A wrong dtype would be taken without a word, and the forward pass would then run in it.
            if own.shape != values.shape or own.dtype != values.dtype or own.is_meta != values.is_meta:
                raise ValueError(_misfit(name, own, values))
            if in_place or is_part or own.device != values.device:
                scratch = scratches.setdefault((own.dtype, own.device), ScratchBuffer(own.dtype))
                self._contents += [_Contents(part, other, scratch) for part, other in flat_chunks(own, values)]
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
        # The one that an interrupt came upon has its live values in the scratch buffer of all: it comes first.
        for contents in reversed(self._contents):
            contents.put_back(for_good=for_good)

    def _settle(self) -> None:
        self._before()
        if self._is_offloaded:
            torch.cuda.synchronize()


def _misfit(name: str, own: Tensor, values: Tensor) -> str:
    attribute = next(each for each in ("shape", "dtype", "device") if getattr(own, each) != getattr(values, each))
    ours, theirs = getattr(own, attribute), getattr(values, attribute)
    return f"{name} has {attribute} {ours} in the model, but {theirs} in what should replace it"


class _Contents:
    """Two tensors that exchange their contents through a scratch buffer that others use in between."""

    def __init__(self, live: Tensor, other: Tensor, scratch: ScratchBuffer) -> None:
        self._live, self._other, self._scratch = live, other, scratch
        self._is_in = False
        # The live values, while they are nowhere else.
        self._own: Tensor | None = None

    def put_in(self) -> None:
        if self._is_in:
            return
        own = self._scratch.like(self._live).copy_(self._live)
        # A signal handler runs when a copy has ended, and may have done all of it.
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
            # Something came in between: the live tensor holds the other values already.
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
