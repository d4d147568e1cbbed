"""Captures the weights that merges are made from: a window of snapshots, and averages over every step."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from merge_callback.capture.costs import CaptureCosts
from merge_callback.capture.kinds import PointSnapshots
from merge_callback.capture.layout import RowLayout
from merge_callback.capture.memory import refuse_if_too_large
from merge_callback.capture.phase import NO_UPDATES, PhaseEvent, Rates, RateUpdates
from merge_callback.capture.places import DEVICE_MEMORY, StoragePlace
from merge_callback.capture.ring import SnapshotRing
from merge_callback.capture.running_averages import RunningAverages
from merge_callback.capture.window import CaptureWindow, Start
from merge_callback.live.names import EVERYTHING, Selection
from merge_callback.live.sharding import Sharding, all_gather_dict, local_clones, rank, real_tensors
from merge_callback.live.weights import (
    LiveTensors,
    describe_left_out,
    describe_nonfinite,
    has_lazy_parameters,
    is_number,
    merged_parameters,
    refuse_narrow,
)
from merge_callback.merging.averages import Average
from merge_callback.merging.rules import Rule
from merge_callback.utilities.devices import wait_for_device


class SnapshotCapture:
    """Follows a run step by step and captures the weights that merges are made from.

    Args:
        every_n_train_steps: Optimizer steps between two snapshots; None starts at one and doubles.
        num_snapshots: Capacity of the ring.
        rules: Rules of the merges; their `Window`s determine how far back the ring must reach.
        start: When capturing begins, as for `CaptureWindow`.
        dtype: Dtype in which snapshots are kept; None keeps each parameter's own.
        kind: What a snapshot keeps of the weights of its interval; None is the weights at its end.
        storage: Where snapshots and averages are kept.
        name: Name of the callback; distinguishes its files in a directory.
        averages: Name -> profile of each average. With averages but no rules, no snapshots are taken.
        selection: Which parameters are captured; the others stay live in merges.
    """

    def __init__(
        self,
        every_n_train_steps: int | None,
        num_snapshots: int,
        rules: Iterable[Rule],
        start: Start,
        dtype: torch.dtype | None,
        *,
        kind: PointSnapshots | None = None,
        storage: StoragePlace = DEVICE_MEMORY,
        name: str = "merge",
        averages: Mapping[str, Average] | None = None,
        selection: Selection = EVERYTHING,
    ) -> None:
        rules = list(rules)
        self.dtype = dtype
        self.kind = kind or PointSnapshots()
        self.storage = storage
        self.name = name
        self.selection = selection
        self.num_snapshots = num_snapshots if rules or not averages else 0
        # Processes on this host that allocate as much as this one.
        self.num_local_processes = 1
        # Seconds of waiting for queued training work, which are no cost.
        self.waited_seconds = 0.0
        self.window = CaptureWindow(every_n_train_steps, rules, start)
        self.averages = RunningAverages(averages or {}, storage.average_device)
        self.sharding = Sharding({})
        self.layout: RowLayout | None = None
        self.ring: SnapshotRing | None = None
        # Floating-point buffers at the newest snapshot: a merge copies batch norm statistics and does not average them.
        self.buffers: dict[str, Tensor] = {}
        self._left_out = ""
        # The tensors to capture, and the number of their `find` that the layout is known to fit.
        self._live: LiveTensors | None = None
        self._is_skipping = False  # whether the latest snapshot could not be taken, so that this is said once
        self._fitting = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out `_live`: a copy finds the tensors to capture for itself."""
        self.averages.wait()
        return self.__dict__ | {"_live": None}

    @property
    def is_current(self) -> bool:
        """Whether merges are made of what is captured now, and not frozen or of an earlier learning rate."""
        return not self.window.is_frozen and not (self.window.is_outdated and self.num_snapshots)

    @property
    def steps(self) -> list[int]:
        """Optimizer steps of the snapshots, oldest first."""
        return list(self.ring.steps) if self.ring is not None else []

    @property
    def covered(self) -> Sequence[int]:
        """The steps of the snapshots, as merge rules take them."""
        return self.ring.covered if self.ring is not None else []

    def prepare(self, module: nn.Module) -> None:
        """Allocates ring and averages, unless that has to wait for the first steps.

        It waits for frozen models, which a callback may thaw later, and for lazy parameters, which have no shapes yet.

        Raises:
            ValueError: If there are no floating-point parameters, none is selected, or one has too few bits for sums.
            MemoryError: If ring and averages do not fit into the free memory.
        """
        if not any(map(is_number, module.parameters())):
            raise ValueError(f"{type(module).__name__} has no floating-point parameters, so there is nothing to merge")
        if has_lazy_parameters(module) or not (trainable := merged_parameters(module)):
            return
        if not any(map(self.selection, trainable)):
            raise ValueError(
                f"Parts(include={self.selection.include}, exclude={self.selection.exclude}) leave no trainable"
                " parameter to merge"
            )
        self._allocate(module)

    def _allocate(self, module: nn.Module) -> None:
        parameters = merged_parameters(module, self.selection)
        refuse_narrow(parameters)
        self.sharding = Sharding(parameters)
        self._left_out = describe_left_out(module, self.selection)
        self.layout = layout = RowLayout(real_tensors(parameters))
        required = self.costs.required_bytes() if self.costs is not None else {}
        refuse_if_too_large(required, self.num_snapshots, len(self.averages), self.num_local_processes)
        if self.num_snapshots:
            storage = self.storage.new_storage(layout, self.num_snapshots, self.dtype, self.name)
            self.ring = self.kind.new_ring(storage, self.num_snapshots)
            self.kind.fit_to(layout)
        self.averages.fit_to(layout)

    @property
    def costs(self) -> CaptureCosts | None:
        """What the capture takes; None while the shapes of the parameters are not known."""
        if self.layout is None:
            return None
        return CaptureCosts(self.layout, self.num_snapshots, self.dtype, self.kind, self.averages, self.storage)

    def describe(self) -> str:
        """Returns what is captured, when and where, and how many bytes it takes, in words for the user."""
        during, parts = self.window.during, []
        if self.num_snapshots:
            parts.append(f"up to {self.num_snapshots} {self.kind.describe(self.window.when)}")
        if num := len(self.averages):
            parts.append(f"{num} average{'s' if num > 1 else ''} over every step {during}")
        what = ", and ".join(parts) + self._left_out
        if self.costs is None:
            return f"{what}, once there are trainable parameters whose shapes are known"
        return f"{what}, {self.costs.describe()}"

    def finish(self) -> None:
        """Makes it safe to write to the live weights while copies are under way; call it before any write."""
        if self.ring is not None:
            self.ring.storage.finish()
        self.kind.finish()
        self.averages.finish()

    def forget_since(self, step: int) -> None:
        """Drops the snapshots of this step and later ones. Averages and the interval in progress restart."""
        if self.ring is not None:
            self.ring.drop([taken for taken in self.ring.steps if taken >= step])
        self.kind.restart()
        self.averages.clear()

    def after_step(
        self,
        module: nn.Module,
        step: int,
        used: Rates,
        following: Rates,
        updates: RateUpdates = NO_UPDATES,
    ) -> None:
        """Records an optimizer step: updates the averages, and takes a snapshot if one is due.

        Args:
            module: The live model, after that step.
            step: Number of optimizer steps so far.
            used: Learning rates of that step.
            following: Learning rates of the next step.
            updates: How often the schedulers have set them.
        """
        event = self.window.follow(step, used, following, updates)
        if event in (PhaseEvent.BEGAN, PhaseEvent.RETRACTED):
            self.averages.clear()
            self.kind.restart()
        if event is PhaseEvent.RETRACTED and self.ring is not None and not self.window.is_outdated:
            self.ring.clear()
        if not event.is_stable:
            return
        closes = bool(self.num_snapshots) and self.window.schedule.take(step)
        end = step if closes else self.window.schedule.next_step or step
        is_due = bool(self.num_snapshots) and self.kind.is_due(step, end)
        if not (is_due or len(self.averages)):
            return
        if self._live is None or self._live.module is not module:
            self._live, self._fitting = LiveTensors(module, self.selection), 0
        found, parameters = self._live.find(), self._live.parameters()
        if not parameters:
            return
        if is_due or found != self._fitting:
            self._fit_to(module, parameters, step)
            self._fitting = found
        if len(self.averages):
            self.averages.update(step, parameters, self._live.buffers())
        if is_due:
            self._sample(parameters, step, end)
        if closes:
            self._take_snapshot(parameters, self._live.buffers(), step)

    def _sample(self, parameters: Mapping[str, Tensor], step: int, end: int) -> None:
        self.waited_seconds += wait_for_device(next(iter(parameters.values())).device)
        if not (reason := describe_nonfinite(parameters)):
            self.kind.add(step, end, parameters)
            return
        if self.sharding.is_sharded:
            reason += f" on rank {rank()}"
            self.kind.spoil(f"at step {step}, {reason}")
        self.kind.skip(step, reason)

    def _take_snapshot(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], step: int) -> None:
        assert self.ring is not None
        problem = self.kind.problem(step)
        if problem is not None and not self.sharding.is_sharded:
            if not self._is_skipping:
                until = f"The window stays as it was, at steps {self.steps}, until a snapshot can be taken."
                warnings.warn(f"{problem}. {until}", stacklevel=2)
            self._is_skipping = True
            self.kind.restart(step)
            return
        if not self.window.make_room_(self.ring, step):
            return
        self._is_skipping, own_buffers = False, local_clones(buffers)
        self.kind.close(self.ring, step, parameters)
        if problem is None:
            self.buffers = own_buffers
        else:
            # Other ranks may have this snapshot, and all rings must hold the same steps.
            warnings.warn(f"{problem}.", stacklevel=2)

    def _fit_to(self, module: nn.Module, parameters: Mapping[str, Tensor], step: int) -> None:
        """Allocates ring and averages for these parameters, unless the present ones fit them."""
        if self.layout is not None and self.layout.fits(parameters):
            return
        kept = [f"the window of {len(self.steps)} snapshots"] if self.steps else []
        kept += [f"the average {name!r}" for name in self.averages.names if self.averages[name].step is not None]
        if kept:
            warnings.warn(
                f"The trainable parameters changed before step {step}: {' and '.join(kept)} does not fit them any more,"
                " and a new one begins.",
                stacklevel=2,
            )
        self.averages.clear()
        # Free the old ring first, so that both never take memory at once.
        self.ring = None
        self.kind.fit_to(None)
        self.averages.fit_to(None)
        self._allocate(module)
        self.kind.restart(step - 1)

    def leave_out_unusable(self) -> dict[int, str]:
        """Marks snapshots that some rank cannot use; returns the reasons by step. All ranks must call it together."""
        if self.ring is None:
            return {}
        for reason in self.sharding.gather({rank(): self.kind.spoilt} if self.kind.spoilt else {}).values():
            self.kind.spoil(reason)
        gather = all_gather_dict if self.storage.is_shared_by_ranks else self.sharding.gather
        problems = dict(gather(self.ring.problems()))
        self.ring.leave_out(problems)
        return problems

    def drop_unusable(self) -> dict[int, str]:
        """Drops snapshots that some rank cannot use, and returns the reasons by step. All ranks must call it together.

        Raises:
            OSError: If there is such a snapshot and the storage is strict.
        """
        problems = self.leave_out_unusable()
        if problems and self.storage.is_strict:
            raise OSError(next(iter(problems.values())))
        if self.ring is not None:
            self.ring.drop(problems)
        return problems

    def spread(self, coefficients: Sequence[float], row: Sequence[Tensor]) -> float:
        """Returns `SnapshotRing.spread` over all shards of the model. All ranks must call it together."""
        assert self.ring is not None
        assert self.layout is not None
        replicas = self.sharding.num_replicas(self.layout.places)
        return self.ring.spread(coefficients, row, replicas, self.sharding.reduce_sum)
