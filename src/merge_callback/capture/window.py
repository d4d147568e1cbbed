"""Decides which steps belong to the window of snapshots, and when the next snapshot is due."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeAlias

from merge_callback.capture.phase import CaptureSchedule, PhaseEvent, RateUpdates, StablePhase, needs_thinning
from merge_callback.capture.ring import SnapshotRing
from merge_callback.merging.rules import Rule, required_span
from merge_callback.merging.windows import Window

# If the user sets no interval, the ring covers at least this share of the training so far.
DEFAULT_SPAN = 0.1
# When capturing begins: with a constant learning rate, at once, or at an optimizer step.
Start: TypeAlias = Literal["stable", "any"] | int


class CaptureWindow:
    """Follows the learning rates, begins and ends the window, and thins the ring when it covers too few steps.

    Args:
        every_n_train_steps: Optimizer steps between two snapshots; None starts at one and doubles.
        rules: Rules of the merges; their `Window`s determine how far back the ring must reach.
        start: ``"stable"`` captures while the learning rate is constant, ``"any"`` whatever it does, and an int from
            that optimizer step on, whatever it does.
    """

    def __init__(self, every_n_train_steps: int | None, rules: Iterable[Rule], start: Start) -> None:
        self.every_n_train_steps = every_n_train_steps
        self.start = start
        self.phase = StablePhase()
        self.schedule = CaptureSchedule(every_n_train_steps or 1)
        # Whether the ring still holds the snapshots of an earlier phase.
        self.is_outdated = False
        self._has_begun = False
        self._rules = [*rules, *([Window(span=DEFAULT_SPAN)] if every_n_train_steps is None else [])]

    def follow(self, step: int, used: Sequence[float], following: Sequence[float], updates: RateUpdates) -> PhaseEvent:
        """Records an optimizer step and returns what it means for the window.

        Unless ``start`` is ``"stable"``, learning rates are ignored: the window begins at its step and never ends.

        Args:
            step: Number of optimizer steps so far.
            used: Learning rates of that step.
            following: Learning rates of the next step.
            updates: How often the schedulers have set them.
        """
        event = self.phase.observe(used, following, updates)
        if self.start != "stable":
            return PhaseEvent.HELD if step >= self._first_step else PhaseEvent.UNSETTLED
        # A run resumed with another ``start`` may be inside a phase for which no window has begun.
        if event is PhaseEvent.HELD and not self._has_begun:
            event = PhaseEvent.BEGAN
        if event is PhaseEvent.BEGAN:
            # The old snapshots stay until the first one of the new window is taken.
            self.is_outdated = True
            self.schedule = CaptureSchedule(self.every_n_train_steps or 1)
        self._has_begun = event.is_stable
        return event

    def make_room_(self, ring: SnapshotRing, step: int) -> bool:
        """Prepares the ring for a snapshot of this step and returns whether the snapshot is still due.

        Snapshots of an earlier phase are dropped. If a full ring would cover too few steps, it is thinned and the
        interval doubles; then the snapshot may be due later.
        """
        if self.is_outdated:
            ring.clear()
            self.is_outdated = False
        elif ring.is_full and needs_thinning(ring.begins, step, self._required_span(step)):
            ring.thin()
            self.schedule.double(newest=ring.steps[-1])
            return self.schedule.take(step)
        return True

    def _required_span(self, step: int) -> float:
        return max((required_span(rule, step) for rule in self._rules), default=0.0)

    @property
    def was_thinned(self) -> bool:
        """Whether the interval between two snapshots has doubled at this learning rate."""
        return self.schedule.interval > (self.every_n_train_steps or 1)

    @property
    def is_frozen(self) -> bool:
        """Whether nothing is captured at the present learning rate."""
        return self.start == "stable" and not self.phase.is_stable

    @property
    def _first_step(self) -> int:
        return self.start if isinstance(self.start, int) else 0

    @property
    def first_due(self) -> int | None:
        """The step of the first snapshot, if nothing was captured yet; None while it is not known."""
        return max(self._first_step, self.schedule.next_step or 0) or None

    @property
    def why_empty(self) -> str:
        """The error message for a merge that is requested before anything was captured."""
        if self.start == "stable" and self.phase.num_begun == 0 and (moved := self.phase.num_unsettled_steps):
            return (
                "nothing was captured yet, so there is no merge: capturing begins once the learning rate is constant,"
                f" which it was in none of {moved} steps; if it never is, start='any' captures whatever it does, and"
                " start=STEP from a step on"
            )
        due = "with the first step" if self.first_due is None else f"at step {self.first_due}"
        begins = "once the learning rate is constant" if self.start == "stable" else due
        return f"nothing was captured yet, so there is no merge: capturing begins {begins}"

    @property
    def when(self) -> str:
        """When snapshots are taken, in words for the user. An interval that doubles is not mentioned.

        Examples:
            >>> CaptureWindow(100, [], "stable").when, CaptureWindow(None, [], 20).when
            ('every 100 steps while the learning rate is constant', 'from step 20 on')
        """
        every = f"every {self.every_n_train_steps} steps " if self.every_n_train_steps else ""
        return every + self.during

    @property
    def during(self) -> str:
        """In which part of the training snapshots are taken, in words for the user."""
        if self.start == "stable":
            return "while the learning rate is constant"
        return "whatever the learning rate does" if self.start == "any" else f"from step {self.start} on"

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that changes during training, as plain numbers."""
        return {
            "every_n_train_steps": self.every_n_train_steps,
            "phase": asdict(self.phase),
            "schedule": asdict(self.schedule),
            "is_outdated": self.is_outdated,
            "has_begun": self._has_begun,
        }

    def load_state_dict(self, state: Mapping[str, Any], steps: Sequence[int], num_saved: int) -> list[str]:
        """Restores the state that `state_dict` returned.

        Args:
            state: The saved state.
            steps: Steps of the snapshots that were restored.
            num_saved: Number of snapshots when the state was saved.

        Returns:
            A clause for the user about each change; empty if the schedule continues exactly.
        """
        self.phase = StablePhase(**state["phase"])
        self.is_outdated, self._has_begun = state["is_outdated"], state["has_begun"]
        if state["every_n_train_steps"] == self.every_n_train_steps:
            if steps or not num_saved:
                self.schedule = CaptureSchedule(**state["schedule"])
            return []
        if not steps:
            return []
        self.schedule.next_step = steps[-1] + self.schedule.interval
        now, before = (n or "one that doubles" for n in (self.every_n_train_steps, state["every_n_train_steps"]))
        return [f"the interval is now {now} instead of {before}"]
