"""Running sums of what a validation logs, after each of its first batches.

Lightning keeps only the sums over all batches so far. From the sums after each batch follow the value over the first
batches, exactly as Lightning would calculate it, and the value of every single batch.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchSums:
    """Running sums of one metric whose value is the mean over batches, weighted by their size.

    Args:
        batches: Numbers of the batches in which it was logged, from zero.
        totals: After each of them, the sum of values times batch sizes.
        sizes: After each of them, the sum of batch sizes.
        num_batches: How many batches were recorded, whether or not they logged the metric.
        sync: Reduces a tensor over ranks, as the metric was logged; changes nothing if it is not to be reduced.
        is_synced: Whether it is reduced.
    """

    batches: Sequence[int]
    totals: Sequence[Tensor]
    sizes: Sequence[Tensor]
    num_batches: int
    sync: Callable[[Tensor], Tensor]
    is_synced: bool

    def until(self, batch: int) -> "BatchSums | None":
        """Returns the sums up to a batch; None if no batch up to there logged the metric."""
        num = sum(each <= batch for each in self.batches)
        return (
            replace(self, batches=self.batches[:num], totals=self.totals[:num], sizes=self.sizes[:num]) if num else None
        )

    def mean(self) -> Tensor:
        """Returns the value over these batches. If the metric is reduced over ranks, all must call it together."""
        # Copies, since Lightning reduces in place.
        mean: Tensor = self.sync(self.totals[-1].clone()) / self.sync(self.sizes[-1].clone())
        return mean

    @property
    def last(self) -> int:
        """Number of the last batch that was recorded, whether or not it logged the metric."""
        return self.num_batches - 1

    def by_batch(self) -> tuple[Tensor, Tensor]:
        """Returns value times size of each batch of this rank, and its size, ``[num_batches]`` each.

        Both are in float64 on the CPU.
        """
        zero = torch.zeros(1, dtype=torch.float64)
        device = self.totals[-1].device
        running = [torch.stack([one.to(device) for one in each]).double().cpu() for each in (self.totals, self.sizes)]
        totals, sizes = (torch.diff(each, prepend=zero) for each in running)
        return totals, sizes


class BatchRecorder:
    """Records the running sums of one validation after each of its first batches.

    Args:
        limits: Number of batches to record, for each loader.
    """

    def __init__(self, limits: Sequence[int | float]) -> None:
        self._limits = limits
        self._num_seen: Counter[int] = Counter()
        # Key -> number of the batch, Lightning's sum, and a copy of the sum of sizes, which Lightning reduces in place.
        self._sums: dict[str, list[tuple[int, Tensor, Tensor]]] = {}

    def record(self, results: Any) -> None:
        """Records the sums after a batch. ``results`` is Lightning's collection of what was logged."""
        loader = results.dataloader_idx
        # Batches of several loaders at once have no number of a loader.
        limit = max(self._limits) if loader is None else self._limits[loader]
        number = self._num_seen[loader or 0]
        self._num_seen[loader or 0] += 1
        if number >= limit:
            return
        for key, item in results.items():
            # What was logged in an earlier validation has been reset.
            if not _is_mean(item) or item.has_reset:
                continue
            found = self._sums.setdefault(key, [])
            # An update makes a new tensor.
            if not found or found[-1][1] is not item.value:
                found.append((number, item.value, item.cumulated_batch_size.clone()))

    def sums(self, key: str, item: Any) -> BatchSums | None:
        """Returns the sums of a logged item; None if it is no mean over the recorded batches."""
        if not (found := self._sums.get(key)):
            return None
        batches, totals, sizes = zip(*found, strict=True)
        loader = item.meta.dataloader_idx or 0
        limit = max(self._limits) if item.meta.dataloader_idx is None else self._limits[loader]
        num_batches = int(min(self._num_seen[loader], limit))
        is_synced = item.meta.sync.should and not item.meta.sync.rank_zero_only
        return BatchSums(batches, totals, sizes, num_batches, item.meta.sync, is_synced)


def _is_mean(item: Any) -> bool:
    return bool(item.is_tensor and item.meta.on_epoch and item.meta.is_mean_reduction)


def standard_error(
    first: BatchSums, second: BatchSums, add_up: Callable[[Tensor], Tensor] = lambda sums: sums
) -> float | None:
    """Returns the standard error of the difference of two means over the same batches, from its values by batch.

    Args:
        first: Sums of one of them.
        second: Sums of the other.
        add_up: Sums a tensor over ranks; the default is for a single process. All ranks must call it together.

    Returns:
        The error. None for a single batch, or if the batches are not the same: a module may log a metric now and then.
    """
    (ours, sizes), (theirs, other_sizes) = first.by_batch(), second.by_batch()
    is_same = first.batches == second.batches and torch.equal(sizes, other_sizes)
    differences = ours - theirs if is_same else torch.zeros_like(sizes)
    parts = [differences.sum(), sizes.sum(), torch.ones_like(sizes).sum(), torch.tensor(float(not is_same))]
    total, size, num, num_others = add_up(torch.stack([part.double() for part in parts])).tolist()
    (squares,) = add_up(((differences - sizes * total / size) ** 2).sum().reshape(1)).tolist()
    return (squares * num / (num - 1)) ** 0.5 / size if num > 1 and not num_others else None
