"""The two kinds of snapshots: the weights at the end of an interval of steps, or their mean over the interval."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merge_callback.capture.layout import RowLayout
from merge_callback.capture.memory import required_bytes
from merge_callback.capture.moving import DirectUpdates, HostUpdates, move_, shadow_bytes, shadow_like
from merge_callback.capture.ring import MeanRing, SnapshotRing
from merge_callback.capture.storage import SnapshotStorage

# With this many samples of an interval, its mean is as good as that of all its steps.
DEFAULT_SAMPLES = 8


class PointSnapshots:
    """Snapshots are points: the weights at the end of each interval. Nothing is kept in between."""

    name = "point"
    noun = "snapshot"
    # The most steps that a snapshot is made of.
    num_samples = 1

    def __init__(self) -> None:
        self._problem: str | None = None

    def new_ring(self, storage: SnapshotStorage, capacity: int) -> SnapshotRing:
        """Creates a ring for snapshots of this kind."""
        return SnapshotRing(storage, capacity)

    def describe(self, when: str) -> str:
        """Returns what is captured and when, in words for the user."""
        return f"snapshots, {when}"

    def fit_to(self, layout: RowLayout | None) -> None:
        """Prepares for live tensors of this layout; None frees the memory that an earlier layout took."""

    def required_bytes(self, layout: RowLayout) -> dict[torch.device, int]:
        """Returns the bytes by device that are needed beside the ring."""
        return {}

    def is_due(self, step: int, end: int) -> bool:
        """Returns whether the weights of a step are needed; ``end`` is the last step of its interval."""
        return step >= end

    def add(self, step: int, end: int, live: Mapping[str, Tensor]) -> None:
        """Takes the weights of a step that is due."""
        self._problem = None

    def skip(self, step: int, reason: str) -> None:
        """Leaves out a step that is due, since its weights cannot be used."""
        self._problem = f"No snapshot at step {step}: {reason}"

    def problem(self, step: int) -> str | None:
        """Returns why there is no snapshot of the interval that ends at this step; None if there is one."""
        return self._problem

    @property
    def spoilt(self) -> str | None:
        """Why the interval in progress will have no snapshot, whatever comes; None if it may have one."""
        return None

    def spoil(self, reason: str) -> None:
        """Gives up the interval in progress, since some rank cannot use a step of it."""

    def close(self, ring: SnapshotRing, step: int, live: Mapping[str, Tensor]) -> None:
        """Puts the snapshot of the interval that ends at this step into the ring, or an open place for it."""
        if self._problem is not None:
            ring.leave_open(step, self._problem)
        else:
            ring.append(step, live)

    def restart(self, step: int | None = None) -> None:
        """Begins a new interval after a step; None is the step before the next one."""

    def finish(self) -> None:
        """Makes it safe to write to the live tensors; call it before any write."""

    def wait(self) -> None:
        """Waits until all samples are taken; raises the error of one that failed."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns the tensors of the interval in progress, by name of the live tensor and by reference."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the interval in progress, except its `tensors`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restores the interval in progress."""


class MeanSnapshots(PointSnapshots):
    """Snapshots are means of the weights over intervals, in float32 or better until an interval ends.

    Each interval has evenly spaced samples, of which the last one is at its end. They have equal weights; if the
    interval doubles in its course, the later ones stand for twice as many steps. A sample with NaN or inf is left out.
    In a sharded run it costs the interval, since ranks do not communicate at each sample.

    Args:
        num_samples: Samples of an interval; None is every step up to 8, else 8.
        device: Where the mean is calculated; None is the model's device. If that is host memory but the model is
            elsewhere, a background thread calculates it.
    """

    name = "mean"
    noun = "mean"

    def __init__(self, num_samples: int | None, device: torch.device | None) -> None:
        self.num_samples = num_samples or DEFAULT_SAMPLES
        self.device = device
        self._mean: dict[str, Tensor] = {}
        self._updates: DirectUpdates | HostUpdates = DirectUpdates(self._move)
        self.restart()

    def restart(self, step: int | None = None) -> None:
        # The step after which the interval begins, the latest step that was due, and how many steps the samples so far
        # stand for.
        self._begin, self._latest, self._weight = step, step, 0.0
        self._problem: str | None = None

    def new_ring(self, storage: SnapshotStorage, capacity: int) -> SnapshotRing:
        return MeanRing(storage, capacity)

    def describe(self, when: str) -> str:
        return f"snapshots, {when}, each the mean of up to {self.num_samples} steps since the one before"

    def fit_to(self, layout: RowLayout | None) -> None:
        self.wait()
        # Free the old memory first, so that both never take memory at once.
        self._mean, self._updates = {}, DirectUpdates(self._move)
        self.restart()
        if layout is not None and self._is_elsewhere(layout):
            self._updates = HostUpdates(self._move, layout)

    def required_bytes(self, layout: RowLayout) -> dict[torch.device, int]:
        required = shadow_bytes(layout, self.device)
        if self._is_elsewhere(layout):
            copy = sum(required_bytes(layout, 1, None, self.device).values())
            required = {device: size + copy for device, size in required.items()}
        return required

    def _is_elsewhere(self, layout: RowLayout) -> bool:
        """Whether the means are not calculated where the live tensors are."""
        return any(self.device not in (None, device) for _, device in layout.groups)

    def is_due(self, step: int, end: int) -> bool:
        if self._begin is None or self._latest is None:
            self._begin = self._latest = step - 1
        done, before = (self._num_due(at, end) for at in (step, self._latest))
        return done > before

    def _num_due(self, step: int, end: int) -> int:
        """Returns how many samples are due from the beginning of the interval up to a step."""
        assert self._begin is not None
        length = end - self._begin
        return (step - self._begin) * min(self.num_samples, length) // length

    def add(self, step: int, end: int, live: Mapping[str, Tensor]) -> None:
        assert self._begin is not None
        length = end - self._begin
        stands_for = length / min(self.num_samples, length)
        weight = self._weight + stands_for
        # Meanwhile a mean of nothing: an interrupt may leave it half moved.
        self._weight = 0.0
        self._updates.begin(live, stands_for / weight)
        self._latest, self._weight = step, weight

    @torch.no_grad()
    def _move(self, live: Mapping[str, Tensor], share: float) -> None:
        if not self._mean:
            self._mean = {name: shadow_like(tensor, self.device) for name, tensor in live.items()}
        if share == 1:
            for name, mean in self._mean.items():
                mean.copy_(live[name])
        else:
            move_(self._mean, live, share)

    def skip(self, step: int, reason: str) -> None:
        self._latest = step
        then = "The mean of its interval goes without it" if self._problem is None else "Its interval has no snapshot"
        warnings.warn(f"No sample at step {step}: {reason}. {then}.", stacklevel=2)

    @property
    def spoilt(self) -> str | None:
        return self._problem

    def spoil(self, reason: str) -> None:
        self._problem = reason

    def problem(self, step: int) -> str | None:
        if self._problem is not None:
            return f"No snapshot at step {step}: {self._problem}"
        if self._weight:
            return None
        return f"No snapshot at step {step}: no step of its interval has weights that can be used"

    def close(self, ring: SnapshotRing, step: int, live: Mapping[str, Tensor]) -> None:
        assert self._begin is not None
        if (problem := self.problem(step)) is not None:
            ring.leave_open(step, problem, self._begin)
        else:
            self.wait()
            ring.append(step, self._mean, self._begin)
        self.restart(step)

    def finish(self) -> None:
        self._updates.finish()

    def wait(self) -> None:
        self._updates.wait()

    def tensors(self) -> Mapping[str, Tensor]:
        self.wait()
        return self._mean if self._weight and self._problem is None else {}

    def state_dict(self) -> dict[str, Any]:
        self.wait()
        weight = self._weight if self._problem is None else 0.0
        return {"begin": self._begin, "latest": self._latest, "weight": weight, "problem": self._problem}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._begin, self._latest, self._weight = state["begin"], state["latest"], state["weight"]
        self._problem = state["problem"]
        self._mean = dict(tensors)

    def __getstate__(self) -> dict[str, Any]:
        """Waits for the sample under way."""
        self.wait()
        return self.__dict__.copy()
