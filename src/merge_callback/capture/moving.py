"""Tensors in float32 or better that move towards the live weights: the memory of every kind of average."""

from collections.abc import Callable, Mapping
from itertools import compress
from operator import not_
from typing import Any

import torch
from torch import Tensor

from merge_callback.capture.layout import RowLayout
from merge_callback.capture.storage import HostStorage
from merge_callback.merging.combine import ScratchBuffer, flat_chunks
from merge_callback.utilities.background import Background


def move_(tensors: Mapping[str, Tensor], live: Mapping[str, Tensor], share: float) -> None:
    """Moves tensors by a share of the way to the live ones, in one pass and without waiting for the device."""
    pairs = [(tensor, live[name]) for name, tensor in tensors.items()]
    alike = [tensor.dtype == now.dtype for tensor, now in pairs]
    # Live tensors of the same dtype, nearly all of them, are read in place. Others need a scratch buffer.
    if same := list(compress(pairs, alike)):
        torch._foreach_lerp_([tensor for tensor, _ in same], [now for _, now in same], share)
    scratches: dict[tuple[torch.dtype, torch.device], ScratchBuffer] = {}
    for tensor, now in compress(pairs, map(not_, alike)):
        scratch = scratches.setdefault((tensor.dtype, tensor.device), ScratchBuffer(tensor.dtype))
        for moved, part in flat_chunks(tensor, now):
            moved.lerp_(scratch.like(part).copy_(part), share)


class DirectUpdates:
    """Updates of tensors that are made at once, from the live weights themselves.

    Args:
        update: Makes an update. It gets the live weights by name, and the arguments of `begin`.
    """

    size_bytes = 0

    def __init__(self, update: Callable[..., None]) -> None:
        self._update = update

    def begin(self, live: Mapping[str, Tensor], *arguments: Any) -> None:
        """Makes an update."""
        self._update(live, *arguments)

    def finish(self) -> None:
        """Does nothing: the live tensors are not read any more."""

    def wait(self) -> None:
        """Does nothing: updates are done."""


class HostUpdates:
    """Updates of tensors in host memory, which a background thread makes from a copy of the live weights.

    The copy is made on a separate stream if the weights are on a GPU, and training goes on meanwhile. The next update
    waits for the thread; so does a reader, by `wait`.

    Args:
        update: Makes an update. It gets the copied weights by name, and the arguments of `begin`.
        layout: Row layout of the live tensors.
    """

    def __init__(self, update: Callable[..., None], layout: RowLayout) -> None:
        self._update = update
        self._copy = HostStorage(layout, capacity=1)
        self._background = Background("averages")

    @property
    def size_bytes(self) -> int:
        """Bytes of the copy of the live weights."""
        return self._copy.size_bytes

    def begin(self, live: Mapping[str, Tensor], *arguments: Any) -> None:
        """Begins an update. The live tensors may still be read until `finish` is called."""
        self.wait()
        self._copy.write(0, 0, live)
        self._background.begin(self._run, *arguments)

    def finish(self) -> None:
        """Makes it safe to write to the live tensors; call it before any write."""
        self._copy.finish()

    def wait(self) -> None:
        """Waits until updates are done; raises the error of one that failed."""
        self._background.wait()

    def _run(self, *arguments: Any) -> None:
        self._update(self._copy.tensors(0), *arguments)


def shadow_bytes(layout: RowLayout, device: torch.device | None = None) -> dict[torch.device, int]:
    """Returns the bytes that one shadow of a layout's tensors takes, by device; all on ``device`` if it is given."""
    required: dict[torch.device, int] = {}
    for (dtype, own_device), numel in zip(layout.groups, layout.num_elements, strict=True):
        place = device or own_device
        required[place] = required.get(place, 0) + numel * _wide(dtype).itemsize
    return required


def shadow_like(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Allocates an uninitialised tensor for the average of this one; device None is the tensor's own."""
    return torch.empty_like(tensor, dtype=_wide(tensor.dtype), device=device, requires_grad=False)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
