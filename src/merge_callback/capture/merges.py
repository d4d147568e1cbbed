"""A merge of what was captured: of the snapshots in the ring, or an average over every step."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from merge_callback.capture.capture import SnapshotCapture
from merge_callback.checkpoints.write import provenance
from merge_callback.live.sharding import rank
from merge_callback.merging.averages import Average
from merge_callback.merging.rules import Rule, merge_coefficients, rule_label


class Merge(Protocol):
    """A linear merge of what a run has captured."""

    name: str
    label: str

    @property
    def is_ready(self) -> bool:
        """Whether there is something to make it of."""

    def coefficients(self) -> dict[int, float]:
        """By snapshot step, oldest first; they sum to one.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If it is not made of snapshots, or its rule gives no proper coefficients.
        """

    def snapshots(self) -> dict[int, float]:
        """The snapshots that it is made of: coefficient by step; none for an average over every step.

        Raises:
            ValueError: If its rule gives no proper coefficients.
        """

    def row(self, from_ring: Iterator[list[Tensor]] | None = None) -> list[Tensor]:
        """The merge as a row of the capture's layout.

        Args:
            from_ring: Gives the next row that was made of snapshots, for merges that are made together. None makes a
                row of its own.

        Raises:
            ValueError: If it holds NaN or inf.
        """

    def span_steps(self, step: int) -> float:
        """Optimizer steps that it reaches back, seen from a step."""

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """Floating-point buffers that go with it, by name."""

    def diagnostics(self, row: Sequence[Tensor], step: int) -> dict[str, float]:
        """Numbers about it; for all ranks to call at the same time."""

    def describe(self, step: int) -> str:
        """What it is made of, in a few words."""

    def provenance(self) -> dict[str, Any]:
        """Where it comes from, for files that hold it."""


class WindowMerge:
    """A merge of the snapshots in the ring, by a rule.

    Args:
        name: Its name.
        rule: Turns the snapshots' steps into coefficients.
        capture: What it is made of.
    """

    def __init__(self, name: str, rule: Rule, capture: SnapshotCapture) -> None:
        self.name = name
        self.label = rule_label(rule)
        self._rule = rule
        self._capture = capture
        # A rule is asked once for the same snapshots.
        self._known: dict[int, float] = {}

    @property
    def is_ready(self) -> bool:
        return bool(self._capture.steps)

    def coefficients(self) -> dict[int, float]:
        if not (steps := self._capture.steps):
            raise RuntimeError(self._capture.why_empty)
        if steps != list(self._known):
            self._known = dict(zip(steps, merge_coefficients(self._rule, steps), strict=True))
        return dict(self._known)

    def snapshots(self) -> dict[int, float]:
        return self.coefficients()

    def row(self, from_ring: Iterator[list[Tensor]] | None = None) -> list[Tensor]:
        if from_ring is not None:
            return next(from_ring)
        assert self._capture.ring is not None
        return self._capture.ring.combine(list(self.coefficients().values()))

    def span_steps(self, step: int) -> float:
        used = self._used_steps()
        return float(used[-1] - used[0])

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return self._capture.buffers

    def diagnostics(self, row: Sequence[Tensor], step: int) -> dict[str, float]:
        spread = self._capture.spread(list(self.coefficients().values()), row)
        num_snapshots = float(len(self._used_steps()))
        return {"num_snapshots": num_snapshots, "span_steps": self.span_steps(step), "spread": spread}

    def describe(self, step: int) -> str:
        num = len(self._used_steps())
        return f"{num} snapshot{'s' if num > 1 else ''}, {self.span_steps(step):.0f} steps"

    def provenance(self) -> dict[str, Any]:
        return provenance(self.label, self.coefficients())

    def _used_steps(self) -> list[int]:
        return [step for step, value in self.coefficients().items() if value != 0]


class AverageMerge:
    """An average over every optimizer step, which needs no snapshots.

    Args:
        name: Its name.
        average: Its profile.
        capture: What keeps it.
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

    def snapshots(self) -> dict[int, float]:
        return {}

    def row(self, from_ring: Iterator[list[Tensor]] | None = None) -> list[Tensor]:
        if from_ring is None:
            # Those that are made for a validation were looked through before.
            self._check_finite()
        return self._capture.averages.row(self.name)

    def span_steps(self, step: int) -> float:
        return self._average.span_steps(step)

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return self._capture.averages.buffers

    def diagnostics(self, row: Sequence[Tensor], step: int) -> dict[str, float]:
        return {"span_steps": self.span_steps(step)}

    def describe(self, step: int) -> str:
        return f"every step, about {self.span_steps(step):.0f}"

    def provenance(self) -> dict[str, Any]:
        return provenance(self.label, step=self._capture.averages[self.name].step)

    def _check_finite(self) -> None:
        bad = {} if self._capture.averages[self.name].is_finite else {rank(): None}
        if self._capture.sharding.gather(bad):
            raise ValueError(f"the average over every step, {self.label}, holds NaN or inf")
