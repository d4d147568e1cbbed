"""When and what is captured: joins the learning rate's phase, the schedule, the model's tensors, ring and shadows."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from merge_callback.phase import CaptureSchedule, StablePhase, needs_thinning
from merge_callback.rules import Rule, Window, required_span
from merge_callback.shadow import Average, Shadow, shadow_bytes
from merge_callback.shards import Sharding, added_up, local, local_tensors
from merge_callback.snapshots import DeviceStorage, RowLayout, SnapshotRing, refuse_if_too_large
from merge_callback.weights import has_lazy_parameters, merged_parameters, nonfinite_names, snapshot_buffers

# Without an interval of its own the ring covers at least this share of the training so far.
DEFAULT_SPAN = 0.1


class SnapshotCapture:
    """Follows a run step by step, and keeps what merges are made of: a window of snapshots, and shadows.

    Args:
        every_n_train_steps: Optimizer steps between two snapshots; None starts at one and doubles.
        num_snapshots: Capacity of the ring.
        rules: The rules of the merges; their `Window`s say how far back the ring has to reach.
        start: ``"stable"``, or the optimizer step from which on to capture.
        dtype: Dtype in which snapshots are kept; None keeps each parameter's own.
        averages: Name -> profile of every shadow. With shadows and no rules no snapshots are taken.
    """

    def __init__(
        self,
        every_n_train_steps: int | None,
        num_snapshots: int,
        rules: Iterable[Rule],
        start: Literal["stable"] | int,
        dtype: torch.dtype | None,
        *,
        averages: Mapping[str, Average] | None = None,
    ) -> None:
        self.every_n_train_steps = every_n_train_steps
        self.num_snapshots = num_snapshots
        self.start = start
        self.dtype = dtype
        self.phase = StablePhase()
        self.schedule = CaptureSchedule(every_n_train_steps or 1)
        self.sharding = Sharding({})
        self.layout: RowLayout | None = None
        self.ring: SnapshotRing | None = None
        # Floating buffers at the newest snapshot: batch-norm statistics are taken over, not averaged.
        self.buffers: dict[str, Tensor] = {}
        self.shadows = {name: Shadow(average) for name, average in (averages or {}).items()}
        # Floating buffers when the shadows were last updated.
        self.shadow_buffers: dict[str, Tensor] = {}
        self._rules = list(rules)
        self._takes_snapshots = bool(self._rules) or not self.shadows
        if every_n_train_steps is None:
            self._rules.append(Window(span=DEFAULT_SPAN))
        # The phase that the schedule belongs to, and whether the ring's snapshots are of an earlier one.
        self._window_phase = 0
        self._is_outdated = False

    @property
    def is_comparable(self) -> bool:
        """Whether merges and the live model belong to one phase of constant rate, which goes on."""
        return self.phase.is_stable and not (self._is_outdated and self._takes_snapshots)

    @property
    def steps(self) -> list[int]:
        """Optimizer steps of the snapshots, oldest first."""
        return list(self.ring.steps) if self.ring is not None else []

    def prepare(self, module: nn.Module) -> None:
        """Allocates the ring, unless the module's parameters get their shapes only in its first forward pass.

        Raises:
            ValueError: If the module has no trainable floating-point parameters.
            MemoryError: If the ring does not fit into the memory that is free.
        """
        if has_lazy_parameters(module):
            return
        parameters = merged_parameters(module)
        self.sharding = Sharding(parameters)
        if not parameters:
            raise ValueError(
                f"{type(module).__name__} has no trainable floating-point parameters, so there is nothing to merge"
            )
        self.layout = layout = RowLayout(local_tensors(parameters))
        num_snapshots = self.num_snapshots if self._takes_snapshots else 0
        required = DeviceStorage.required_bytes(layout, num_snapshots, self.dtype)
        for device, size in shadow_bytes(layout).items():
            required[device] += size * len(self.shadows)
        refuse_if_too_large(required, num_snapshots, len(self.shadows))
        if self._takes_snapshots:
            self.ring = SnapshotRing(DeviceStorage(layout, num_snapshots, self.dtype), num_snapshots)

    def describe(self) -> str:
        """What will be captured, when and where, and how many bytes it takes."""
        every = self.every_n_train_steps
        during = "while the learning rate is constant" if self.start == "stable" else f"from step {self.start} on"
        parts = [f"{len(self.shadows)} averages over every step {during}"] if self.shadows else []
        if self._takes_snapshots:
            interval = f"every {every} steps" if every else "at an interval that doubles"
            parts.insert(0, f"up to {self.num_snapshots} snapshots, {interval} {during}")
        what = ", and ".join(parts)
        if self.layout is None:
            return f"{what}, of parameters whose shapes are not known yet"
        devices = ", ".join(sorted({str(device) for _, device in self.layout.groups}))
        size = self.ring.storage.size_bytes if self.ring is not None else 0
        size += len(self.shadows) * sum(shadow_bytes(self.layout).values())
        return f"{what}, in {size / 2**20:.1f} MiB on {devices}"

    def after_step(self, module: nn.Module, step: int, used: Sequence[float], following: Sequence[float]) -> bool:
        """Takes note of an optimizer step, and a snapshot where one is due; returns whether one was taken.

        Args:
            module: The live model, after that step.
            step: Number of optimizer steps so far.
            used: Learning rates of that step.
            following: Learning rates of the next step.
        """
        is_stable = self.phase.observe(used, following)
        if self.start == "stable":
            if not is_stable:
                if self.phase.was_spurious and self._window_phase > self.phase.num_begun:
                    self._drop_spurious_window()
                return False
            if self._window_phase != self.phase.num_begun:
                # The old window stays until the new one has its first snapshot.
                self._window_phase, self._is_outdated = self.phase.num_begun, True
                self.schedule = CaptureSchedule(self.every_n_train_steps or 1)
                for shadow in self.shadows.values():
                    shadow.clear()
        elif step < self.start:
            return False
        is_due = self._takes_snapshots and self.schedule.take(step)
        if not (is_due or self.shadows):
            return False
        parameters = local_tensors(merged_parameters(module))
        self._fit_to(module, parameters, step)
        if self.shadows:
            for shadow in self.shadows.values():
                shadow.update(step, parameters)
            self.shadow_buffers = _copied_buffers(module)
        return is_due and self._take_snapshot(module, parameters, step)

    def drop_nonfinite_shadows(self) -> list[str]:
        """Names of the shadows that hold NaN or inf, which would stay for good; they begin anew. Waits for the device.

        Whether weights are finite is not asked at every step: that would cost another pass over them.
        """
        dropped = [name for name, shadow in self.shadows.items() if shadow.tensors and not shadow.is_finite]
        for name in dropped:
            self.shadows[name].clear()
        return dropped

    def spread(self, coefficients: Sequence[float], row: Sequence[Tensor]) -> float:
        """`SnapshotRing.spread` over all shards of the model; for all ranks to call at the same time."""
        assert self.ring is not None
        assert self.layout is not None
        if not self.sharding.is_sharded:
            return self.ring.spread(coefficients, row)
        return self.ring.spread(coefficients, row, self.sharding.copies(self.layout.places), added_up)

    def _drop_spurious_window(self) -> None:
        self._window_phase = self.phase.num_begun
        if self.ring is not None and not self._is_outdated:
            self.ring.clear()
        for shadow in self.shadows.values():
            shadow.clear()

    def _take_snapshot(self, module: nn.Module, parameters: Mapping[str, Tensor], step: int) -> bool:
        assert self.ring is not None
        if bad := nonfinite_names(parameters):
            warnings.warn(
                f"No snapshot at step {step}: {bad[0]} holds NaN or inf"
                + (f", and {len(bad) - 1} more parameters do" if len(bad) > 1 else "")
                + f". The window stays as it was, at steps {self.steps}.",
                stacklevel=2,
            )
            return False
        if self._is_outdated:
            self.ring.clear()
            self._is_outdated = False
        elif self.ring.is_full and self._needs_thinning(step):
            self.ring.thin()
            self.schedule.double(newest=self.ring.steps[-1])
            if not self.schedule.take(step):
                return False
        self.ring.append(step, parameters)
        self.buffers = _copied_buffers(module)
        return True

    def _fit_to(self, module: nn.Module, parameters: Mapping[str, Tensor], step: int) -> None:
        """Makes room for these parameters, where there is none yet or they are others than before."""
        if self.layout is not None and self.layout.fits(parameters):
            return
        if self.layout is not None:
            kept = [f"the window of {len(self.steps)} snapshots"] if self.ring is not None else []
            kept += [f"the average {name!r}" for name in self.shadows]
            warnings.warn(
                f"The trainable parameters changed before step {step}: {' and '.join(kept)} does not fit them any more,"
                " and a new one begins.",
                stacklevel=2,
            )
        # Otherwise both rings would take their memory at once.
        self.ring = None
        for shadow in self.shadows.values():
            shadow.clear()
        self.prepare(module)

    def _needs_thinning(self, step: int) -> bool:
        required = max((required_span(rule, step) for rule in self._rules), default=0.0)
        return needs_thinning(self.steps, step, required)

    def state_dict(self, *, with_snapshots: bool) -> dict[str, Any]:
        """All that is needed to go on as if there had been no interruption; the ring's rows by reference.

        Args:
            with_snapshots: Without them a resumed window starts empty.
        """
        return {
            "every_n_train_steps": self.every_n_train_steps,
            "phase": asdict(self.phase),
            "window_phase": self._window_phase,
            "is_outdated": self._is_outdated,
            "schedule": asdict(self.schedule),
            "num_snapshots": len(self.steps),
            "ring": self.ring.state_dict() if self.ring is not None and with_snapshots else None,
            "buffers": self.buffers if with_snapshots else {},
            "shadows": {name: shadow.state_dict() for name, shadow in self.shadows.items()} if with_snapshots else {},
            "shadow_buffers": self.shadow_buffers if with_snapshots else {},
        }

    def load_state_dict(self, state: Mapping[str, Any], module: nn.Module) -> list[str]:
        """Takes over a saved state, as much of it as fits; call `prepare` before.

        Args:
            state: As `state_dict` made it.
            module: The live model.

        Returns:
            What was dropped or changed on the way, in words; empty if the window goes on exactly.
        """
        changes: list[str] = []
        self.phase = StablePhase(**state["phase"])
        self._window_phase, self._is_outdated = state["window_phase"], state["is_outdated"]
        if state["ring"] is None or self.ring is None:
            if state["num_snapshots"]:
                changes.append(f"the {state['num_snapshots']} snapshots of the window were not saved: it starts empty")
        else:
            changes = self._load_ring(self.ring, state)
        if state["every_n_train_steps"] == self.every_n_train_steps and (self.steps or not state["num_snapshots"]):
            self.schedule = CaptureSchedule(**state["schedule"])
        elif self.steps:
            changes.append(
                f"the interval is now {self.every_n_train_steps or 'one that doubles'} instead of"
                f" {state['every_n_train_steps'] or 'one that doubles'}"
            )
            self.schedule.next_step = self.steps[-1] + self.schedule.interval
        return changes + self._load_shadows(state, module)

    def _load_shadows(self, state: Mapping[str, Any], module: nn.Module) -> list[str]:
        live = local_tensors(merged_parameters(module))
        lost = [
            name
            for name, shadow in self.shadows.items()
            if name not in state["shadows"] or not shadow.load_state_dict(state["shadows"][name], live)
        ]
        if len(lost) < len(self.shadows):
            buffers = snapshot_buffers(module)
            saved = state["shadow_buffers"].items()
            self.shadow_buffers = {name: buffer.to(buffers[name].device, copy=True) for name, buffer in saved}
        return [f"there is nothing of the average {name!r} to go on from: it starts anew" for name in lost]

    def _load_ring(self, ring: SnapshotRing, state: Mapping[str, Any]) -> list[str]:
        try:
            changes = ring.load_state_dict(state["ring"])
        except ValueError as error:
            return [f"its window of {state['num_snapshots']} snapshots was dropped: {error}"]
        device = ring.storage.layout.groups[0][1]
        self.buffers = {name: buffer.to(device, copy=True) for name, buffer in state["buffers"].items()}
        return changes


def _copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: local(buffer).clone() for name, buffer in snapshot_buffers(module).items()}
