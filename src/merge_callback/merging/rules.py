"""Merge rules: functions from the steps of the snapshots to one coefficient per snapshot.

A merge is ``sum_j c_j x_j`` over the snapshots ``x_1 .. x_N``, oldest first, with coefficients that sum to one. At a
constant learning rate every snapshot is the first one minus the updates made since, so the merge equals a run whose
updates between snapshot ``i - 1`` and snapshot ``i`` were multiplied by ``w_i = c_i + c_(i+1) + ... + c_N``
(arXiv 2507.17634). In this sense merging *is* a learning-rate decay that needs no training.

**How a window maps to a decay.** ``N`` snapshots, ``V`` steps apart, have ``N - 1`` gaps of ``V`` steps between them.
They stand for a decay over ``N * V`` steps: each snapshot covers the ``V`` steps around it, half before and half after.
The updates in the ``i``-th gap get the shape's value at the middle of that gap, which is ``i / N`` of the decay. So the
uniform average of ten snapshots 100 steps apart is a linear decay over 1,000 steps, in nine stairs from 0.9 to 0.1.

There are three families of rules. The paper's rules (``sma``, ``wma``, ``ema``; arXiv 2505.12082) weight each snapshot
by its rank and ignore the spacing. The decay-equivalent rules (``linear``, ``1-sqrt``, ``cosine``) weight a snapshot by
the steps that it covers, so they keep their meaning when the spacing is uneven. ``qam`` finds the *place* that a
decayed run reaches on a quadratic loss, and weights the snapshots around it.

**Means instead of points.** A snapshot can also be the mean of the weights over an interval (``snapshot="mean"``). Then
the steps are `Intervals`, and every step inside has the same share ``c_j / L_j`` of its snapshot's coefficient, with
``L_j`` the interval's length. So the implied multiplier falls in a straight line from ``w_j`` to ``w_(j+1)`` across the
``j``-th interval, instead of in stairs between snapshots:

- ``sma`` weights an interval by its length. It is the uniform mean over all steps, and exactly a linear decay.
- ``wma`` weights it by its length times the steps from the window's beginning to its end: with equal lengths by rank.
- ``ema`` lets the older part decay by the length. ``alpha`` is the weight of an interval of the longest length.
- ``linear``, ``1-sqrt`` and ``cosine`` have the shape's value at the intervals' borders, ``c_j`` is what it loses
  across the ``j``-th interval, and in between the decay is straight.
- ``qam`` takes the shape's value at the borders between intervals, and weights the means as if they were points.
- `Window` uses the intervals whose middle lies inside its span.
- A function of the user gets the ends of the intervals, and weights the means as they are.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from merge_callback.merging.decays import DECAY_SHAPES, coefficients_from_decay
from merge_callback.merging.intervals import covered


class Rule(Protocol):
    """A function that returns one coefficient for each snapshot step. Steps are ordered from oldest to newest.

    For snapshots that are means, the steps are `Intervals`.
    """

    def __call__(self, steps: Sequence[int], /) -> Sequence[float]: ...


def sma(steps: Sequence[int]) -> list[float]:
    """Simple moving average: the same weight for every snapshot (arXiv 2505.12082, the paper's default).

    Examples:
        >>> sma([100, 200, 300, 400])
        [0.25, 0.25, 0.25, 0.25]
    """
    counts = covered(steps).counts
    total = sum(counts)
    return [count / total for count in counts]


def wma(steps: Sequence[int]) -> list[float]:
    """Weighted moving average: weights proportional to 1, 2, ... N, newest heaviest (arXiv 2505.12082).

    Examples:
        >>> wma([100, 200, 300])
        [0.16666666666666666, 0.3333333333333333, 0.5]
    """
    counts = covered(steps).counts
    weights = [count * rank for count, rank in zip(counts, accumulate(counts), strict=True)]
    total = sum(weights)
    return [weight / total for weight in weights]


def ema(alpha: float = 0.2) -> Rule:
    """Returns a rule that averages snapshots exponentially: ``m_i = alpha x_i + (1 - alpha) m_(i-1)``, ``m_1 = x_1``.

    This is the average over *snapshots* of arXiv 2505.12082 (alpha 0.1 or 0.2), not an average over every step. The
    recursion starts with the oldest snapshot, whose coefficient is therefore ``(1 - alpha)^(N-1)``. The sum is one.

    Args:
        alpha: Weight of the newest snapshot, in (0, 1].

    Raises:
        ValueError: If ``alpha`` lies outside (0, 1].

    Examples:
        >>> ema(0.5)([10, 20, 30])
        [0.25, 0.25, 0.5]
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must lie in (0, 1], got {alpha}")
    return _EmaRule(alpha)


# Objects rather than functions inside functions, so that they can be compared and pickled.
@dataclass(frozen=True)
class _EmaRule:
    alpha: float

    def __call__(self, steps: Sequence[int], /) -> list[float]:
        counts = covered(steps).counts
        kept = [(1 - self.alpha) ** (count / max(counts)) for count in counts]
        coefficients = [1.0]
        for each in kept[1:]:
            coefficients = [*(each * coefficient for coefficient in coefficients), 1 - each]
        return coefficients

    def __repr__(self) -> str:
        return f"ema({self.alpha})"


def decay(shape: str) -> Rule:
    """Returns a rule whose merge is equivalent to a learning-rate decay of the given shape over the window.

    The window reaches from half a gap before the oldest snapshot to half a gap after the newest. The updates between
    two snapshots are multiplied by the shape's value at the middle of their gap. With even spacing these are the
    coefficients of arXiv 2507.17634, theorem 1. Under ``1-sqrt``, which decays fastest at the start, the oldest
    snapshot has the largest coefficient.

    Args:
        shape: ``"linear"``, ``"1-sqrt"`` or ``"cosine"``.

    Raises:
        ValueError: If the shape is unknown.

    Examples:
        >>> [round(c, 3) for c in decay("linear")([100, 200, 400])]  # they stand for 100, 150 and 200 steps
        [0.222, 0.333, 0.444]
        >>> [round(c, 3) for c in decay("1-sqrt")(range(10))]
        [0.316, 0.131, 0.101, 0.085, 0.075, 0.067, 0.062, 0.058, 0.054, 0.051]
    """
    return _DecayRule(_known_shape(shape))


@dataclass(frozen=True)
class _DecayRule:
    shape: str

    def __call__(self, steps: Sequence[int], /) -> list[float]:
        return coefficients_from_decay([1.0, *_multipliers(self.shape, steps)])

    def __repr__(self) -> str:
        return f"decay({self.shape!r})"


def qam(shape: str = "linear") -> Rule:
    """Returns a rule whose merge is the place that a decayed run reaches on a quadratic loss (QAM).

    On a quadratic, a step of gradient descent at ``w`` times the rate goes the share ``w`` of the way that a whole step
    goes. So a decay of ``N - 1`` steps ends, without noise, exactly at ``sum_i q_i x_i``: ``q_i`` is the probability of
    ``i`` successes in ``N - 1`` trials that succeed with the decay's multipliers (Poisson binomial). Its mean place is
    that of the `decay` rule of the shape, and its spread far smaller. Few snapshots carry the merge, so it averages
    less noise away than `decay`. It is meant for long windows, and is exact for even spacing.

    Args:
        shape: ``"linear"``, ``"1-sqrt"`` or ``"cosine"``.

    Raises:
        ValueError: If the shape is unknown.

    Examples:
        >>> [round(c, 3) for c in qam()([100, 200, 300])]  # multipliers 2/3 and 1/3
        [0.222, 0.556, 0.222]
        >>> [round(c, 3) for c in decay("linear")([100, 200, 300])]
        [0.333, 0.333, 0.333]
    """
    return _QamRule(_known_shape(shape))


@dataclass(frozen=True)
class _QamRule:
    shape: str

    def __call__(self, steps: Sequence[int], /) -> list[float]:
        reached = [1.0]
        for multiplier in _multipliers(self.shape, steps):
            stayed, moved = ([share * each for each in reached] for share in (1 - multiplier, multiplier))
            reached = [one + other for one, other in zip([*stayed, 0.0], [0.0, *moved], strict=True)]
        return reached

    def __repr__(self) -> str:
        return f"qam({self.shape!r})"


def _known_shape(shape: str) -> str:
    if shape not in DECAY_SHAPES:
        raise ValueError(f"unknown decay shape {shape!r}; {_nearest(shape, DECAY_SHAPES)}")
    return shape


def _multipliers(shape: str, steps: Sequence[int]) -> list[float]:
    """Returns the multiplier where each snapshot's stretch but the first begins, of a decay over all of them."""
    start, *between, end = covered(steps).edges
    return [DECAY_SHAPES[shape]((edge - start) / (end - start)) for edge in between]


RULES: dict[str, Rule] = {"sma": sma, "wma": wma, "ema": ema(), "qam": qam()} | {
    shape: decay(shape) for shape in DECAY_SHAPES
}


def in_steps(num_steps: float | None, share: float | None, step: int) -> float:
    """Returns a length in steps that was given in steps or as a share of the steps so far."""
    return num_steps if num_steps is not None else (share or 0.0) * step


def required_span(rule: str | Rule, step: int) -> float:
    """Returns how many steps before ``step`` the ring must cover; zero if the rule uses whatever the ring holds."""
    method: Callable[[int], float] | None = getattr(rule, "required_span", None)
    return method(step) if method is not None else 0.0


def resolve_rule(rule: str | Rule) -> Rule:
    """Returns the rule with that name, or the rule itself if it is one.

    Raises:
        ValueError: If the name is unknown. The message suggests the nearest one.
        TypeError: If the argument is neither a name nor callable.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"unknown merge rule {rule!r}; {_nearest(rule, RULES)}")
        return RULES[rule]
    if not callable(rule):
        raise TypeError(f"a merge rule is a name or a function of the snapshots' steps, got {rule!r}")
    return rule


def rule_label(rule: str | Rule) -> str:
    """Returns the name of a rule, also if it is given as a function.

    Examples:
        >>> rule_label(sma), rule_label("1-sqrt"), rule_label(decay("1-sqrt")), rule_label(ema(0.5))
        ('sma', '1-sqrt', '1-sqrt', 'ema(0.5)')
    """
    if isinstance(rule, str):
        return rule
    names = [name for name, known in RULES.items() if known == rule]
    return names[0] if names else getattr(rule, "__name__", repr(rule))


def merge_coefficients(rule: str | Rule, steps: Sequence[int]) -> list[float]:
    """Returns the coefficients of a merge, checked and summing to one.

    Args:
        rule: Name of a rule, or a rule. The weights that a function returns are divided by their sum.
        steps: Optimizer steps of the snapshots, ascending. At least one.

    Returns:
        One coefficient per step, oldest first. They may be zero or negative.

    Raises:
        ValueError: If the rule raises, or returns the wrong number of weights, a NaN or infinity, or weights that sum
            to zero. The message names the rule and the steps.

    Examples:
        >>> merge_coefficients(lambda steps: steps, [100, 300])
        [0.25, 0.75]
    """
    label = rule_label(rule)
    try:
        weights = [float(weight) for weight in resolve_rule(rule)(steps)]
    except Exception as error:
        raise ValueError(f"merge rule {label} failed for steps {list(steps)}: {error!r}") from error
    if len(weights) != len(steps):
        raise ValueError(f"merge rule {label} gave {len(weights)} weights for {len(steps)} snapshots")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"merge rule {label} gave a weight that is not finite for steps {list(steps)}: {weights}")
    total = math.fsum(weights)
    if abs(total) <= 1e-12 * max(map(abs, weights)):
        raise ValueError(f"merge rule {label} gave weights that sum to zero for steps {list(steps)}: {weights}")
    # Dividing by a sum that is one up to rounding would only change the last bits.
    return weights if abs(total - 1) < 1e-12 else [weight / total for weight in weights]


def _nearest(name: str, names: Mapping[str, object]) -> str:
    matches = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    return (f"did you mean {matches[0]!r}? " if matches else "") + f"Known: {', '.join(names)}"
