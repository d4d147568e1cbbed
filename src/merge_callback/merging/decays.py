"""Shapes of learning-rate decays, and which decay the coefficients of a merge stand for (arXiv 2507.17634)."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

# Multiplier of the learning rate as a function of the finished share of the decay: 1 at 0, 0 at 1.
DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1 - share,
    "1-sqrt": lambda share: 1 - math.sqrt(share),
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}


def decay_from_coefficients(coefficients: Sequence[float]) -> list[float]:
    """Returns the learning-rate multipliers that a merge stands for: ``w_i = c_i + ... + c_N`` (arXiv 2507.17634).

    Args:
        coefficients: One per snapshot, oldest first, summing to one.

    Returns:
        One multiplier per snapshot. The ``i``-th applies to the updates between snapshot ``i - 1`` and snapshot ``i``.
        The first is one, since the updates before the window count in full.

    Examples:
        >>> decay_from_coefficients([0.25, 0.25, 0.25, 0.25])
        [1.0, 0.75, 0.5, 0.25]
    """
    return list(accumulate(reversed(coefficients)))[::-1]


def coefficients_from_decay(multipliers: Sequence[float]) -> list[float]:
    """Returns the coefficients of the merge that is equivalent to a decay: ``c_j = w_j - w_(j+1)``.

    The inverse of `decay_from_coefficients`.

    Args:
        multipliers: One learning-rate multiplier per snapshot, oldest first. The first is one.

    Examples:
        >>> coefficients_from_decay([1.0, 0.75, 0.5, 0.25])
        [0.25, 0.25, 0.25, 0.25]
    """
    return [older - newer for older, newer in pairwise([*multipliers, 0.0])]
