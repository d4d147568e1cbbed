"""Tensors in files that are read in parts, so that many large checkpoints can be merged with little memory.

In every format a tensor is a list of pieces: the file, the first byte, and the part of the tensor that is stored there.
Files are not mapped into memory, since all mapped pages would count as memory of the process.
"""

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_callback.utilities.files import read_into

# Key of the provenance of a merge in a `.ckpt`. A `.safetensors` file holds the same entries as metadata.
PROVENANCE_KEY = "merge_callback"


def file_inside(folder: Path, name: str) -> Path:
    """Returns the path of a file that a checkpoint names as its part.

    Raises:
        ValueError: If the name leads out of the checkpoint's folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{folder} names a file in another folder: {name!r}")
    return folder / name


@dataclass(frozen=True)
class Piece:
    """A rectangular part of a tensor, stored in a file."""

    file: Path
    position: int
    # Offsets in the whole tensor; shape and strides (in elements) of the piece.
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def elements(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Reads the elements that lie at ``start`` to ``stop`` in the file, counted from the piece's first."""
        content = torch.empty(stop - start, dtype=dtype)
        begin = self.position + start * dtype.itemsize
        read_into(self.file, begin, content.view(torch.uint8).numpy().data)
        return content

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Reads the rows ``start`` to ``stop`` of the piece's first dimension."""
        shape, begin = (stop - start, *self.shape[1:]), start * self.stride[0]
        span = 1 + sum((size - 1) * step for size, step in zip(shape, self.stride, strict=True))
        return self.elements(begin, begin + span, dtype).as_strided(shape, self.stride)

    def permute(self, dims: Sequence[int]) -> "Piece":
        """Returns the piece with its dimensions in another order."""
        offsets, shape, stride = (tuple(of[dim] for dim in dims) for of in (self.offsets, self.shape, self.stride))
        return Piece(self.file, self.position, offsets, shape, stride)

    def row(self, number: int, dtype: torch.dtype) -> "Piece":
        """Returns one row of the piece's first dimension as a piece of the tensor's row."""
        position = self.position + number * self.stride[0] * dtype.itemsize
        return Piece(self.file, position, self.offsets[1:], self.shape[1:], self.stride[1:])


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk. Indexing it with a slice reads that part of the flattened tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a tensor")

    @property
    def is_whole(self) -> bool:
        """Whether the pieces lie inside the tensor, none where another begins, and are as many elements as it has."""
        inside = all(
            offset >= 0 and offset + size <= whole
            for piece in self.pieces
            for offset, size, whole in zip(piece.offsets, piece.shape, self.shape, strict=True)
        )
        starts = {piece.offsets for piece in self.pieces if math.prod(piece.shape)}
        num_filled = sum(1 for piece in self.pieces if math.prod(piece.shape))
        return inside and len(starts) == num_filled and sum(math.prod(p.shape) for p in self.pieces) == self.numel

    @property
    def outermost_first(self) -> list[int]:
        """The dimensions in the order in which they lie in the file, that of the largest stride first."""
        strides = self.pieces[0].stride if self.pieces else self.shape
        return sorted(range(len(self.shape)), key=strides.__getitem__, reverse=True)

    def permute(self, dims: Sequence[int]) -> "StoredTensor":
        """Returns the tensor with its dimensions in another order, as `torch.permute`."""
        return StoredTensor(
            tuple(self.shape[dim] for dim in dims), self.dtype, tuple(each.permute(dims) for each in self.pieces)
        )

    def like(self, device: str) -> Tensor:
        """Returns an uninitialised tensor of the same shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    def __getitem__(self, part: slice, /) -> Tensor:
        start, stop, _ = part.indices(self.numel)
        if start >= stop:
            return torch.empty(0, dtype=self.dtype)
        if self._in_order is not None:
            return self._in_order.elements(start, stop, self.dtype)
        row_numel = math.prod(self.shape[1:])
        first, last = start // row_numel, -(-stop // row_numel)
        if row_numel > stop - start:
            # Nothing beside the part is read of a row that is longer, such as all experts' weights in a layer.
            ends = ((number * row_numel, self._row(number)) for number in range(first, last))
            return torch.cat([row[max(0, start - begin) : stop - begin] for begin, row in ends])
        rows = torch.empty(last - first, *self.shape[1:], dtype=self.dtype)
        for piece in self.pieces:
            offset = piece.offsets[0]
            low, high = max(first, offset), min(last, offset + piece.shape[0])
            if low >= high or 0 in piece.shape:
                continue
            inside = zip(piece.offsets[1:], piece.shape[1:], strict=True)
            where = (slice(low - first, high - first), *(slice(begin, begin + size) for begin, size in inside))
            rows[where] = piece.rows(low - offset, high - offset, self.dtype)
        return rows.view(-1)[start - first * row_numel : stop - first * row_numel]

    @cached_property
    def _in_order(self) -> Piece | None:
        """The piece that holds the whole tensor, elements in their order, if there is one; of a scalar there is."""
        piece, numel = self.pieces[0] if len(self.pieces) == 1 else None, 1
        if piece is None or piece.shape != self.shape:
            return None
        for size, step in zip(reversed(piece.shape), reversed(piece.stride), strict=True):
            if size != 1 and step != numel:
                return None
            numel *= size
        return piece

    def _row(self, number: int) -> "StoredTensor":
        inside = [piece for piece in self.pieces if 0 <= number - piece.offsets[0] < piece.shape[0]]
        rows = [piece.row(number - piece.offsets[0], self.dtype) for piece in inside]
        return StoredTensor(self.shape[1:], self.dtype, tuple(rows))


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint on disk: its tensors by name, its step if known, and its other entries."""

    path: Path
    tensors: dict[str, StoredTensor]
    step: int | None = None
    # Other entries of the checkpoint, such as hyperparameters.
    beside: Mapping[str, Any] = field(default_factory=dict)
    # What modules keep in the state dict beside their tensors.
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def average(self) -> str:
        """What the checkpoint holds instead of the weights of a step, in words for the user; empty if those."""
        if isinstance(origin := self.beside.get(PROVENANCE_KEY), dict):
            rule, steps = origin.get("rule"), origin.get("steps")
            is_list = isinstance(steps, list) and all(isinstance(step, int) for step in steps)
            of_steps = f" of the steps {steps}" if is_list or isinstance(steps, str) else ""
            if isinstance(means := origin.get("means_over"), list | str):
                of_steps = f" of means over the steps {means}"
            return f"a merge by the rule {rule}{of_steps}" if isinstance(rule, str) else "a merge"
        # Lightning's `WeightAveraging`.
        return "an average over steps" if "averaging_state" in self.beside else ""


def in_one_piece(
    path: Path, position: int, shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None = None
) -> StoredTensor:
    """Returns a tensor that is stored as one piece, contiguous unless a stride is given."""
    stride = stride if stride is not None else torch.empty(shape, device="meta").stride()
    return StoredTensor(shape, dtype, (Piece(path, position, (0,) * len(shape), shape, stride),))
