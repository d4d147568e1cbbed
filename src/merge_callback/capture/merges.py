"""The two kinds of merges: a weighted sum of the snapshots in the ring, and an average over every step."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from merge_callback.capture.capture import SnapshotCapture
from merge_callback.checkpoints.write import provenance
from merge_callback.live.sharding import rank
from merge_callback.merging.averages import Average
from merge_callback.merging.intervals import covered
from merge_callback.merging.rules import Rule, merge_coefficients, rule_label
from merge_callback.prediction.fitted import fitted
from merge_callback.prediction.river import Composition, composition


class Merge(Protocol):
    """Interface of a merge: a linear combination of the weights that a run has captured."""

    name: str
    label: str

    @property
    def is_ready(self) -> bool:
        """Whether enough was captured to make the merge."""

    def coefficients(self) -> dict[int, float]:
        """Returns the coefficients by snapshot step, oldest first; they sum to one.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If the merge is not made of snapshots, or its rule returns invalid coefficients.
        """

    def ring_coefficients(self) -> dict[int, float]:
        """Returns the coefficients to give to the ring, by snapshot step; empty if the merge uses no snapshots.

        Raises:
            ValueError: If the rule returns invalid coefficients.
        """

    def row(self, from_ring: Iterator[list[Tensor]] | None = None) -> list[Tensor]:
        """Returns the merge as a row of the capture's layout.

        Args:
            from_ring: Yields the rows that the ring makes for all merges with `ring_coefficients`, in their order. This
                merge takes the next row, if it has any. None makes this merge alone.

        Raises:
            ValueError: If the merge is made alone and is an average that holds NaN or inf.
        """

    def span_steps(self) -> float:
        """Returns how many optimizer steps the merge reaches back from the newest weights in it."""

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """Floating-point buffers that belong to the merge, by name."""

    def diagnostics(self, row: Sequence[Tensor]) -> dict[str, float]:
        """Returns numbers about the merge to log. All ranks must call it together."""

    def describe(self) -> str:
        """Returns what the merge is made of, in a few words."""

    def composition(self, step: int) -> Composition | None:
        """Returns what matters of the coefficients for a forecast at ``step``; None if there are no coefficients."""

    @property
    def intervals(self) -> list[list[int]]:
        """First and last step of each snapshot in the ring; empty if the merge is not made of means."""

    def provenance(self) -> dict[str, Any]:
        """Returns where the merge comes from, for the files that hold it."""


class WindowMerge:
    """A weighted sum of the snapshots in the ring, with the coefficients of a rule.

    Args:
        name: Name of the merge.
        rule: Turns the snapshots' steps into coefficients.
        capture: Holds the ring of snapshots.
    """

    def __init__(self, name: str, rule: Rule, capture: SnapshotCapture) -> None:
        self.name = name
        self.label = rule_label(rule)
        self._rule = rule
        self._capture = capture
        # Coefficients of the present snapshots: the rule is called only when the snapshots change.
        self._covered: Sequence[int] = []
        self._known: dict[int, float] = {}

    @property
    def is_ready(self) -> bool:
        return bool(self._capture.steps)

    def coefficients(self) -> dict[int, float]:
        if not (steps := self._capture.covered):
            raise RuntimeError(self._capture.window.why_empty)
        if steps != self._covered:
            self._known = dict(zip(steps, merge_coefficients(self._rule, steps), strict=True))
            self._covered = steps
        return dict(self._known)

    def ring_coefficients(self) -> dict[int, float]:
        return self.coefficients()

    def row(self, from_ring: Iterator[list[Tensor]] | None = None) -> list[Tensor]:
        if from_ring is not None:
            return next(from_ring)
        assert self._capture.ring is not None
        return self._capture.ring.combine(list(self.coefficients().values()))

    def span_steps(self) -> float:
        places = [place for place, value in enumerate(self.coefficients().values()) if value != 0]
        return float(covered(self._covered[places[0] : places[-1] + 1]).span_steps)

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return self._capture.buffers

    def diagnostics(self, row: Sequence[Tensor]) -> dict[str, float]:
        spread = self._capture.spread(list(self.coefficients().values()), row)
        num_snapshots = float(self._num_used)
        return {"num_snapshots": num_snapshots, "span_steps": self.span_steps(), "spread": spread}

    def describe(self) -> str:
        what, num = self._capture.kind.noun, self._num_used
        return f"{num} {what}{'s' if num > 1 else ''}, {self.span_steps():.0f} steps"

    def composition(self, step: int) -> Composition | None:
        num_samples, correlation = self._capture.kind.num_samples, fitted().correlation_steps
        return composition(self._capture.covered, list(self.coefficients().values()), step, num_samples, correlation)

    @property
    def intervals(self) -> list[list[int]]:
        return covered(self._capture.covered).intervals

    def provenance(self) -> dict[str, Any]:
        return provenance(self.label, self.coefficients(), intervals=self.intervals)

    @property
    def _num_used(self) -> int:
        return sum(value != 0 for value in self.coefficients().values())


class AverageMerge:
    """An average over every optimizer step, which needs no snapshots.

    Args:
        name: Name of the merge and of its average.
        average: Profile of the average.
        capture: Holds the average.
    """

    def __init__(self, name: str, average: Average, capture: SnapshotCapture) -> None:
        self.name = name
        self.label = repr(average)
        self._average = average
        self._capture = capture

    @property
    def is_ready(self) -> bool:
        return self._capture.averages[self.name].step is not None

    def coefficients(self) -> dict[int, float]:
        raise ValueError(f"the merge {self.name!r} is an average over every step, not over snapshots")

    def ring_coefficients(self) -> dict[int, float]:
        return {}

    def row(self, from_ring: Iterator[list[Tensor]] | None = None) -> list[Tensor]:
        if from_ring is None:
            # For merges that are made together, `MergeSet.drop_nonfinite` has checked the averages before.
            self._check_finite()
        return self._capture.averages.row(self.name)

    def span_steps(self) -> float:
        # As of its last update: while the learning rate moves, there is none.
        return self._average.span_steps(self._capture.averages[self.name].step or 0)

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return self._capture.averages.buffers

    def diagnostics(self, row: Sequence[Tensor]) -> dict[str, float]:
        return {"span_steps": self.span_steps()}

    def describe(self) -> str:
        return f"every step, about {self.span_steps():.0f}"

    def composition(self, step: int) -> Composition | None:
        return None

    @property
    def intervals(self) -> list[list[int]]:
        return []

    def provenance(self) -> dict[str, Any]:
        return provenance(self.label, step=self._capture.averages[self.name].step)

    def _check_finite(self) -> None:
        bad = {} if self._capture.averages[self.name].is_finite else {rank(): None}
        if self._capture.sharding.gather(bad):
            raise ValueError(f"the average over every step, {self.label}, holds NaN or inf")
