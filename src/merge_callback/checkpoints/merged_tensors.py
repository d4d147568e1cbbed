"""The tensors of a merge of checkpoints, one at a time, by the kernel that merges snapshots in a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from merge_callback.checkpoints.stored import StoredCheckpoint
from merge_callback.live.names import fits
from merge_callback.merging.combine import combine_

# Statistics and counters of batch norm layers are those of the newest checkpoint, as in a run.
TAKEN_FROM_NEWEST = ("*running_mean", "*running_var", "*num_batches_tracked")


def merged_tensors(
    opened: Sequence[StoredCheckpoint],
    values: Sequence[float],
    newest: str | Sequence[str] = TAKEN_FROM_NEWEST,
    progress: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Name and merge of every tensor, one at a time.

    Args:
        opened: Checkpoints that are alike, oldest first.
        values: A coefficient for each.
        newest: A pattern, or several, of names that are taken from the newest checkpoint instead of merged.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a tensor holds NaN or inf, or is of integers that differ; the message names it.
    """
    last = opened[-1]
    num_bytes = sum(tensor.numel * tensor.dtype.itemsize for tensor in last.tensors.values())
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Merging", disable=not progress) as bar:
        for name, stored in last.tensors.items():
            out = stored.like("cpu")
            if fits(name, newest):
                out.view(-1).copy_(stored[:])
            elif stored.dtype.is_floating_point:
                combine_([out.view(-1)], [_Finite(checkpoint, name) for checkpoint in opened], [values])
            else:
                out.view(-1).copy_(_same(opened, name))
            bar.update(out.nbytes)
            yield name, out


@dataclass(frozen=True)
class _Finite:
    """A row of the sum, refused where it holds NaN or inf."""

    checkpoint: StoredCheckpoint
    name: str

    def __getitem__(self, part: slice, /) -> Tensor:
        content = self.checkpoint.tensors[self.name][part]
        if not content.isfinite().all():
            raise ValueError(f"{self.name} holds NaN or inf in {self.checkpoint.path}")
        return content


def _same(opened: Sequence[StoredCheckpoint], name: str) -> Tensor:
    """What all of them hold, to the bit; integers are not averaged."""
    last = opened[-1].tensors[name][:]
    for checkpoint in opened[:-1]:
        if not torch.equal(checkpoint.tensors[name][:], last):
            raise ValueError(
                f"{name} is {last.dtype}, which is not averaged, and differs between {checkpoint.path} and"
                f" {opened[-1].path}; newest=[{name}] takes the newest one"
            )
    return last
