"""Rules over a recent part of the snapshots, and extrapolation of merges."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from merge_callback.merging.rules import Rule, in_steps, merge_coefficients, required_span, resolve_rule
from merge_callback.utilities.checks import check_exactly_one, check_numbers


@dataclass(frozen=True)
class Window:
    """A rule over only the recent part of the buffer.

    A snapshot counts when it lies less than the span behind the newest one, so a span of ``N * V`` steps holds ``N``
    snapshots ``V`` steps apart. When the ring is full and covers less than the span, it is thinned (every second
    snapshot is dropped, the interval doubles), so a share of training keeps its meaning in a run of unknown length. The
    other merges of the same callback then use the thinned ring too.

    Args:
        rule: Name of a rule, or a rule, applied to the snapshots inside the window.
        span_steps: Length of the window in optimizer steps.
        span: Length of the window as a share of the steps trained so far, in (0, 1]. Give exactly one of the two.

    Raises:
        ValueError: If neither or both spans are given, or one is out of its range, or the rule is unknown.

    Examples:
        >>> Window(span_steps=200)([100, 200, 300, 400])
        [0.0, 0.0, 0.5, 0.5]
        >>> Window("wma", span=0.5)([100, 200, 300, 400])
        [0.0, 0.0, 0.3333333333333333, 0.6666666666666666]
    """

    rule: str | Rule = "sma"
    span_steps: int | None = None
    span: float | None = None

    def __post_init__(self) -> None:
        resolve_rule(self.rule)
        check_exactly_one("Window", span_steps=self.span_steps, span=self.span)
        check_numbers(span_steps=self.span_steps, span=self.span)
        if self.span_steps is not None and self.span_steps < 1:
            raise ValueError(f"span_steps must be >= 1, got {self.span_steps}")
        if self.span is not None and not 0 < self.span <= 1:
            raise ValueError(f"span must be a share of training in (0, 1], got {self.span}")

    def required_span(self, step: int) -> float:
        """Steps behind ``step`` that the buffer has to cover for this window."""
        return in_steps(self.span_steps, self.span, step)

    def __call__(self, steps: Sequence[int]) -> Sequence[float]:
        inside = [step for step in steps if step > steps[-1] - self.required_span(steps[-1])] or [steps[-1]]
        return [0.0] * (len(steps) - len(inside)) + merge_coefficients(self.rule, inside)


@dataclass(frozen=True)
class Extrapolate:
    """A step further along the line from an older merge to the newest: ``m_t + amount (m_t - m_(t-gap))``.

    Successive merges lie nearly on a line (Extra-Merge, arXiv 2605.26484). Nothing uses it by default: what it gained,
    which was little and mostly less than nothing, is in ``benchmarks/annealing/REPORT.md``. The older merge is
    the same rule over those snapshots that were there a gap before the newest; as long as there are none, this is the
    rule itself.

    Args:
        rule: Name of a rule, or a rule; with a `Window` both merges are as wide.
        amount: How far to go, as a share of the way from the older merge to the newest.
        gap: How far the older merge lies back, as a share of the steps trained so far, in (0, 1).
        gap_steps: The same in optimizer steps. Give exactly one of the two.

    Raises:
        ValueError: If neither or both gaps are given, one is out of its range, or the rule is unknown.

    Examples:
        >>> Extrapolate(Window(span_steps=200), amount=0.5, gap_steps=200)([100, 200, 300, 400])
        [-0.25, -0.25, 0.75, 0.75]
    """

    rule: str | Rule = "sma"
    amount: float = 0.25
    gap: float | None = None
    gap_steps: int | None = None

    def __post_init__(self) -> None:
        resolve_rule(self.rule)
        check_exactly_one("Extrapolate", gap=self.gap, gap_steps=self.gap_steps)
        if self.gap_steps is not None and self.gap_steps < 1:
            raise ValueError(f"gap_steps must be >= 1, got {self.gap_steps}")
        if self.gap is not None and not 0 < self.gap < 1:
            raise ValueError(f"gap must be a share of training in (0, 1), got {self.gap}")
        if not math.isfinite(self.amount):
            raise ValueError(f"amount must be finite, got {self.amount}")

    def required_span(self, step: int) -> float:
        """Steps behind ``step`` that the buffer has to cover for both merges."""
        gap_steps = in_steps(self.gap_steps, self.gap, step)
        return gap_steps + required_span(self.rule, round(step - gap_steps))

    def __call__(self, steps: Sequence[int]) -> Sequence[float]:
        newest = merge_coefficients(self.rule, steps)
        older = [step for step in steps if step <= steps[-1] - in_steps(self.gap_steps, self.gap, steps[-1])]
        if not older:
            return newest
        before = [*merge_coefficients(self.rule, older), *[0.0] * (len(steps) - len(older))]
        return [c + self.amount * (c - earlier) for c, earlier in zip(newest, before, strict=True)]
