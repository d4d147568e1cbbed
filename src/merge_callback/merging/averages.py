"""Averages over every optimizer step: `Ema` with a half-life, `PowerEma` with a power function (arXiv 2312.02696)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from typing_extensions import TypeIs

from merge_callback.merging.rules import in_steps
from merge_callback.utilities.checks import check_exactly_one, check_numbers


class Average(Protocol):
    """An average of the weights that is updated at every optimizer step, kept as one extra copy (the shadow)."""

    def beta(self, step: int, gap: int) -> float:
        """Share of the old average that an update keeps, over the ``gap`` optimizer steps that end at ``step``."""

    def span_steps(self, step: int) -> float:
        """Length in steps of the linear decay that has the same mean age."""


@dataclass(frozen=True, kw_only=True)
class Ema:
    """An exponential average of the weights with a given half-life, updated at every optimizer step.

    The rule ``"ema"`` averages snapshots instead. This average needs one more copy of the weights and no snapshots.

    Args:
        half_life_steps: Optimizer steps after which the weights of a step count half as much; at least 1.
        half_life: The half-life as a share of the steps trained so far, in (0, 1]. Give exactly one of the two.

    Raises:
        ValueError: If neither or both are given, or the value is out of range.
        TypeError: If the half-life is not given by name.

    Examples:
        >>> Ema(half_life_steps=100).beta(step=1000, gap=100)
        0.5
        >>> Ema(half_life=0.1).beta(step=1000, gap=100)
        0.5
    """

    half_life_steps: float | None = None
    half_life: float | None = None

    def __post_init__(self) -> None:
        check_exactly_one("Ema", half_life_steps=self.half_life_steps, half_life=self.half_life)
        check_numbers(half_life_steps=self.half_life_steps, half_life=self.half_life)
        if self.half_life_steps is not None and not 1 <= self.half_life_steps < math.inf:
            raise ValueError(
                f"half_life_steps must be at least 1 step and finite, got {self.half_life_steps}; half_life= is a share"
                " of training"
            )
        if self.half_life is not None and not 0 < self.half_life <= 1:
            raise ValueError(f"half_life must be a share of training in (0, 1], got {self.half_life}")

    def beta(self, step: int, gap: int) -> float:
        """Share of the old average that an update keeps, over the ``gap`` optimizer steps that end at ``step``."""
        return 0.5 ** (gap / in_steps(self.half_life_steps, self.half_life, step))

    def span_steps(self, step: int) -> float:
        """Length in steps of the linear decay that has the same mean age: twice the mean age."""
        if self.half_life is not None:
            # beta is (1 - gap / step) ** (ln 2 / half_life) to first order, a power function.
            return 2 * step / (math.log(2) / self.half_life + 1)
        return 2 * in_steps(self.half_life_steps, self.half_life, step) / math.log(2)


@dataclass(frozen=True)
class PowerEma:
    """The power-function average of EDM2 (arXiv 2312.02696), updated at every optimizer step.

    Args:
        sigma_rel: Width of the profile (its standard deviation) as a share of training, in (0, 0.28).

    Raises:
        ValueError: If the width is out of range.

    Examples:
        >>> round(PowerEma(sigma_rel=0.05).gamma, 2), round(PowerEma(sigma_rel=0.10).gamma, 2)
        (16.97, 6.94)
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        check_numbers(sigma_rel=self.sigma_rel)
        # At gamma = 0 the profile is flat and its width is sqrt(1/12).
        if not 0 < self.sigma_rel < math.sqrt(1 / 12):
            raise ValueError(f"sigma_rel must lie in (0, {math.sqrt(1 / 12):.4f}), got {self.sigma_rel}")

    @cached_property
    def gamma(self) -> float:
        """Exponent of the profile: the largest real root of the equation for its width (EDM2, algorithm 2)."""
        inverse = self.sigma_rel**-2
        return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())

    def beta(self, step: int, gap: int) -> float:
        """Share of the old average that an update keeps, over the ``gap`` optimizer steps that end at ``step``."""
        return (1 - gap / step) ** (self.gamma + 1)

    def span_steps(self, step: int) -> float:
        """Length in steps of the linear decay that has the same mean age: twice the mean age."""
        return 2 * step / (self.gamma + 2)


def synthesis_coefficients(stored: Sequence[tuple[int, PowerEma]], step: int, average: PowerEma) -> list[float]:
    """Returns coefficients that combine stored power-function averages into one of another width.

    They are a least-squares fit of the stored profiles to the wanted profile (EDM2, arXiv 2312.02696).

    Args:
        stored: Step and profile of each stored average. All averages began at step zero.
        step: The step at which the wanted average ends.
        average: Profile of the wanted average.

    Returns:
        One coefficient for each stored average, summing to one.

    Raises:
        ValueError: If nothing is stored.

    Examples:
        >>> stored = [(step, PowerEma(width)) for step in (500, 1000) for width in (0.05, 0.1)]
        >>> [abs(round(c, 6)) for c in synthesis_coefficients(stored, 1000, PowerEma(0.1))]
        [0.0, 0.0, 0.0, 1.0]
    """
    if not stored:
        raise ValueError("no stored averages to combine")
    steps = np.array([at for at, _ in stored], dtype=float)
    gammas = np.array([profile.gamma for _, profile in stored])
    grams = _profile_product(steps[:, None], gammas[:, None], steps[None, :], gammas[None, :])
    wanted = _profile_product(steps, gammas, np.array(float(step)), np.array(average.gamma))
    # Many profiles are nearly equal. Among the best fits, lstsq then returns the one with the smallest coefficients.
    coefficients = np.linalg.lstsq(grams, wanted, rcond=1e-12)[0]
    return [float(c) for c in coefficients / coefficients.sum()]


def _profile_product(t_a: Any, gamma_a: Any, t_b: Any, gamma_b: Any) -> Any:
    """Integral of the product of two profiles ``(gamma + 1) s^gamma / t^(gamma + 1)`` on ``[0, t]`` (appendix C)."""
    shorter = np.minimum(t_a, t_b)
    both = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return both * (shorter / t_a) ** gamma_a * (shorter / t_b) ** gamma_b * shorter / (t_a * t_b)


def is_average(merge: Any) -> TypeIs[Average]:
    """Returns True if the merge is an average over every step, and False if it is made of snapshots."""
    return callable(getattr(merge, "beta", None))
