"""When and what is captured: joins the learning rate's phase, the schedule, the model's tensors, ring and shadows."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from merge_callback.capture.directory import DirectoryStorage, SnapshotDirectory
from merge_callback.capture.layout import RowLayout
from merge_callback.capture.memory import refuse_if_too_large, required_bytes
from merge_callback.capture.phase import CaptureSchedule, StablePhase, needs_thinning
from merge_callback.capture.ring import SnapshotRing
from merge_callback.capture.running_averages import HostShadows, Shadow, shadow_bytes, shadow_like
from merge_callback.capture.state import ShardReader
from merge_callback.capture.storage import HOST, DeviceStorage, HostStorage, SnapshotStorage, host_row, new_slots
from merge_callback.live.names import EVERYTHING, Selection
from merge_callback.live.sharding import Sharding, all_gather_dict, all_reduce_sum, local_clones, local_tensors, rank
from merge_callback.live.weights import (
    LiveTensors,
    has_lazy_parameters,
    merged_parameters,
    nonfinite_names,
    snapshot_buffers,
)
from merge_callback.merging.averages import Average
from merge_callback.merging.rules import Rule, required_span
from merge_callback.merging.windows import Window
from merge_callback.utilities.background import wait_for_device

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
        storage: ``"device"``, ``"cpu"``, or a directory.
        name: Distinguishes files in a directory.
        averages: Name -> profile of every shadow. With shadows and no rules no snapshots are taken.
        selection: Which parameters are captured; the others are left to the live model.
    """

    def __init__(
        self,
        every_n_train_steps: int | None,
        num_snapshots: int,
        rules: Iterable[Rule],
        start: Literal["stable"] | int,
        dtype: torch.dtype | None,
        *,
        storage: str | SnapshotDirectory = "device",
        name: str = "merge",
        averages: Mapping[str, Average] | None = None,
        selection: Selection = EVERYTHING,
    ) -> None:
        # On this host, each with as much to capture.
        self.num_local_processes = 1
        # Until a GPU had done the training's own work: no cost of capturing.
        self.waited_seconds = 0.0
        self.every_n_train_steps = every_n_train_steps
        self.num_snapshots = num_snapshots
        self.start = start
        self.dtype = dtype
        self.storage = storage
        self.name = name
        self.selection = selection
        self._left_out = ""
        self.phase = StablePhase()
        self.schedule = CaptureSchedule(every_n_train_steps or 1)
        self.sharding = Sharding({})
        self.layout: RowLayout | None = None
        self.ring: SnapshotRing | None = None
        # Floating buffers at the newest snapshot: batch-norm statistics are taken over, not averaged.
        self.buffers: dict[str, Tensor] = {}
        self._shadows = {name: Shadow(average) for name, average in (averages or {}).items()}
        self._host_shadows: HostShadows | None = None
        # Floating buffers when the shadows were last updated.
        self.shadow_buffers: dict[str, Tensor] = {}
        self._rules = list(rules)
        self._takes_snapshots = bool(self._rules) or not self._shadows
        if every_n_train_steps is None:
            self._rules.append(Window(span=DEFAULT_SPAN))
        # The phase that the schedule belongs to, and whether the ring's snapshots are of an earlier one.
        self._window_phase = 0
        self._is_outdated = False
        # What is captured, and which finding of it the layout is known to fit.
        self._live: LiveTensors | None = None
        self._fitting = 0

    def __getstate__(self) -> dict[str, Any]:
        """Copies look for themselves at what they capture."""
        self.wait()
        return self.__dict__ | {"_live": None}

    @property
    def shadows(self) -> dict[str, Shadow]:
        """By name, as of the latest step."""
        self.wait()
        return self._shadows

    def wait(self) -> None:
        """Returns when averages that are updated beside the training are up to date; raises what went wrong there."""
        if self._host_shadows is not None:
            self._host_shadows.wait()

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
            ValueError: If the module has no trainable floating-point parameters, or none of those selected.
            MemoryError: If the ring does not fit into the memory that is free.
        """
        if has_lazy_parameters(module):
            return
        parameters = merged_parameters(module, self.selection)
        self.sharding = Sharding(parameters)
        self._left_out = self._describe_left_out(module)
        if not parameters:
            raise ValueError(
                f"{type(module).__name__} has no trainable floating-point parameters, so there is nothing to merge"
                if self.selection.is_everything
                else f"include={self.selection.include} and exclude={self.selection.exclude} leave no trainable"
                " parameter to merge"
            )
        self.layout = layout = RowLayout(local_tensors(parameters))
        num_snapshots = self.num_snapshots if self._takes_snapshots else 0
        is_in_files = isinstance(self.storage, SnapshotDirectory)
        num_rows = min(num_snapshots, 1) if is_in_files else num_snapshots
        required = required_bytes(layout, num_rows, self.dtype, self._place)
        for device, size in required_bytes(layout, 1, None, self._place).items():
            # The merge.
            required[device] += size
        for device, size in shadow_bytes(layout, self._shadow_device).items():
            required[device] = required.get(device, 0) + size * len(self._shadows)
        if self._shadows and self._shadow_device is not None:
            # The copy that they are moved towards.
            required[HOST] += sum(required_bytes(layout, 1, None).values())
        refuse_if_too_large(required, num_snapshots, len(self._shadows), self.num_local_processes)
        if self._takes_snapshots:
            self.ring = SnapshotRing(self._new_storage(layout), num_snapshots)
        if self._shadows and self._shadow_device is not None:
            self._host_shadows = HostShadows(self._shadows.values(), layout)

    def _describe_left_out(self, module: nn.Module) -> str:
        """What the selection leaves to the live model, for whoever reads the start of a fit."""
        if self.selection.is_everything:
            return ""
        out = {name: p for name, p in merged_parameters(module).items() if not self.selection(name)}
        num = sum(parameter.numel() for parameter in out.values())
        names = ", ".join([*list(out)[:3], *(["..."] if len(out) > 3 else [])])
        return f", without {len(out)} parameters of {num:,} elements, which stay live ({names})" if out else ""

    @property
    def _place(self) -> torch.device | None:
        """Where snapshots are in memory, and merges made; None is where the model is."""
        return None if self.storage == "device" else HOST

    @property
    def _shadow_device(self) -> torch.device | None:
        return HOST if self.storage == "cpu" else None

    def _new_storage(self, layout: RowLayout) -> SnapshotStorage:
        if isinstance(self.storage, SnapshotDirectory):
            prefix = f"{self.name}-rank{rank():05d}-"
            return DirectoryStorage(layout, self.dtype, Path(self.storage.path), prefix)
        storage = DeviceStorage if self.storage == "device" else HostStorage
        return storage(layout, self.num_snapshots, self.dtype)

    def describe(self) -> str:
        """What will be captured, when and where, and how many bytes it takes."""
        every = self.every_n_train_steps
        during = "while the learning rate is constant" if self.start == "stable" else f"from step {self.start} on"
        plural = "s" if len(self._shadows) > 1 else ""
        parts = [f"{len(self._shadows)} average{plural} over every step {during}"] if self._shadows else []
        if self._takes_snapshots:
            interval = f"every {every} steps" if every else "at an interval that doubles"
            parts.insert(0, f"up to {self.num_snapshots} snapshots, {interval} {during}")
        what = ", and ".join(parts) + self._left_out
        if self.layout is None:
            return f"{what}, of parameters whose shapes are not known yet"
        devices = ", ".join(sorted({str(device) for _, device in self.layout.groups}))
        size = self.ring.storage.size_bytes if self.ring is not None else 0
        averages = len(self._shadows) * sum(shadow_bytes(self.layout).values())
        if self._host_shadows is not None:
            return f"{what}, in {(size + averages + self._host_shadows.size_bytes) / 2**20:.1f} MiB of host memory"
        if self.ring is None or self.storage == "device":
            return f"{what}, in {(size + averages) / 2**20:.1f} MiB on {devices}"
        beside = f" and {averages / 2**20:.1f} MiB on {devices}" if averages else ""
        if isinstance(self.storage, SnapshotDirectory):
            in_files = sum(required_bytes(self.layout, self.num_snapshots, self.dtype).values())
            place = f"files in {self.storage.path}, up to {in_files / 2**20:.1f} MiB by each rank"
            return f"{what}, in {place}, with {size / 2**20:.1f} MiB of host memory{beside}"
        return f"{what}, in {size / 2**20:.1f} MiB of host memory{beside}"

    def finish(self) -> None:
        """Called before anything writes to the live weights: copies of them that are under way come first."""
        if self.ring is not None:
            self.ring.storage.finish()
        if self._host_shadows is not None:
            self._host_shadows.finish()

    def forget_since(self, step: int) -> None:
        """Drops the snapshots of that step and of later ones; averages, which know them all, begin anew."""
        if self.ring is not None:
            self.ring.drop([taken for taken in self.ring.steps if taken >= step])
        for shadow in self.shadows.values():
            shadow.clear()

    def after_step(self, module: nn.Module, step: int, used: Sequence[float], following: Sequence[float]) -> bool:
        """Takes note of an optimizer step, and a snapshot where one is due; returns whether one was taken.

        Args:
            module: The live model, after that step.
            step: Number of optimizer steps so far.
            used: Learning rates of that step.
            following: Learning rates of the next step.
        """
        if not self._follow(step, used, following):
            return False
        is_due = self._takes_snapshots and self.schedule.take(step)
        if not (is_due or self._shadows):
            return False
        if self.layout is None and has_lazy_parameters(module):
            return False
        if self._live is None or self._live.module is not module:
            self._live, self._fitting = LiveTensors(module, self.selection), 0
        found, parameters = self._live.find(), self._live.parameters()
        if is_due or found != self._fitting:
            self._fit_to(module, parameters, step)
            self._fitting = found
        if self._shadows:
            self._update_shadows(step, parameters)
            self.shadow_buffers = local_clones(self._live.buffers())
        return is_due and self._take_snapshot(parameters, self._live.buffers(), step)

    def _follow(self, step: int, used: Sequence[float], following: Sequence[float]) -> bool:
        """Takes note of the rates of a step; returns whether it belongs to a window."""
        is_stable = self.phase.observe(used, following)
        if self.start != "stable":
            return step >= self.start
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
        return True

    def _update_shadows(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        if self._host_shadows is not None:
            self._host_shadows.update(step, parameters)
            return
        for shadow in self._shadows.values():
            shadow.update(step, parameters)

    def check_shadow(self, name: str) -> None:
        """Raises `ValueError` if the average of that name holds NaN or inf on any rank; ranks call it together."""
        shadow = self.shadows[name]
        bad = {} if shadow.is_finite else {rank(): None}
        if all_gather_dict(bad) if self.sharding.is_sharded else bad:
            raise ValueError(f"the average over every step, {shadow.average}, holds NaN or inf")

    def shadow_row(self, name: str) -> list[Tensor]:
        """A copy of the average of that name, as a row of the layout."""
        assert self.layout is not None
        row = self.layout.new_row() if self._shadow_device is None else host_row(self.layout)
        return self.shadows[name].write_row_(row, self.layout)

    def drop_nonfinite_shadows(self) -> list[str]:
        """Names of the shadows that hold NaN or inf, which would stay for good; they begin anew. Waits for the device.

        Whether weights are finite is not asked at every step: that would cost another pass over them.
        """
        bad = {name: None for name, shadow in self.shadows.items() if shadow.tensors and not shadow.is_finite}
        # What one rank drops all have to drop, or they would validate other merges.
        dropped = list(all_gather_dict(bad) if self.sharding.is_sharded else bad)
        for name in dropped:
            self.shadows[name].clear()
        return dropped

    def drop_unusable(self) -> list[str]:
        """Drops snapshots that cannot be used on some rank; returns why. Ranks call it at the same time.

        Raises:
            OSError: If there are any, and the directory they are in is a strict one.
        """
        if self.ring is None or not (self.sharding.is_sharded or isinstance(self.storage, SnapshotDirectory)):
            return []
        problems = all_gather_dict(self.ring.problems())
        if problems and isinstance(self.storage, SnapshotDirectory) and self.storage.strict:
            raise OSError(next(iter(problems.values())))
        self.ring.drop(problems)
        return list(problems.values())

    def spread(self, coefficients: Sequence[float], row: Sequence[Tensor]) -> float:
        """`SnapshotRing.spread` over all shards of the model; for all ranks to call at the same time."""
        assert self.ring is not None
        assert self.layout is not None
        if not self.sharding.is_sharded:
            return self.ring.spread(coefficients, row)
        return self.ring.spread(coefficients, row, self.sharding.num_replicas(self.layout.places), all_reduce_sum)

    def _drop_spurious_window(self) -> None:
        self._window_phase = self.phase.num_begun
        if self.ring is not None and not self._is_outdated:
            self.ring.clear()
        for shadow in self.shadows.values():
            shadow.clear()

    def _take_snapshot(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], step: int) -> bool:
        assert self.ring is not None
        self.waited_seconds += wait_for_device(next(iter(parameters.values())).device)
        if bad := nonfinite_names(parameters):
            more = f", and {len(bad) - 1} more parameters do" if len(bad) > 1 else ""
            problem = f"No snapshot at step {step}: {bad[0]} holds NaN or inf{more}"
            if not self.sharding.is_sharded:
                warnings.warn(f"{problem}. The window stays as it was, at steps {self.steps}.", stacklevel=2)
                return False
            warnings.warn(f"{problem} on rank {rank()}.", stacklevel=2)
        else:
            problem = None
        if self._is_outdated:
            self.ring.clear()
            self._is_outdated = False
        elif self.ring.is_full and self._needs_thinning(step):
            self.ring.thin()
            self.schedule.double(newest=self.ring.steps[-1])
            if not self.schedule.take(step):
                return False
        if problem is not None:
            # Other ranks may have taken theirs, and must go on in step with this one.
            self.ring.leave_open(step, problem)
            return False
        self.ring.append(step, parameters)
        self.buffers = local_clones(buffers)
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
        for shadow in self.shadows.values():
            shadow.clear()
        # Otherwise both rings would take their memory at once.
        self.ring = self._host_shadows = None
        self.prepare(module)

    def _needs_thinning(self, step: int) -> bool:
        required = max((required_span(rule, step) for rule in self._rules), default=0.0)
        return needs_thinning(self.steps, step, required)

    def state_dict(self, *, with_snapshots: bool) -> dict[str, Any]:
        """All that is needed to go on as if there had been no interruption; the ring's rows by reference.

        Args:
            with_snapshots: Without them a resumed window starts empty.
        """
        ring, shadows = None, {}
        if with_snapshots:
            shadows = {name: shadow.state_dict() for name, shadow in self.shadows.items()}
            ring = self.ring.state_dict() if self.ring is not None and not self.sharding.is_sharded else None
            if self.ring is not None and self.sharding.is_sharded:
                ring = self.ring.order() | {"shapes": self._whole_shapes()}
        if self.sharding.is_sharded:
            shadows = {name: {**state, "tensors": {}} for name, state in shadows.items()}
        return {
            "every_n_train_steps": self.every_n_train_steps,
            "phase": asdict(self.phase),
            "window_phase": self._window_phase,
            "is_outdated": self._is_outdated,
            "schedule": asdict(self.schedule),
            "num_snapshots": len(self.steps),
            "ring": ring,
            "buffers": self.buffers if with_snapshots else {},
            "shadows": shadows,
            "shadow_buffers": self.shadow_buffers if with_snapshots else {},
        }

    def shards(self) -> Iterator[tuple[str, str, Tensor]]:
        """What `state_dict` leaves out of a sharded model's, for `put_shards`: the tensors themselves, by reference."""
        if self.ring is not None and self.layout is not None:
            for index, row in enumerate(self.ring.state_dict()["rows"]):
                for name, tensor in self.layout.views(row).items():
                    yield f"ring.{index}.{name}", name, tensor
        for average, shadow in self.shadows.items():
            for name, tensor in shadow.tensors.items():
                yield f"shadow.{average}.{name}", name, tensor

    def _whole_shapes(self) -> dict[str, list[int]]:
        assert self.layout is not None
        return self.sharding.shapes({name: place.shape for name, place in self.layout.places.items()})

    def load_state_dict(
        self, state: Mapping[str, Any], module: nn.Module, read: ShardReader | None = None
    ) -> list[str]:
        """Takes over a saved state, as much of it as fits; call `prepare` before.

        Args:
            state: As `state_dict` made it.
            module: The live model.
            read: Fills tensors that `shards` has named; None where the state holds them itself.

        Returns:
            What was dropped or changed on the way, in words; empty if the window goes on exactly.
        """
        changes: list[str] = []
        self.phase = StablePhase(**state["phase"])
        self._window_phase, self._is_outdated = state["window_phase"], state["is_outdated"]
        if self.ring is None:
            if state["num_snapshots"]:
                changes.append(
                    f"the {state['num_snapshots']} snapshots of the window are left out: no merge needs them"
                )
        elif state["ring"] is None:
            if state["num_snapshots"]:
                changes.append(f"the {state['num_snapshots']} snapshots of the window were not saved: it starts empty")
        else:
            changes = self._load_ring(self.ring, state, read)
        if state["every_n_train_steps"] == self.every_n_train_steps and (self.steps or not state["num_snapshots"]):
            self.schedule = CaptureSchedule(**state["schedule"])
        elif self.steps:
            changes.append(
                f"the interval is now {self.every_n_train_steps or 'one that doubles'} instead of"
                f" {state['every_n_train_steps'] or 'one that doubles'}"
            )
            self.schedule.next_step = self.steps[-1] + self.schedule.interval
        return changes + self._load_shadows(state, module, read)

    def _load_shadows(self, state: Mapping[str, Any], module: nn.Module, read: ShardReader | None) -> list[str]:
        live = local_tensors(merged_parameters(module, self.selection))
        if read is not None:
            shadows = {}
            for average, saved in state["shadows"].items():
                is_there = saved["step"] is not None and average in self.shadows
                device = self._shadow_device
                tensors = {name: shadow_like(tensor, device) for name, tensor in live.items()} if is_there else {}
                self._read(read, f"shadow.{average}", tensors)
                shadows[average] = {**saved, "tensors": tensors}
            state = {**state, "shadows": shadows}
        lost = [name for name, shadow in self.shadows.items() if not self._load_shadow(name, shadow, state, live)]
        if len(lost) < len(self.shadows):
            buffers = snapshot_buffers(module)
            saved = state["shadow_buffers"].items()
            self.shadow_buffers = {name: buffer.to(buffers[name].device, copy=True) for name, buffer in saved}
        return [f"there is nothing of the average {name!r} to go on from: it starts anew" for name in lost]

    def _load_shadow(self, name: str, shadow: Shadow, state: Mapping[str, Any], live: Mapping[str, Tensor]) -> bool:
        saved = state["shadows"].get(name)
        return saved is not None and shadow.load_state_dict(saved, live, self._shadow_device)

    def _load_ring(self, ring: SnapshotRing, state: Mapping[str, Any], read: ShardReader | None) -> list[str]:
        saved = state["ring"]
        try:
            if read is None:
                changes = ring.load_state_dict(saved)
            elif saved["shapes"] != self._whole_shapes():
                raise ValueError("the model's parameters have other names or shapes")
            else:
                rows = (self._read_row(index, read) for index in range(len(saved["steps"])))
                changes = ring.load(saved["steps"], rows)
        except ValueError as error:
            return [f"its window of {state['num_snapshots']} snapshots was dropped: {error}"]
        device = ring.storage.layout.groups[0][1]
        self.buffers = {name: buffer.to(device, copy=True) for name, buffer in state["buffers"].items()}
        return changes

    def _read_row(self, index: int, read: ShardReader) -> list[Tensor]:
        assert self.layout is not None
        # Zeros, since what lies between tensors is not read.
        (row,) = new_slots(self.layout, 1, self.dtype, self._place)
        self._read(read, f"ring.{index}", self.layout.views(row))
        return row

    def _read(self, read: ShardReader, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Fills what this process holds of tensors that `shards` gave."""
        read({f"{prefix}.{name}": self.sharding.as_dtensor(name, tensor) for name, tensor in tensors.items()})
