"""Recommended snapshot interval and number of snapshots for a model size (arXiv 2505.12082)."""

import math
from typing import NamedTuple

from merge_callback.utilities.checks import check_numbers

# arXiv 2505.12082: number of parameters (total, not active, for a mixture of experts) -> tokens between two snapshots.
DENSE_INTERVALS = {411e6: 2e9, 2e9: 5e9, 8e9: 15e9, 70e9: 40e9}
MIXTURE_INTERVALS = {7e9: 4e9, 13e9: 8e9, 100e9: 80e9}
# The paper merged six snapshots for dense models up to this size, and ten for larger ones and mixtures.
LARGEST_WITH_SIX = 2e9
# A smaller number is a mistake, such as 7 for 7 billion.
LEAST_PARAMETERS = 1000


class RecommendedWindow(NamedTuple):
    """The two arguments of `MergeCallback` that set its window: ``MergeCallback(**window._asdict())``."""

    every_n_train_steps: int
    num_snapshots: int


def recommended_window(num_parameters: float, tokens_per_step: float, moe: bool = False) -> RecommendedWindow:
    """Returns the snapshot interval and number of snapshots that the paper recommends for a model of this size.

    The table of *Model Merging in Pre-training of Large Language Models* (arXiv 2505.12082) has four dense models from
    411 M to 70 B parameters and three mixtures of experts from 7 B to 100 B. Between these sizes the interval is
    interpolated by a power law; beyond them it is extrapolated, which is less reliable.

    The paper's intervals are for runs of trillions of tokens. In a short run the window would reach back into
    fast-moving early training, and the merge would be worse than the live model. Without arguments `MergeCallback`
    follows the length of training instead.

    Args:
        num_parameters: Total number of parameters; for a mixture of experts all of them, not only the active ones.
        tokens_per_step: Tokens in the batch of one optimizer step, over all ranks.
        moe: Whether the model is a mixture of experts.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If a number is not above zero and finite, or ``num_parameters`` is below 1,000.

    Examples:
        >>> recommended_window(8e9, tokens_per_step=4e6)
        RecommendedWindow(every_n_train_steps=3750, num_snapshots=10)
        >>> recommended_window(411e6, tokens_per_step=1e6)._asdict()
        {'every_n_train_steps': 2000, 'num_snapshots': 6}
    """
    check_numbers(num_parameters=num_parameters, tokens_per_step=tokens_per_step)
    for name, number in (("num_parameters", num_parameters), ("tokens_per_step", tokens_per_step)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be above zero and finite, got {number}")
    if num_parameters < LEAST_PARAMETERS:
        raise ValueError(f"num_parameters must be the total number of parameters, such as 7e9, got {num_parameters}")
    intervals = MIXTURE_INTERVALS if moe else DENSE_INTERVALS
    interval_tokens = _power_law(intervals, num_parameters)
    num_snapshots = 6 if not moe and num_parameters <= LARGEST_WITH_SIX else 10
    return RecommendedWindow(max(1, round(interval_tokens / tokens_per_step)), num_snapshots)


def _power_law(values: dict[float, float], at: float) -> float:
    """Interpolates, or extrapolates from the two nearest sizes, on logarithmic scales."""
    places = sorted(values)
    upper = next((index for index, place in enumerate(places) if at <= place), len(places) - 1)
    low, high = places[max(upper - 1, 0)], places[max(upper, 1)]
    share = math.log(at / low) / math.log(high / low)
    return values[low] * (values[high] / values[low]) ** share
