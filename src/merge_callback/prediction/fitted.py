"""The numbers of the river that were fitted on real anneals of this project's benchmarks, and its intervals."""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Widths:
    """Half of an interval that holds nine decays in ten: both parts add up as independent errors do.

    Args:
        fall: The part that grows with what the river falls until the end of the decay, in that fall.
        noise: The part that is there for every decay, in the noise of one step.
    """

    fall: float
    noise: float

    def half(self, fall: float, noise: float) -> float:
        """Returns half of the interval, in the unit of the loss."""
        return math.hypot(self.fall * fall, self.noise * noise)

    def times(self, factor: float) -> "Widths":
        """Returns intervals that are wider by a factor."""
        return Widths(self.fall * factor, self.noise * factor)


@dataclass(frozen=True)
class Fitted:
    """The numbers that were fitted on real anneals.

    Args:
        kappa: How much less noise a decay leaves, for each doubling of its lag.
        correlation_steps: Distance at which the noise of two steps is correlated by 1 / e.
        ring: Of intervals, if two merges of a ring tell the slope.
        history: The same if only the history of one merge does.
        unlike_adam: How many times wider intervals are with optimizers that are not Adam's.
    """

    kappa: float
    correlation_steps: float
    ring: Widths
    history: Widths
    unlike_adam: float


@cache
def fitted() -> Fitted:
    """Returns the numbers from ``river.json``, which ``benchmarks/forecast/fit.py`` writes."""
    found = json.loads((files("merge_callback.prediction") / "river.json").read_text())
    return Fitted(**found | {name: Widths(**found[name]) for name in ("ring", "history")})
