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
    rows = [_Finite(name, checkpoint.path, checkpoint.tensors[name].permute(dims)) for checkpoint in opened]
    out = last.permute(dims).like("cpu")
    if out.is_complex():
        combine_([torch.view_as_real(out).view(-1)], [_RealNumbers(row) for row in rows], [values])
    else:
        combine_([out.view(-1)], rows, [values])
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
