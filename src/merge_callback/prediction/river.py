"""The river: what live and merged losses of a run at a constant rate say about a decay that it has not had.

At a constant rate, weights drift slowly along a valley, the *river*, and jump about between its walls, the *noise*. A
decay of the rate, an *anneal*, takes the noise away and goes on along the river with smaller steps. Near step ``now``,
in the unit of the loss::

    loss of the weights of one step t          R(t) + v
    loss of a merge with coefficients c_j      sum_j c_j R(t_j) + v sum_j c_j^2
    loss after a decay from s over D steps     R(s + D - lag) - kappa v log2(10 l D / (s + D))

``R`` is the loss of the river, ``v`` the part that the noise of one step adds. Of a merge, two numbers matter: the mean
step of its weights, and its sum of squared coefficients (`Composition`). ``R`` is taken as ``a + b g(t / now)`` with
``g(x) = 2 (1 - 1 / sqrt(x))``, a power law of steps around now, so that ``b`` is what the loss changes while the steps
grow by a factor of e. The *lag* is what the decay lacks of the steps that it takes: half of them if it is linear or a
cosine, two thirds if it is 1-sqrt. A decay takes noise away in proportion to the logarithm of its length, as on a noisy
quadratic whose eigenvalues are spread evenly over the scales; there, a cosine does as much as a linear decay of 0.8
times its length, and 1-sqrt as one of 1.25 times (``l``). A linear decay over a tenth of the steps leaves no more noise
than the river itself has. ``kappa``, the correlation of the noise and the width of the intervals are fitted on
real anneals of this project's benchmarks, by ``benchmarks/forecast/fit.py``. All functions are pure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merge_callback.merging.intervals import covered
from merge_callback.prediction.bias import Prediction
from merge_callback.prediction.fitted import Widths, fitted

# Share of the sum of the rates that a decay keeps, of that of as many steps at the full rate.
KEPT = {"linear": 1 / 2, "1-sqrt": 1 / 3, "cosine": 1 / 2}
# Of the power law of the river.
EXPONENT = 0.5
# The length of a linear decay that takes as much noise away, in its own length.
ANNEALING = {"linear": 1.0, "1-sqrt": 1.25, "cosine": 0.8}
# The share of all steps over which a linear decay leaves no more noise than the river has.
REFERENCE_SPAN = 0.1
# Window, as a share of the steps, at which the slope of a ring and that of the history are trusted alike.
SAME_TRUST = 0.111
# The slope of the history is that of the merges whose weights lie in this last share of the steps.
HISTORY_SHARE = 0.25
# Beside two merges of one ring, the live loss of a single step counts half.
LIVE_WEIGHT = 0.5
# If the noise of the history changes faster than this leaves, the slope cannot be told.
MIN_DIVISOR = 0.2
# Two merges of one ring tell a slope if their mean steps differ by this share of the window.
MIN_AGE_DIFFERENCE = 0.1


@dataclass(frozen=True)
class Composition:
    """What matters of a merge's coefficients.

    Args:
        age: Optimizer steps from the mean step of its weights to the validation.
        squares: Share of the noise of one step that is left in it: the sum of squared coefficients for points.
    """

    age: float
    squares: float


def composition(
    steps: Sequence[int], coefficients: Sequence[float], now: int, num_samples: int, correlation_steps: float
) -> Composition:
    """Returns what matters of a merge of snapshots, points or means.

    The noise of points that are some twenty steps apart is independent, so that of a merge has the share
    ``sum_j c_j^2``. A mean over an interval is itself a merge of ``n`` steps in it, whose noise is correlated: at a
    distance of ``d`` steps by ``exp(-d / correlation_steps)``. So its square counts ``sum_ik r(i, k) / n^2``.

    Args:
        steps: The snapshots' steps; `Intervals` if they are means.
        coefficients: One per snapshot; they sum to one.
        now: Optimizer step of the validation.
        num_samples: The most samples that a mean is made of.
        correlation_steps: As above.

    Examples:
        >>> composition([80, 90, 100], [0.25, 0.25, 0.5], 110, 1, 8.0)
        Composition(age=17.5, squares=0.375)
    """
    known = covered(steps)
    age = now - math.fsum(c * middle for c, middle in zip(coefficients, known.middles, strict=True))
    shares = [_noise_of_mean(last - first + 1, num_samples, correlation_steps) for first, last in known.intervals]
    shares = shares or [1.0] * len(steps)
    return Composition(age, math.fsum(c * c * share for c, share in zip(coefficients, shares, strict=True)))


def _noise_of_mean(num_steps: int, num_samples: int, correlation_steps: float) -> float:
    """Returns the noise of a mean over an interval, as a share of that of one step."""
    samples = min(num_steps, num_samples)
    gap = num_steps / samples
    pairs = math.fsum((samples - d) * math.exp(-d * gap / correlation_steps) for d in range(1, samples))
    return (samples + 2 * pairs) / samples**2


@dataclass(frozen=True)
class Seen:
    """A loss that was measured, at its place on the river.

    Args:
        at: Mean optimizer step of the weights.
        squares: Share of the noise of one step in them; one for the weights of a single step.
        loss: The loss.
    """

    at: float
    squares: float
    loss: float


@dataclass(frozen=True)
class Decay:
    """A decay of the learning rate.

    Args:
        start: Optimizer step at which it begins. A *forecast* is of a decay that begins now; *matched* values are of
            one that ends now.
        span_steps: Its length in optimizer steps.
        shape: ``"linear"``, ``"1-sqrt"`` or ``"cosine"``.
        final_rate: Share of the rate at its end.
    """

    start: int
    span_steps: int
    shape: str = "linear"
    final_rate: float = 0.0

    @property
    def end(self) -> int:
        """The optimizer step at which it ends."""
        return self.start + self.span_steps

    @property
    def span(self) -> float:
        """Its length as a share of all optimizer steps at its end."""
        return self.span_steps / self.end


@dataclass(frozen=True)
class River:
    """Level, slope and noise of a run's loss at a step.

    Args:
        now: The optimizer step.
        level: Loss of the river there.
        slope: Change of the loss while the steps grow by a factor of e, were it to go on as now; mostly negative.
        noise: What the noise of one step adds to the loss.
    """

    now: int
    level: float
    slope: float
    noise: float

    def loss(self, step: float) -> float:
        """Returns the loss of the river at another step."""
        return self.level + self.slope * _time(step / self.now)

    def live(self, step: float) -> float:
        """Returns the expected live loss at another step of a constant rate."""
        return self.loss(step) + self.noise

    def annealed(self, decay: Decay, kappa: float | None = None) -> float:
        """Returns the loss at the end of a decay.

        Args:
            decay: The decay. If it ends at the full rate, this is the live loss there.
            kappa: Another number than the fitted one.

        Examples:
            >>> River(1000, level=1.5, slope=0.0, noise=0.125).annealed(Decay(1000, 100, final_rate=1.0))
            1.625
        """
        lag = (1 - KEPT[decay.shape]) * decay.span_steps
        doublings = math.log2(ANNEALING[decay.shape] * decay.span / REFERENCE_SPAN)
        beyond = (fitted().kappa if kappa is None else kappa) * doublings
        left = decay.final_rate - (1 - decay.final_rate) * beyond
        return self.loss(decay.end - (1 - decay.final_rate) * lag) + self.noise * left

    def fall(self, decay: Decay) -> float:
        """Returns about what the river falls between now and the end of a decay, the unit of the errors."""
        return abs(self.slope) * abs(decay.end - self.now or decay.span_steps) / decay.end

    def forecast(self, decay: Decay, widths: Widths) -> Prediction:
        """Returns the loss at the end of a decay with an interval that has the widths."""
        value, half = self.annealed(decay), widths.half(self.fall(decay), self.noise)
        return Prediction(value, value - half, value + half)


def river(now: int, live: float, merges: Sequence[Seen], history: Sequence[Seen], window_steps: float) -> River | None:
    """Returns the river at a validation.

    The slope is that of the history, less what its merges lost in noise. If the validation has two merges of one ring
    with different mean steps, they, the live loss and their places give a slope of their own; the shorter the window,
    the less it counts.

    Args:
        now: Optimizer step of the validation.
        live: Live loss there.
        merges: The merges that were validated there; the first is the primary one.
        history: Primary merges of all validations so far, ascending, with the one now.
        window_steps: Steps from the first to the last snapshot of the primary merge.

    Returns:
        The river; None if history and merges tell no slope, or the merges are as noisy as a single step.

    Examples:
        >>> truth = River(1000, level=1.5, slope=-0.4, noise=0.1)
        >>> history = [Seen(at, 0.1, truth.loss(at) + 0.01) for at in (750, 800, 850, 900, 950)]
        >>> found = river(1000, truth.live(1000), history[-1:], history, window_steps=100)
        >>> [round(value, 6) for value in (found.level, found.slope, found.noise)]
        [1.5, -0.4, 0.1]
    """
    rows = np.array([[1.0, 0.0, 1.0], *([1.0, _time(each.at / now), each.squares] for each in merges)])
    losses = np.array([live, *(each.loss for each in merges)])
    used = _used(now, history)
    trust, own = 1.0 if used else 0.0, 0.0
    if are_apart(merges, window_steps):
        own = float(np.linalg.lstsq(rows, losses, rcond=None)[0][1])
        trust *= SAME_TRUST**2 / ((window_steps / now) ** 2 + SAME_TRUST**2)
    elif not used:
        return None
    if min(each.squares for each in merges) > 0.5:
        return None
    # Level and noise for a slope of zero, and what each unit of slope takes from them.
    weights = np.array([LIVE_WEIGHT, *np.ones(len(merges))])[:, None]
    sides = np.column_stack([losses, rows[:, 1]]) * weights
    (level, level_by_slope), (noise, noise_by_slope) = np.linalg.lstsq(rows[:, [0, 2]] * weights, sides, rcond=None)[0]
    # Where merges of the history hold more and more snapshots, their loss falls without the river.
    by_loss, by_noise = _slope(now, used, [each.loss for each in used]), _slope(now, used, [e.squares for e in used])
    divisor = 1 - trust * by_noise * noise_by_slope
    if divisor < MIN_DIVISOR:
        return None
    slope = (trust * (by_loss - by_noise * noise) + (1 - trust) * own) / divisor
    level, noise = level - slope * level_by_slope, noise - slope * noise_by_slope
    return River(now, float(level), float(slope), float(noise))


def are_apart(merges: Sequence[Seen], window_steps: float) -> bool:
    """Returns whether the mean steps of the merges differ enough for them to tell a slope."""
    places = [each.at for each in merges]
    return len(places) > 1 and max(places) - min(places) >= MIN_AGE_DIFFERENCE * window_steps > 0


def _used(now: int, history: Sequence[Seen]) -> list[Seen]:
    """Returns the merges that tell the slope; none if they lie at one place."""
    used = [each for each in history if each.at >= (1 - HISTORY_SHARE) * now]
    if len(used) < 2:
        used = list(history[-2:])
    return used if len({each.at for each in used}) > 1 else []


def _slope(now: int, used: Sequence[Seen], values: Sequence[float]) -> float:
    """Returns the slope of some values of these merges along the river; zero without merges."""
    if not used:
        return 0.0
    times = np.array([_time(each.at / now) for each in used])
    around = times - times.mean()
    return math.fsum(around * np.array(values)) / math.fsum(around**2)


def _time(x: float) -> float:
    """Time of the river: zero at one, negative before."""
    return (1 - x**-EXPONENT) / EXPONENT
