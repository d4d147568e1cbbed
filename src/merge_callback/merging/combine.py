"""The kernel behind every merge: several weighted sums of flat rows in one pass over the rows.

A sum is a chain of interpolations, ``m_j = m_(j-1) + (c_j / (c_1 + ... + c_j)) (x_j - m_(j-1))``. Each row takes one
operation, accumulated in float32 or better, and a sum of equal rows is exactly that row. Rows are processed in chunks
that stay in the cache while they are summed.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

# Elements of a chunk per CPU thread: few enough that row and sum fit the cache, enough to be worth waking the thread.
CHUNK_NUMEL = 2**17
# Limits the memory of a chunk on machines with many threads.
MAX_CHUNK_NUMEL = 2**21
# A GPU needs large chunks, so that launching a kernel takes less time than running it.
GPU_CHUNK_NUMEL = 2**22


def is_narrow(dtype: torch.dtype) -> bool:
    """Returns whether numbers of this dtype, such as float8, have too few bits to be summed."""
    return dtype.is_floating_point and dtype.itemsize == 1


class Row(Protocol):
    """A flat tensor, or a file that returns the part of the tensor that is sliced."""

    def __getitem__(self, part: slice, /) -> Tensor: ...


def chunks(start: int, stop: int, device: torch.device, num_sums: int = 1) -> Iterator[slice]:
    """Yields consecutive slices that cover ``start`` to ``stop``, of a size that suits the device.

    On a CPU, a chunk of a row and those of so many sums fit the cache together.
    """
    on_cpu = min(CHUNK_NUMEL * torch.get_num_threads(), MAX_CHUNK_NUMEL) // max(1, num_sums // 2)
    numel = on_cpu if device.type == "cpu" else GPU_CHUNK_NUMEL
    for first in range(start, stop, numel):
        yield slice(first, min(first + numel, stop))


def flat_chunks(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields matching flat chunks of two tensors of the same shape, or both tensors whole if one is not contiguous."""
    cuts = list(chunks(0, first.numel(), first.device))
    if len(cuts) > 1 and first.is_contiguous() and second.is_contiguous():
        first, second = first.view(-1), second.view(-1)
        yield from ((first[cut], second[cut]) for cut in cuts)
    else:
        yield first, second


@torch.no_grad()
def combine_(outs: Sequence[Tensor], rows: Sequence[Row], coefficients: Sequence[Sequence[float]]) -> None:
    """Writes ``sum_j coefficients[k][j] * rows[j]`` into ``outs[k]``.

    If no coefficient is negative, each row is read once. Otherwise it is read once for each pattern of signs.

    Args:
        outs: The sums, ``[num_elements]`` each, of one floating dtype and on one device.
        rows: ``[num_elements]`` each, of any floating dtype.
        coefficients: ``[len(outs)][len(rows)]``; those of each sum add up to one. A row whose coefficients are all zero
            is not read. Rows with negative coefficients are added last, which keeps the running total positive.
    """
    by_order = defaultdict(list)
    for out, values in zip(outs, coefficients, strict=True):
        by_order[tuple(value < 0 for value in values)].append((out, values))
    for is_negative, pairs in by_order.items():
        order = sorted(range(len(rows)), key=is_negative.__getitem__)
        used = [position for position in order if any(values[position] for _, values in pairs)]
        sums = [_Sum(out, _shares(values, order)) for out, values in pairs]
        cast = ScratchBuffer(sums[0].dtype)
        for chunk in chunks(0, outs[0].numel(), outs[0].device, len(sums)):
            for each in sums:
                each.begin(chunk)
            for position in used:
                part = rows[position][chunk]
                is_cast = part.dtype != cast.dtype
                if is_cast:
                    part = cast.like(part).copy_(part)
                for each in sums:
                    each.add(position, part, is_kept=not is_cast)
            for each in sums:
                each.end()


def _shares(coefficients: Sequence[float], order: Sequence[int]) -> dict[int, float]:
    """Interpolation weight of each row in the running sum, by the row's position."""
    shares, total = {}, 0.0
    for position in order:
        if coefficients[position]:
            total += coefficients[position]
            shares[position] = coefficients[position] / total
    return shares


class ScratchBuffer:
    """Reusable memory for parts of rows in another dtype. Fresh memory would cost more time than the sum itself."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._scratch: Tensor | None = None

    def like(self, part: Tensor) -> Tensor:
        """Returns an uninitialised tensor of the shape of ``part``. Every call returns the same memory."""
        if self._scratch is None or self._scratch.numel() < part.numel():
            self._scratch = part.new_empty(part.numel(), dtype=self.dtype)
        return self._scratch[: part.numel()].view(part.shape)


class _Sum:
    """One weighted sum, computed chunk by chunk."""

    def __init__(self, out: Tensor, shares: Mapping[int, float]) -> None:
        self.dtype = torch.promote_types(out.dtype, torch.float32)
        self._out = out
        self._shares = shares
        self._scratch = ScratchBuffer(self.dtype)

    def begin(self, chunk: slice) -> None:
        self._target = self._out[chunk]
        self._accumulator = self._target if self._out.dtype == self.dtype else self._scratch.like(self._target)
        self._so_far: Tensor | None = None

    def add(self, position: int, part: Tensor, *, is_kept: bool) -> None:
        """Adds a part of a row. ``is_kept``: the part stays unchanged until `end`, so the first one is not copied."""
        if position not in self._shares:
            return
        if self._so_far is None and is_kept:
            self._so_far = part
            return
        if self._so_far is None:
            self._accumulator.copy_(part)
        else:
            torch.lerp(self._so_far, part, self._shares[position], out=self._accumulator)
        self._so_far = self._accumulator

    def end(self) -> None:
        assert self._so_far is not None
        if self._so_far is not self._target:
            self._target.copy_(self._so_far)
