"""The rolling buffer: snapshots as flat rows, and their merges.

A model's tensors lie one after the other in one flat row per dtype and device (`RowLayout`), so that capturing is one
copy and merging streams over long rows whatever the number of tensors. `SnapshotRing` keeps the order of the
snapshots; where the rows live is the business of a `SnapshotStorage`. Here that is the model's own device; pinned host
memory and a directory fit behind the same interface.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from merge_callback.capture.memory import free_bytes, required_bytes
from merge_callback.capture.storage import SnapshotStorage
from merge_callback.merging.combine import Row, chunks, combine_

# Of the memory that is free, what may be taken for nothing but speed.
AMPLE_SHARE = 0.25


class SnapshotRing:
    """The latest snapshots in order, oldest first, at most ``capacity`` of them.

    Args:
        storage: Where the rows live.
        capacity: Number of snapshots kept.
    """

    def __init__(self, storage: SnapshotStorage, capacity: int) -> None:
        self.storage = storage
        self.capacity = capacity
        self.steps: list[int] = []
        self._slots: list[int] = []
        self._open: dict[int, str] = {}
        self._kept_rows: list[list[Tensor]] = []

    @property
    def is_full(self) -> bool:
        """Whether the next snapshot replaces the oldest one."""
        return len(self.steps) == self.capacity

    def append(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Stores the tensors as the snapshot of a step, in place of the oldest one where the ring is full."""
        self.storage.write(self._next_slot(step), step, tensors)

    def leave_open(self, step: int, problem: str) -> None:
        """Keeps the place of a snapshot that this process cannot take, until all ranks know of it; see `problems`."""
        self._next_slot(step)
        self._open[step] = problem

    def _next_slot(self, step: int) -> int:
        if self.is_full:
            self._keep(range(1, self.capacity))
        slot = min(set(range(self.capacity)) - set(self._slots))
        self.steps.append(step)
        self._slots.append(slot)
        return slot

    def thin(self) -> None:
        """Drops every second snapshot and keeps the oldest, so that half the ring covers what the whole one did."""
        self._keep(range(0, len(self.steps), 2))

    def clear(self) -> None:
        """Drops all snapshots."""
        self._keep(range(0))

    def _keep(self, positions: Sequence[int]) -> None:
        self.steps = [self.steps[position] for position in positions]
        self._slots = [self._slots[position] for position in positions]
        self._open = {step: problem for step, problem in self._open.items() if step in self.steps}

    def combine(self, coefficients: Sequence[float], out: list[Tensor] | None = None) -> list[Tensor]:
        """The merge ``sum_j c_j x_j`` as a row in the live tensors' dtypes, accumulated in float32 or better.

        Each snapshot with a coefficient is read once and the merge is written once; beside it only chunks are needed.

        Args:
            coefficients: One per snapshot, oldest first, summing to one.
            out: The row to write to; None is a new one.

        Returns:
            The row; `RowLayout.views` shows the tensors in it.
        """
        return self.combine_all([coefficients], [out or self.storage.new_row()])[0]

    def combine_all(
        self, coefficients: Sequence[Sequence[float]], outs: Sequence[list[Tensor]]
    ) -> Sequence[list[Tensor]]:
        """Several merges at once, for which each snapshot is read once all the same; see `combine_`.

        Args:
            coefficients: Those of each merge.
            outs: As many rows to write to.

        Returns:
            The rows.
        """
        used = [any(of_snapshot) for of_snapshot in zip(*coefficients, strict=True)]
        coefficients = [list(itertools.compress(each, used)) for each in coefficients]
        for out, rows in zip(zip(*outs, strict=True), self._rows(used), strict=True):
            combine_(out, rows, coefficients)
        return outs

    def merges(self, coefficients: Sequence[Sequence[float]]) -> Iterator[list[Tensor]]:
        """`combine` for each; a row and views of it are good until the next one is asked for, also in a later call.

        In host memory the rows are kept and written to again, since touching fresh memory takes as long as merging, and
        all merges are made at once where there is ample memory for them. On a GPU there is one at a time.
        """
        outs = self._kept(len(coefficients)) if self.storage.is_merged_in_host_memory else []
        if len(outs) == len(coefficients):
            yield from self.combine_all(coefficients, outs)
        else:
            for each in coefficients:
                yield self.combine(each, *outs)

    def _kept(self, num_rows: int) -> list[list[Tensor]]:
        """As many rows, or a single one where memory is short."""
        num_new = num_rows - len(self._kept_rows)
        free = free_bytes(torch.device("cpu"))
        required = sum(required_bytes(self.storage.layout, num_new, None).values())
        if num_new > 0 and free is not None and required > AMPLE_SHARE * free:
            num_rows = 1
        self._kept_rows += [self.storage.new_row() for _ in range(num_rows - len(self._kept_rows))]
        return self._kept_rows[:num_rows]

    def spread(
        self,
        coefficients: Sequence[float],
        merged: Sequence[Tensor],
        copies: Mapping[str, int] | None = None,
        add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> float:
        """RMS distance of the snapshots in a merge from the merge, over the norm of the merge.

        Args:
            coefficients: As given to `combine`; snapshots with a coefficient of zero do not count.
            merged: The row that `combine` returned.
            copies: Of a sharded model: name -> how many ranks hold the same elements of that tensor.
            add_up: Sums a tensor over ranks.
        """
        # Squared distance and squared norm.
        sums = torch.zeros(2, dtype=torch.float64)
        rows_of = self._rows([value != 0 for value in coefficients])
        for group, start, stop, shared_by in self.storage.layout.runs(copies or {}):
            rows, center = rows_of[group], merged[group]
            found = torch.zeros(2, dtype=torch.float64, device=center.device)
            for chunk in chunks(start, stop, center.device):
                middle = center[chunk].to(torch.promote_types(center.dtype, torch.float32))
                difference = torch.empty_like(middle)
                for row in rows:
                    torch.sub(row[chunk].to(middle), middle, out=difference)
                    found[0] += torch.dot(difference, difference) / len(rows)
                found[1] += torch.dot(middle, middle)
            sums += found.cpu() / shared_by
        distance, norm = add_up(sums).tolist()
        return math.sqrt(distance / norm) if norm else 0.0

    def _rows(self, is_used: Sequence[bool]) -> list[list[Row]]:
        """For each group of the layout the rows that are used."""
        slots = [slot for slot, is_one in zip(self._slots, is_used, strict=True) if is_one]
        rows = [self.storage.row(slot) for slot in slots]
        return [list(of_group) for of_group in zip(*rows, strict=True)]

    def problems(self) -> dict[int, str]:
        """Steps whose snapshots cannot be used, and why."""
        found = {
            step: self._open.get(step) or self.storage.problem(slot)
            for step, slot in zip(self.steps, self._slots, strict=True)
        }
        return {step: problem for step, problem in found.items() if problem is not None}

    def drop(self, steps: Iterable[int]) -> None:
        """Drops the snapshots of some steps."""
        dropped = set(steps)
        self._keep([position for position, step in enumerate(self.steps) if step not in dropped])

    def snapshots(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of each snapshot by name, oldest first; views where the rows are in memory."""
        for slot in self._slots:
            yield self.storage.layout.views([row[:] for row in self.storage.row(slot)])

    def restore_(self, steps: Sequence[int], read: Callable[[int], Mapping[str, Tensor]]) -> list[str]:
        """Takes over the newest of some saved snapshots, as many as fit.

        Args:
            steps: Of the saved snapshots, oldest first.
            read: Gives the tensors of one of them, by its position; the dropped ones are not asked for.

        Returns:
            What was dropped, in words.
        """
        num_dropped = max(0, len(steps) - self.capacity)
        self._slots, self.steps = [], []
        for position in range(num_dropped, len(steps)):
            self.append(steps[position], read(position))
        return [f"the oldest {num_dropped} of {len(steps)} snapshots were dropped"] if num_dropped else []
