"""Which steps belong to the window of snapshots, and when the next one is due."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from merge_callback.capture.phase import CaptureSchedule, PhaseEvent, StablePhase, needs_thinning
from merge_callback.capture.ring import SnapshotRing
from merge_callback.merging.rules import Rule, required_span
from merge_callback.merging.windows import Window

# Without an interval of its own the ring covers at least this share of the training so far.
DEFAULT_SPAN = 0.1


class CaptureWindow:
    """Follows the learning rates, begins and ends the window, and thins the ring when it covers too little.

    Args:
        every_n_train_steps: Optimizer steps between two snapshots; None starts at one and doubles.
        rules: The rules of the merges; their `Window`s say how far back the ring has to reach.
        start: ``"stable"``, or the optimizer step from which on to capture.
    """

    def __init__(self, every_n_train_steps: int | None, rules: Iterable[Rule], start: Literal["stable"] | int) -> None:
        self.every_n_train_steps = every_n_train_steps
        self.start = start
        self.phase = StablePhase()
        self.schedule = CaptureSchedule(every_n_train_steps or 1)
        # Whether the ring's snapshots are of an earlier phase than the one that goes on.
        self.is_outdated = False
        self._has_begun = False
        self._rules = [*rules, *([Window(span=DEFAULT_SPAN)] if every_n_train_steps is None else [])]

    def follow(self, step: int, used: Sequence[float], following: Sequence[float]) -> PhaseEvent:
        """Takes note of an optimizer step; returns what it means for the window.

        With a start by step, rates play no part: the window begins there and holds to the end.

        Args:
            step: Number of optimizer steps so far.
            used: Learning rates of that step.
            following: Learning rates of the next step.
        """
        event = self.phase.observe(used, following)
        if self.start != "stable":
            return PhaseEvent.HELD if step >= self.start else PhaseEvent.UNSETTLED
        # A run that was resumed with another start may be inside a phase that no window was begun for.
        if event is PhaseEvent.HELD and not self._has_begun:
            event = PhaseEvent.BEGAN
        if event is PhaseEvent.BEGAN:
            # The old snapshots stay until the new window has its first one.
            self.is_outdated = True
            self.schedule = CaptureSchedule(self.every_n_train_steps or 1)
        self._has_begun = event.is_stable
        return event

    def make_room_(self, ring: SnapshotRing, step: int) -> bool:
        """Prepares the ring for a snapshot of this step; returns whether it is still due afterwards.

        Snapshots of an earlier phase are dropped. A full ring that would cover too little is thinned, and the interval
        doubles.
        """
        if self.is_outdated:
            ring.clear()
            self.is_outdated = False
        elif ring.is_full and needs_thinning(ring.steps, step, self._required_span(step)):
            ring.thin()
            self.schedule.double(newest=ring.steps[-1])
            return self.schedule.take(step)
        return True

    def _required_span(self, step: int) -> float:
        return max((required_span(rule, step) for rule in self._rules), default=0.0)

    @property
    def interval(self) -> str:
        """The interval between snapshots, in words.

        Examples:
            >>> CaptureWindow(100, [], "stable").interval, CaptureWindow(None, [], "stable").interval
            ('every 100 steps', 'at an interval that doubles')
        """
        return f"every {self.every_n_train_steps} steps" if self.every_n_train_steps else "at an interval that doubles"

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes during training, as plain numbers."""
        return {
            "every_n_train_steps": self.every_n_train_steps,
            "phase": asdict(self.phase),
            "schedule": asdict(self.schedule),
            "is_outdated": self.is_outdated,
            "has_begun": self._has_begun,
        }

    def load_state_dict(self, state: Mapping[str, Any], steps: Sequence[int], num_saved: int) -> list[str]:
        """Takes over what `state_dict` gave.

        Args:
            state: The saved state.
            steps: Steps of the snapshots that were taken over.
            num_saved: How many snapshots there were when the state was saved.

        Returns:
            What changed, in words; empty if the schedule goes on exactly.
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
