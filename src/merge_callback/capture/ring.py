"""The ring of the latest snapshots as flat rows, and the merges made from them.

A model's tensors lie one after the other in one flat row per dtype and device (`RowLayout`). So a capture is one copy,
and a merge streams over long rows, however many tensors there are. `SnapshotRing` keeps the order of the snapshots. A
`SnapshotStorage` keeps the rows: in the memory of the model's device, in pinned host memory or in a directory.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor

from merge_callback.capture.memory import free_bytes, required_bytes
from merge_callback.capture.storage import SnapshotStorage
from merge_callback.merging.combine import Row, chunks, combine_
from merge_callback.merging.intervals import Intervals

# Share of the free memory that may be used only to be faster.
AMPLE_SHARE = 0.25


@dataclass(frozen=True)
class _Snapshot:
    step: int
    slot: int
    # The step after which its interval begins; its own step if it is a point.
    begin: int
    # Why its row cannot be used; None as far as no problem is known.
    problem: str | None = None


class SnapshotRing:
    """The latest snapshots, oldest first, at most ``capacity`` of them.

    Args:
        storage: Keeps the rows.
        capacity: Maximum number of snapshots.
    """

    def __init__(self, storage: SnapshotStorage, capacity: int) -> None:
        self.storage = storage
        self.capacity = capacity
        # Always replaced as a whole, so that an interrupt never leaves it half changed.
        self._taken: list[_Snapshot] = []
        self._kept_rows: list[list[Tensor]] = []

    @property
    def steps(self) -> list[int]:
        """Steps of the snapshots, oldest first."""
        return [taken.step for taken in self._taken]

    @property
    def begins(self) -> list[int]:
        """The steps that the snapshots reach back to, oldest first: the steps after which their intervals begin."""
        return [taken.begin for taken in self._taken]

    @property
    def covered(self) -> Sequence[int]:
        """The steps of the snapshots, as merge rules take them."""
        return self.steps

    @property
    def is_full(self) -> bool:
        """Whether the next snapshot replaces the oldest one."""
        return len(self._taken) == self.capacity

    def append(self, step: int, tensors: Mapping[str, Tensor], begin: int | None = None) -> None:
        """Stores the tensors as the snapshot of a step. If the ring is full, they replace the oldest snapshot.

        Args:
            step: The step of the snapshot: of a mean, the last step of its interval.
            tensors: Name -> tensor.
            begin: Of a mean, the step after which its interval begins. None for a point.
        """
        slot = self._free_slot()
        self.storage.write(slot, step, tensors)
        # Only now: if the write is interrupted, the row of the slot is not that of this step.
        self._taken = [*self._taken, _Snapshot(step, slot, step if begin is None else begin)]

    def leave_open(self, step: int, problem: str, begin: int | None = None) -> None:
        """Adds a snapshot whose row cannot be used, to keep its place until all ranks drop it; see `problems`."""
        snapshot = _Snapshot(step, self._free_slot(), step if begin is None else begin, problem)
        self._taken = [*self._taken, snapshot]

    def _free_slot(self) -> int:
        if self.is_full:
            self._taken = self._taken[1:]
        return min(set(range(self.capacity)) - {taken.slot for taken in self._taken})

    def thin(self) -> None:
        """Drops every second snapshot but keeps the oldest, so that half as many reach equally far back."""
        self._taken = self._taken[::2]

    def clear(self) -> None:
        """Drops all snapshots."""
        self._taken = []

    def combine(self, coefficients: Sequence[float], out: list[Tensor] | None = None) -> list[Tensor]:
        """Returns the merge ``sum_j c_j x_j`` as a row in the live tensors' dtypes, accumulated in float32 or better.

        Each snapshot with a non-zero coefficient is read once, and the merge is written once. Extra memory is needed
        only for chunks.

        Args:
            coefficients: One per snapshot, oldest first, summing to one.
            out: The row to write to; None allocates a new one.

        Returns:
            The row; `RowLayout.views` returns the tensors inside it.
        """
        return self.combine_all([coefficients], [out or self.storage.new_row()])[0]

    def combine_all(
        self, coefficients: Sequence[Sequence[float]], outs: Sequence[list[Tensor]]
    ) -> Sequence[list[Tensor]]:
        """Makes several merges at once and reads each snapshot only once; see `combine_`.

        Args:
            coefficients: For each merge one coefficient per snapshot, as in `combine`.
            outs: The rows to write to, one per merge.

        Returns:
            The rows in ``outs``.
        """
        used = [any(of_snapshot) for of_snapshot in zip(*coefficients, strict=True)]
        coefficients = [list(itertools.compress(each, used)) for each in coefficients]
        for out, rows in zip(zip(*outs, strict=True), self._rows(used), strict=True):
            combine_(out, rows, coefficients)
        return outs

    def merges(self, coefficients: Sequence[Sequence[float]]) -> Iterator[list[Tensor]]:
        """Yields one merged row per coefficient vector. Rows are reused: copy one to keep it.

        A row and its views are valid until the next row is requested, also by a later call. In host memory the rows are
        kept and written again, since touching fresh memory takes as long as merging. All merges are made in one pass if
        there is ample memory for them. On a GPU merges are made one at a time.
        """
        outs = self._kept(len(coefficients)) if self.storage.is_merged_in_host_memory else []
        if len(outs) == len(coefficients):
            yield from self.combine_all(coefficients, outs)
        else:
            for each in coefficients:
                yield self.combine(each, *outs)

    def _kept(self, num_rows: int) -> list[list[Tensor]]:
        """Returns ``num_rows`` rows to reuse, or a single one if memory is short."""
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
        """Returns the RMS distance of the merged snapshots from their merge, divided by the norm of the merge.

        Args:
            coefficients: As given to `combine`; snapshots with a coefficient of zero do not count.
            merged: The row that `combine` returned.
            copies: For a sharded model: name -> number of ranks that hold the same elements of that tensor.
            add_up: Sums a tensor over ranks; the default is for a single process.
        """
        # [squared distance, squared norm]
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
        """Returns, for each group of the layout, the rows of the snapshots that are used.

        Raises:
            OSError: If one of them cannot be used.
        """
        problems = self.problems()
        used = [taken for taken, is_one in zip(self._taken, is_used, strict=True) if is_one]
        for taken in used:
            if taken.step in problems:
                raise OSError(problems[taken.step])
        rows = [self.storage.row(taken.slot) for taken in used]
        return [list(of_group) for of_group in zip(*rows, strict=True)]

    def problems(self) -> dict[int, str]:
        """Returns the steps whose snapshots cannot be used, with the reason for each. It does not change later."""
        self.leave_out({t.step: p for t in self._taken if (p := t.problem or self.storage.problem(t.slot))})
        return {taken.step: taken.problem for taken in self._taken if taken.problem is not None}

    def leave_out(self, problems: Mapping[int, str]) -> None:
        """Marks snapshots that cannot be used, with the reasons by step. They keep their places until they go."""
        self._taken = [replace(taken, problem=problems.get(taken.step, taken.problem)) for taken in self._taken]

    def drop(self, steps: Iterable[int]) -> None:
        """Drops the snapshots of the given steps."""
        dropped = set(steps)
        self._taken = [taken for taken in self._taken if taken.step not in dropped]

    def snapshots(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yields the step of each snapshot that can be used and its tensors by name, oldest first.

        They are views if the rows are in memory.
        """
        problems = self.problems()
        for taken in self._taken:
            if taken.step not in problems:
                yield taken.step, self.storage.layout.views([row[:] for row in self.storage.row(taken.slot)])

    def restore_(
        self,
        steps: Sequence[int],
        begins: Sequence[int],
        read: Callable[[int], Mapping[str, Tensor]],
        problems: Mapping[int, str],
    ) -> list[str]:
        """Restores the newest saved snapshots, as many as the ring can hold.

        Args:
            steps: Steps of the saved snapshots, oldest first.
            begins: Their `begins`.
            read: Returns the tensors of the snapshot of a step; not called for snapshots that are dropped or unusable.
            problems: Why some could not be used when the ring was saved, by step. They keep their places.

        Returns:
            A clause for the user if snapshots were dropped; otherwise empty.
        """
        num_dropped = max(0, len(steps) - self.capacity)
        self.clear()
        for step, begin in list(zip(steps, begins, strict=True))[num_dropped:]:
            if step in problems:
                self.leave_open(step, problems[step], begin)
            else:
                self.append(step, read(step), begin)
        return [f"the oldest {num_dropped} of {len(steps)} snapshots were dropped"] if num_dropped else []


class MeanRing(SnapshotRing):
    """A ring whose snapshots are means over intervals of steps."""

    @property
    def covered(self) -> Sequence[int]:
        return Intervals(tuple(self.begins), tuple(self.steps))

    def thin(self) -> None:
        """Averages neighbours, weighted by their steps, so that half as many reach equally far back.

        Of an odd number the oldest stays as it is. If one of two cannot be used, neither can their mean.
        """
        problems, first = self.problems(), len(self._taken) % 2
        for older, newer in zip(self._taken[first::2], self._taken[first + 1 :: 2], strict=True):
            problem = problems.get(older.step) or problems.get(newer.step)
            # Meanwhile it is no snapshot: an interrupt may leave its row half averaged.
            self._taken = [taken for taken in self._taken if taken not in (older, newer)]
            if problem is None:
                share = (newer.step - newer.begin) / (newer.step - newer.begin + older.step - older.begin)
                self.storage.average(older.slot, newer.slot, newer.step, share)
            joined = _Snapshot(newer.step, older.slot, older.begin, problem)
            self._taken = sorted([*self._taken, joined], key=attrgetter("step"))
