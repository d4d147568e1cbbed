"""Rules over the recent part of the snapshots, and rules that extrapolate merges."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from merge_callback.merging.intervals import covered
from merge_callback.merging.rules import Rule, in_steps, merge_coefficients, required_span, resolve_rule
from merge_callback.utilities.checks import check_exactly_one, check_numbers


@dataclass(frozen=True)
class Window:
    """A rule that uses only the recent snapshots of the ring.

    A snapshot is used if it is less than the span older than the newest one. So a span of ``N * V`` steps holds ``N``
    snapshots ``V`` steps apart. A mean over an interval is used if the interval's middle is less than the span older
    than the newest interval's end. If the ring is full but covers less than the span, it is thinned: every second
    snapshot is dropped, or neighbouring means are averaged, and the interval doubles. A span as a share of training
    therefore works in a run of unknown length. The other merges of the same callback use the thinned ring too.

    Args:
        rule: Name of a rule, or a rule, applied to the snapshots inside the window.
        span_steps: Length of the window in optimizer steps.
        span: Length of the window as a share of the steps trained so far, in (0, 1]. Give exactly one of the two.

    Raises:
        ValueError: If neither or both spans are given, the span is out of range, or the rule is unknown.
        TypeError: If the length is not given by name.

    Examples:
        >>> Window(span_steps=200)([100, 200, 300, 400])
        [0.0, 0.0, 0.5, 0.5]
        >>> Window("wma", span=0.5)([100, 200, 300, 400])
        [0.0, 0.0, 0.3333333333333333, 0.6666666666666666]
    """

    rule: str | Rule = "sma"
    _: KW_ONLY
    span_steps: int | None = None
    span: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rule, int | float):
            raise TypeError(
                "Window takes its length by name: Window(span=0.1) is a share of training, Window(span_steps=1000) a"
                f" number of steps; got {self.rule!r}"
            )
        resolve_rule(self.rule)
        check_exactly_one("Window", span_steps=self.span_steps, span=self.span)
        check_numbers(span_steps=self.span_steps, span=self.span)
        if self.span_steps is not None and self.span_steps < 1:
            raise ValueError(f"span_steps must be >= 1, got {self.span_steps}")
        if self.span is not None and not 0 < self.span <= 1:
            raise ValueError(f"span must be a share of training in (0, 1], got {self.span}")

    def required_span(self, step: int) -> float:
        """Returns how many steps before ``step`` the ring must cover for this window."""
        return in_steps(self.span_steps, self.span, step)

    def __call__(self, steps: Sequence[int]) -> Sequence[float]:
        begin = steps[-1] - self.required_span(steps[-1])
        num_outside = min(sum(middle <= begin for middle in covered(steps).middles), len(steps) - 1)
        return [0.0] * num_outside + merge_coefficients(self.rule, steps[num_outside:])


@dataclass(frozen=True)
class Extrapolate:
    """A rule that extrapolates from an older merge through the newest one: ``m_t + amount (m_t - m_(t-gap))``.

    Successive merges lie nearly on a line (Extra-Merge, arXiv 2605.26484). Nothing uses this rule by default: in
    ``benchmarks/annealing/REPORT.md`` it gained little, and mostly lost. The older merge applies the same rule to the
    snapshots that are at least one gap older than the newest. While there are none, the result is the rule itself.

    Args:
        rule: Name of a rule, or a rule. With a `Window`, both merges have the same width.
        amount: How far to extrapolate, as a share of the way from the older merge to the newest.
        gap: Age of the older merge, as a share of the steps trained so far, in (0, 1).
        gap_steps: Age of the older merge in optimizer steps. Give exactly one of the two.

    Raises:
        ValueError: If neither or both gaps are given, the gap is out of range, or the rule is unknown.

    Examples:
        >>> Extrapolate(Window(span_steps=200), amount=0.5, gap_steps=200)([100, 200, 300, 400])
        [-0.25, -0.25, 0.75, 0.75]
    """

    rule: str | Rule = "sma"
    _: KW_ONLY
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
        """Returns how many steps before ``step`` the ring must cover for both merges."""
        gap_steps = in_steps(self.gap_steps, self.gap, step)
        return gap_steps + required_span(self.rule, round(step - gap_steps))

    def __call__(self, steps: Sequence[int]) -> Sequence[float]:
        newest = merge_coefficients(self.rule, steps)
        num_older = sum(step <= steps[-1] - in_steps(self.gap_steps, self.gap, steps[-1]) for step in steps)
        if not num_older:
            return newest
        before = [*merge_coefficients(self.rule, steps[:num_older]), *[0.0] * (len(steps) - num_older)]
        return [c + self.amount * (c - earlier) for c, earlier in zip(newest, before, strict=True)]
