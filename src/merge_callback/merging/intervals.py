"""What the snapshots of a merge stand for: points, or means over intervals of steps.

A rule gets the snapshots' steps. Of *points*, the weights after single steps, that is all there is to know. If a
snapshot is the *mean* of the weights over an interval, the steps are `Intervals`: a sequence of the intervals' ends
that also knows where each interval begins. Rules that are written for points work with both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, overload


class Covered(Protocol):
    """The stretch of training that each of several snapshots stands for, oldest first."""

    @property
    def counts(self) -> Sequence[float]:
        """How much each snapshot counts in rules that weight snapshots by their rank."""

    @property
    def middles(self) -> Sequence[float]:
        """The middle step of each snapshot."""

    @property
    def edges(self) -> Sequence[float]:
        """Where the snapshots' stretches begin, and where the last one ends: one number more than snapshots."""

    @property
    def span_steps(self) -> int:
        """Steps from the first to the last step of a snapshot."""

    @property
    def intervals(self) -> list[list[int]]:
        """First and last step of each snapshot that is a mean; empty if they are points."""


@dataclass(frozen=True)
class Intervals(Sequence[int]):
    """Steps of snapshots that are means: the ends of their intervals, oldest first.

    Args:
        begins: The steps after which the intervals begin: the first steps inside are one later.
        ends: The last steps inside the intervals.

    Examples:
        >>> steps = Intervals((0, 100, 200), (100, 200, 300))
        >>> list(steps), steps[-2:]
        ([100, 200, 300], Intervals(begins=(100, 200), ends=(200, 300)))
    """

    begins: tuple[int, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> "Intervals": ...
    def __getitem__(self, place: int | slice) -> "int | Intervals":
        return Intervals(self.begins[place], self.ends[place]) if isinstance(place, slice) else self.ends[place]

    @property
    def counts(self) -> list[float]:
        """Lengths in steps: an interval that is twice as long counts as two snapshots."""
        return [float(end - begin) for begin, end in zip(self.begins, self.ends, strict=True)]

    @property
    def middles(self) -> list[float]:
        """The middle step of each interval."""
        return [(begin + end) / 2 for begin, end in zip(self.begins, self.ends, strict=True)]

    @property
    def edges(self) -> list[float]:
        """The beginnings and the last end. If steps between two intervals are missing, each gets half of them."""
        between = [(end + begin) / 2 for end, begin in zip(self.ends, self.begins[1:], strict=False)]
        return [float(self.begins[0]), *between, float(self.ends[-1])]

    @property
    def span_steps(self) -> int:
        """Steps from the beginning of the first interval to the end of the last one."""
        return self.ends[-1] - self.begins[0]

    @property
    def intervals(self) -> list[list[int]]:
        """First and last step of each interval."""
        return [[begin + 1, end] for begin, end in zip(self.begins, self.ends, strict=True)]


@dataclass(frozen=True)
class _Points:
    """Steps of snapshots that are points: each counts once and stands for the steps that are nearest to it."""

    steps: Sequence[int]

    @property
    def counts(self) -> list[float]:
        return [1.0] * len(self.steps)

    @property
    def middles(self) -> Sequence[float]:
        return self.steps

    @property
    def edges(self) -> list[float]:
        """The middles of the gaps. The first and the last snapshot cover half a gap outwards, too."""
        between = [(older + newer) / 2 for older, newer in pairwise(self.steps)]
        first, last = self.steps[0], self.steps[-1]
        if not between:
            return [first - 0.5, first + 0.5]
        return [first - (between[0] - first), *between, last + (last - between[-1])]

    @property
    def span_steps(self) -> int:
        return self.steps[-1] - self.steps[0]

    @property
    def intervals(self) -> list[list[int]]:
        return []


def covered(steps: Sequence[int]) -> Covered:
    """Returns what the snapshots of these steps stand for: means if the steps are `Intervals`, otherwise points."""
    return steps if isinstance(steps, Intervals) else _Points(steps)
