"""Merges the tensors of checkpoints one at a time, with the same kernel as snapshots in a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from merge_callback.checkpoints.stored import StoredCheckpoint, StoredTensor
from merge_callback.live.names import fits
from merge_callback.merging.combine import Row, combine_
from merge_callback.utilities.background import Background

# Taken from the newest checkpoint, as in a run: batch norm statistics, counters, and what modules keep in their state.
TAKEN_FROM_NEWEST = ("*running_mean", "*running_var", "*num_batches_tracked", "*_extra_state")


def merged_tensors(
    opened: Sequence[StoredCheckpoint],
    values: Sequence[float],
    newest: str | Sequence[str] = TAKEN_FROM_NEWEST,
    progress: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and merged tensor for each tensor of the checkpoints.

    Args:
        opened: Checkpoints with the same tensors, oldest first.
        values: One coefficient per checkpoint.
        newest: One or several patterns of tensor names. Tensors that match are taken from the newest checkpoint instead
            of merged.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a tensor holds NaN or inf, or integers that differ. The message names it.
    """
    last = opened[-1]
    num_bytes = sum(tensor.numel * tensor.dtype.itemsize for tensor in last.tensors.values())
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Merging", disable=not progress) as bar:
        for name in last.tensors:
            out = merged_tensor(name, opened, values, newest)
            bar.update(out.nbytes)
            yield name, out


def merged_tensor(
    name: str, opened: Sequence[StoredCheckpoint], values: Sequence[float], newest: str | Sequence[str]
) -> Tensor:
    """Returns one merged tensor; see `merged_tensors` for the other arguments and errors.

    Args:
        name: Name of the tensor.
    """
    last = opened[-1].tensors[name]
    if fits(name, newest):
        return last[:].view(last.shape)
    if not (last.dtype.is_floating_point or last.dtype.is_complex):
        return _same(opened, name).view(last.shape)
    # In the order of the newest file: parts of the rows of a transposed matrix lie all over it.
    dims = last.outermost_first
    # In the order in which they are summed, without those that are not.
    pairs = [(checkpoint, value) for checkpoint, value in zip(opened, values, strict=True) if value]
    used = sorted(pairs, key=lambda pair: pair[1] < 0)
    rows: list[Row] = [_Finite(name, each.path, each.tensors[name].permute(dims)) for each, _ in used]
    out = last.permute(dims).like("cpu")
    flat = out.view(-1)
    if out.is_complex():
        flat, rows = torch.view_as_real(out).view(-1), [_RealNumbers(row) for row in rows]
    combine_([flat], read_ahead(rows, flat.numel()), [[value for _, value in used]])
    return out.permute([dims.index(dim) for dim in range(len(dims))])


@dataclass(frozen=True)
class _Finite:
    """One checkpoint's tensor as a row of the sum. Reading a part with NaN or inf raises ValueError."""

    name: str
    path: Path
    stored: StoredTensor

    def __getitem__(self, part: slice, /) -> Tensor:
        content = self.stored[part]
        # A sum is not finite if one of its terms is not, and takes a quarter of the time. It may also be too large.
        total = content.sum(dtype=torch.promote_types(content.dtype, torch.float32))
        if not total.isfinite() and not content.isfinite().all():
            raise ValueError(f"{self.name} holds NaN or inf in {self.path}")
        return content


def read_ahead(rows: Sequence[Row], numel: int) -> list[Row]:
    """Returns rows that are read on a thread, one part of one row ahead of the sum, so that memory holds two of them.

    Args:
        rows: ``[numel]`` each, read in this order: each part of all rows before the next part.
        numel: Number of elements of each row.
    """
    parts = _Parts(rows, numel)
    return [_Ahead(parts, number) for number in range(len(rows))]


class _Parts:
    """The part of a row that will be asked for next, as soon as the thread has read it."""

    def __init__(self, rows: Sequence[Row], numel: int) -> None:
        self._rows, self._numel = rows, numel
        self._background = Background("reading")
        self._ahead: tuple[int, slice, Tensor] | None = None

    def read(self, number: int, part: slice) -> Tensor:
        self._background.wait()
        if self._ahead is None or self._ahead[:2] != (number, part):
            self._read(number, part)
        assert self._ahead is not None
        *_, content = self._ahead
        if number + 1 < len(self._rows):
            self._background.begin(self._read, number + 1, part)
        elif part.stop < self._numel:
            self._background.begin(self._read, 0, slice(part.stop, min(2 * part.stop - part.start, self._numel)))
        return content

    def _read(self, number: int, part: slice) -> None:
        self._ahead = number, part, self._rows[number][part]


@dataclass(frozen=True)
class _Ahead:
    """One of the rows."""

    parts: _Parts
    number: int

    def __getitem__(self, part: slice, /) -> Tensor:
        return self.parts.read(self.number, part)


@dataclass(frozen=True)
class _RealNumbers:
    """A row of complex numbers as one of real numbers, twice as long. Parts begin and end with a complex number."""

    row: Row

    def __getitem__(self, part: slice, /) -> Tensor:
        return torch.view_as_real(self.row[part.start // 2 : part.stop // 2]).view(-1)


def _same(opened: Sequence[StoredCheckpoint], name: str) -> Tensor:
    """Returns the tensor's value, which must be equal in all checkpoints, since integers are not averaged."""
    last = opened[-1].tensors[name][:]
    for checkpoint in opened[:-1]:
        if not torch.equal(checkpoint.tensors[name][:], last):
            raise ValueError(
                f"{name} is {last.dtype}, which is not averaged, and differs between {checkpoint.path} and"
                f" {opened[-1].path}; newest=[{name}] takes the newest one"
            )
    return last
