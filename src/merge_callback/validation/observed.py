"""What a validation that the user has made himself found of the merges."""

from collections.abc import Mapping

import torch

from merge_callback.capture.merge_set import MergeSet
from merge_callback.live.evaluate import LoggedValue
from merge_callback.validation.evaluation import Evaluated, Evaluation


def logged_values(values: Mapping[str, float]) -> dict[str, LoggedValue]:
    """Returns metric -> value as if a validation loop had logged them."""
    return {metric: LoggedValue(torch.tensor(float(value))) for metric, value in values.items()}


def observed(merges: MergeSet, step: int, values: Mapping[str, Mapping[str, float]]) -> Evaluation:
    """Returns the results of merges at a step.

    Args:
        merges: The merges as they were validated, with the same snapshots.
        step: Optimizer steps so far.
        values: Merge -> metric -> value; the primary merge comes first.

    Raises:
        ValueError: If no merge has one of the names.
    """
    evaluated = {}
    for name, of_merge in values.items():
        merge = merges[name]
        made_of = merge.ring_coefficients(), merge.intervals, merge.composition(step), merge.describe()
        evaluated[name] = Evaluated(merge, *made_of, logged_values(of_merge))
    diagnostics = {"span_steps": merges[None].span_steps()}
    return Evaluation(step, evaluated, None, diagnostics, is_limited=False)
