"""Decides when to capture: whether the learning rate is constant, and whether a snapshot is due.

Everything here is pure Python on floats and ints, without torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

# A stable phase ends when a rate differs by more than this, relatively, from its value when the phase began.
DRIFT_TOLERANCE = 1e-6
# Rates of two steps in a row count as equal within this. It is tiny, since a long cosine moves little near its top.
SAME_TOLERANCE = 1e-15
# More than this many steps in a row whose rates differ from those of the next step are a decay, however slow.
MAX_DRIFTING_STEPS = 3
# A phase that ends by drifting after fewer steps was no stable phase, but the top of a schedule such as a cosine.
MIN_PHASE_STEPS = 10
# Warmups rarely take a larger share of a run, or more steps where its length is unknown. A rate that still moves then
# is assumed never to settle.
SETTLING_SHARE = 0.2
SETTLING_STEPS = 10_000
# Fewer steps are too few to judge whether the rate settles, unless the run is over.
MIN_SETTLING_STEPS = 100


class PhaseEvent(Enum):
    """The meaning of one optimizer step for the stable phase."""

    UNSETTLED = "the rates move, and no phase goes on"
    WAITING = "the rates hold, but a scheduler has not set them again since"
    BEGAN = "the first step of a phase"
    HELD = "a further step of the phase"
    ENDED = "the first step after a phase"
    RETRACTED = "the phase is over, and was too short to have been one"

    @property
    def is_stable(self) -> bool:
        """Whether the step belongs to a stable phase."""
        return self in (PhaseEvent.BEGAN, PhaseEvent.HELD)


@dataclass(frozen=True)
class RateUpdates:
    """How often each scheduler has set the rates: when the rates of a step were read, and after the step.

    Args:
        before: Counts at the beginning of the step.
        after: Counts after the step.
        are_over: Whether some scheduler will not set its rates again in this run.
    """

    before: Sequence[int] = ()
    after: Sequence[int] = ()
    are_over: bool = False


# Without schedulers.
NO_UPDATES = RateUpdates()
Rates: TypeAlias = Sequence[float]


@dataclass
class StablePhase:
    """Follows the learning rates and detects when they are constant.

    A phase begins at an optimizer step whose rates equal those of the step before or after it. It ends when the rates
    differ by more than a relative 1e-6 from its first ones, or when they move at every step, however little. So the
    last step of a warmup belongs to the phase if it has the full rate, and so does the last step before a decay.

    A scheduler that steps once an epoch leaves the rates as they are in between, also if it is a cosine. So a phase
    begins only once every scheduler has set the rates again and they are the same.

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
    # The latest rates, the schedulers' counts when they were set, how many different rates the schedulers have set, and
    # how many steps have waited for the schedulers to set them again.
    held: list[float] | None = None
    held_updates: list[int] = field(default_factory=list)
    num_held: int = 0
    num_waiting_steps: int = 0

    @property
    def is_stable(self) -> bool:
        """Whether the last observed step belonged to a stable phase."""
        return self.anchor is not None

    def is_over_with(self, rates: Rates) -> bool:
        """Returns whether a phase that is long enough to be one ends before a step with these rates, or has ended."""
        ends = self.anchor is None or not _close(rates, self.anchor, DRIFT_TOLERANCE)
        return ends and self.num_begun > 0 and (self.anchor is None or self.num_steps >= MIN_PHASE_STEPS)

    def observe(self, used: Rates, following: Rates, updates: RateUpdates = NO_UPDATES) -> PhaseEvent:
        """Records one optimizer step and returns what it means for the phase.

        Args:
            used: Learning rates of that step, one per parameter group of every optimizer.
            following: Learning rates that the scheduler has set for the next step.
            updates: How often the schedulers have set them.
        """
        event = self._event(list(used), following, self._is_renewed(list(used), following, updates))
        self.num_steps += event.is_stable
        if event is PhaseEvent.WAITING:
            self.num_waiting_steps += 1
        else:
            self.num_unsettled_steps += not event.is_stable
        self.previous = list(used)
        return event

    def _is_renewed(self, rates: list[float], following: Rates, updates: RateUpdates) -> bool:
        """Returns whether every scheduler has set these rates again since they were first used."""
        if self.held is None or not _close(rates, self.held, SAME_TOLERANCE):
            # A module may move its rates by itself, as many do in a warmup.
            is_by_scheduler = self.held is None or list(updates.before) != self.held_updates
            self.num_held += is_by_scheduler
            self.held, self.held_updates = rates, list(updates.before)
            # Those steps did wait in vain.
            self.num_unsettled_steps += self.num_waiting_steps
            self.num_waiting_steps = 0
        if len(self.held_updates) != len(updates.after):
            # Of another set of schedulers nothing is known.
            self.held_updates = list(updates.before)
        counts = updates.after if _close(rates, following, SAME_TOLERANCE) else updates.before
        is_renewed = all(now > then for now, then in zip(counts, self.held_updates, strict=True))
        return is_renewed or (updates.are_over and self.num_held == 1)

    def _event(self, rates: list[float], following: Sequence[float], is_renewed: bool) -> PhaseEvent:
        self.num_drifting_steps = 0 if _close(rates, following, SAME_TOLERANCE) else self.num_drifting_steps + 1
        if self.anchor is not None and self.num_drifting_steps > MAX_DRIFTING_STEPS:
            self.anchor = None
            # A phase this short was only the top of a cosine.
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
        if not (agrees and is_renewed):
            if was_stable:
                return PhaseEvent.ENDED
            return PhaseEvent.WAITING if agrees else PhaseEvent.UNSETTLED
        self.anchor = rates
        self.num_begun += 1
        return PhaseEvent.BEGAN

    def never_settled(self, planned_steps: float) -> bool:
        """Returns whether no stable phase has begun, although the warmup of most runs would be over.

        Args:
            planned_steps: Length of the run in optimizer steps; infinite if unknown, zero if the run is over.
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
    """Decides at which optimizer steps a snapshot is due.

    The first snapshot is due at the first multiple of the interval, and each further one an interval later. The
    interval doubles whenever the ring is thinned.

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
        """Returns whether a snapshot is due at ``step``; if so, the next one is due an interval later."""
        if self.next_step is None:
            # Not a test for multiples: with manual optimization a batch may take several steps and skip the multiple.
            self.next_step = max(-(-step // self.interval), 1) * self.interval
        if step < self.next_step:
            return False
        self.next_step = step + self.interval
        return True

    def double(self, newest: int) -> None:
        """Doubles the interval and counts it from ``newest``, the step of the newest snapshot that was kept."""
        self.interval *= 2
        self.next_step = newest + self.interval


def needs_thinning(begins: Sequence[int], step: int, required_span: float) -> bool:
    """Returns whether a full ring without its oldest snapshot would cover less than the required span up to ``step``.

    A ring of one snapshot has nothing to thin.

    Args:
        begins: The steps that the snapshots reach back to, oldest first.
        step: The step of the next snapshot.
        required_span: How many steps the ring must cover.

    Examples:
        >>> needs_thinning([10, 20, 30, 40], step=50, required_span=25)
        False
        >>> needs_thinning([10, 20, 30, 40], step=50, required_span=35)
        True
    """
    return len(begins) > 1 and begins[1] > step - required_span
