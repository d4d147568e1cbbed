"""The kernel behind every merge: weighted sums of flat rows, several at once, each row read once.

A sum is a chain of interpolations, ``m_j = m_(j-1) + (c_j / (c_1 + ... + c_j)) (x_j - m_(j-1))``: one operation a row,
accumulated in float32 or better, and equal rows give exactly that row. Rows are gone through in chunks that stay in a
cache while they are summed.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

# Elements of a chunk for each thread of a CPU: its own cache holds a row's and the sum's, and to wake it is worth it.
CHUNK_NUMEL = 2**17
# Whatever the number of threads, a chunk takes little memory.
MAX_CHUNK_NUMEL = 2**21
# A GPU has to be asked for more at a time than it takes to ask.
GPU_CHUNK_NUMEL = 2**22


class Row(Protocol):
    """A flat row, or what gives parts of one: a tensor, or a file that is read as far as it is asked for."""

    def __getitem__(self, part: slice, /) -> Tensor: ...


def chunks(start: int, stop: int, device: torch.device) -> Iterator[slice]:
    """The stretch from one element to another in pieces that suit a device."""
    on_cpu = min(CHUNK_NUMEL * torch.get_num_threads(), MAX_CHUNK_NUMEL)
    numel = on_cpu if device.type == "cpu" else GPU_CHUNK_NUMEL
    for first in range(start, stop, numel):
        yield slice(first, min(first + numel, stop))


def flat_chunks(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two tensors of one shape in flat pieces that suit the first one's device; whole if their memory is not flat."""
    cuts = list(chunks(0, first.numel(), first.device))
    if len(cuts) > 1 and first.is_contiguous() and second.is_contiguous():
        first, second = first.view(-1), second.view(-1)
        yield from ((first[cut], second[cut]) for cut in cuts)
    else:
        yield first, second


@torch.no_grad()
def combine_(outs: Sequence[Tensor], rows: Sequence[Row], coefficients: Sequence[Sequence[float]]) -> None:
    """Writes ``sum_j coefficients[k][j] * rows[j]`` into ``outs[k]``.

    Each row is read once for all sums whose coefficients have the same signs; without negative ones, once.

    Args:
        outs: ``[num_elements]`` each, where the sums go: of one floating dtype, on one device.
        rows: As long as these, of any floating dtype.
        coefficients: For each sum one per row, summing to one. Rows without any coefficient but zero are not read.
            Negative ones come last in the sum, which keeps the running total positive.
    """
    by_order = defaultdict(list)
    for out, values in zip(outs, coefficients, strict=True):
        by_order[tuple(value < 0 for value in values)].append((out, values))
    for is_negative, pairs in by_order.items():
        order = sorted(range(len(rows)), key=is_negative.__getitem__)
        used = [position for position in order if any(values[position] for _, values in pairs)]
        sums = [_Sum(out, _shares(values, order)) for out, values in pairs]
        cast = ScratchBuffer(sums[0].dtype)
        for chunk in chunks(0, outs[0].numel(), outs[0].device):
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
    """How far each row draws the sum so far towards itself, by the row's position."""
    shares, total = {}, 0.0
    for position in order:
        if coefficients[position]:
            total += coefficients[position]
            shares[position] = coefficients[position] / total
    return shares


class ScratchBuffer:
    """Room for parts in another dtype, taken once: touching fresh memory would cost more than summing."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._scratch: Tensor | None = None

    def like(self, part: Tensor) -> Tensor:
        """Uninitialised, of the same shape; the same memory at each call."""
        if self._scratch is None or self._scratch.numel() < part.numel():
            self._scratch = part.new_empty(part.numel(), dtype=self.dtype)
        return self._scratch[: part.numel()].view(part.shape)


class _Sum:
    """One sum, chunk by chunk."""

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
        """Takes in a part of a row; if it is kept as it is until the end, the first one need not be copied."""
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
