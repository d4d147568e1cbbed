"""When to capture: is the learning rate constant, and is a snapshot due. Pure, on floats and ints."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

# A stable phase is over when a rate has moved by more than this from where it stood when the phase began.
DRIFT_TOLERANCE = 1e-6
# Neighbouring steps agree when their rates do to the last digits: near its top a long cosine moves by very little.
SAME_TOLERANCE = 1e-15
# This many steps in a row that do not agree with the next are a decay, however slow.
MAX_DRIFTING_STEPS = 3
# A phase that ends by drifting after fewer steps was only the top of a schedule that never settles.
MIN_PHASE_STEPS = 10
# A warmup is rarely longer than this share of a run, or this many steps; a rate that still moves then never settles.
SETTLING_SHARE = 0.2
SETTLING_STEPS = 10_000
# Too short a time to judge, unless the run is over.
MIN_SETTLING_STEPS = 100


class PhaseEvent(Enum):
    """What one optimizer step means for the stable phase."""

    UNSETTLED = "the rates move, and no phase goes on"
    BEGAN = "the first step of a phase"
    HELD = "a further step of the phase"
    ENDED = "the first step after a phase"
    RETRACTED = "the phase is over, and was too short to have been one"

    @property
    def is_stable(self) -> bool:
        """Whether the step belongs to a stable phase."""
        return self in (PhaseEvent.BEGAN, PhaseEvent.HELD)


@dataclass
class StablePhase:
    """Follows the learning rates and tells when they are constant.

    A phase begins at an optimizer step whose rates equal those of the step before or after it. It ends when they have
    moved by more than a relative 1e-6 from its first rates, or when they move at every step, however little. So the
    last step of a warmup that reached the full rate belongs to the phase, and so does the last one before a decay.

    Examples:
        >>> phase = StablePhase()
        >>> rates = [0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
        >>> [phase.observe([used], [following]).name for used, following in zip(rates, rates[1:])]
        ['UNSETTLED', 'BEGAN', 'HELD', 'HELD', 'ENDED']
    """

    anchor: list[float] | None = None
    previous: list[float] | None = None
    num_begun: int = 0
    num_steps: int = 0
    num_drifting_steps: int = 0
    num_unsettled_steps: int = 0

    @property
    def is_stable(self) -> bool:
        """Whether the last observed step belonged to a stable phase."""
        return self.anchor is not None

    def observe(self, used: Sequence[float], following: Sequence[float]) -> PhaseEvent:
        """Takes note of one optimizer step; returns what it means.

        Args:
            used: Learning rates of that step, one per parameter group of every optimizer.
            following: Learning rates as the scheduler left them for the next step.
        """
        event = self._event(list(used), following)
        self.num_steps += event.is_stable
        self.num_unsettled_steps += not event.is_stable
        self.previous = list(used)
        return event

    def _event(self, rates: list[float], following: Sequence[float]) -> PhaseEvent:
        self.num_drifting_steps = 0 if _close(rates, following, SAME_TOLERANCE) else self.num_drifting_steps + 1
        if self.anchor is not None and self.num_drifting_steps > MAX_DRIFTING_STEPS:
            self.anchor = None
            # What looked like a phase was the top of a cosine.
            if self.num_steps < MIN_PHASE_STEPS:
                self.num_begun -= 1
                return PhaseEvent.RETRACTED
            return PhaseEvent.ENDED
        if self.anchor is not None and _close(rates, self.anchor, DRIFT_TOLERANCE):
            return PhaseEvent.HELD
        was_stable, self.anchor, self.num_steps = self.is_stable, None, 0
        agrees = self.num_drifting_steps == 0 or (
            self.previous is not None and _close(rates, self.previous, SAME_TOLERANCE)
        )
        if not agrees:
            return PhaseEvent.ENDED if was_stable else PhaseEvent.UNSETTLED
        self.anchor = rates
        self.num_begun += 1
        return PhaseEvent.BEGAN

    def never_settled(self, planned_steps: float) -> bool:
        """Whether no stable phase has begun by a time when most runs' warmups are over.

        Args:
            planned_steps: Length of the run in optimizer steps, may be infinite; zero when the run is over.
        """
        patience = SETTLING_SHARE * planned_steps if math.isfinite(planned_steps) else SETTLING_STEPS
        if planned_steps > 0:
            patience = max(patience, MIN_SETTLING_STEPS)
        return self.num_begun == 0 and self.num_unsettled_steps > patience


def _close(rates: Sequence[float], others: Sequence[float], tolerance: float) -> bool:
    return len(rates) == len(others) and all(
        abs(rate - other) <= tolerance * max(abs(rate), abs(other)) for rate, other in zip(rates, others, strict=True)
    )


@dataclass
class CaptureSchedule:
    """Knows at which optimizer steps a snapshot is due.

    The first one is due at the first multiple of the interval, each further one an interval later. The interval doubles
    whenever the ring is thinned.

    Examples:
        >>> schedule = CaptureSchedule(interval=5)
        >>> [step for step in range(1, 21) if schedule.take(step)]
        [5, 10, 15, 20]
        >>> schedule.double(newest=20)
        >>> [step for step in range(21, 51) if schedule.take(step)]
        [30, 40, 50]
    """

    interval: int
    next_step: int | None = None

    def take(self, step: int) -> bool:
        """Whether a snapshot is due at ``step``; if so, the next one is due an interval later."""
        if self.next_step is None:
            # Manual optimization may take several steps a batch and jump over the multiple itself.
            self.next_step = max(-(-step // self.interval), 1) * self.interval
        if step < self.next_step:
            return False
        self.next_step = step + self.interval
        return True

    def double(self, newest: int) -> None:
        """Doubles the interval, counted from the newest snapshot that was kept."""
        self.interval *= 2
        self.next_step = newest + self.interval


def needs_thinning(steps: Sequence[int], step: int, required_span: float) -> bool:
    """Whether dropping the oldest snapshot of a full ring would leave less than the required span behind ``step``.

    A ring of one has nothing to thin.

    Examples:
        >>> needs_thinning([10, 20, 30, 40], step=50, required_span=25)
        False
        >>> needs_thinning([10, 20, 30, 40], step=50, required_span=35)
        True
    """
    return len(steps) > 1 and steps[1] > step - required_span
