"""Compares merges with the live model: on the same batches, also if the merges had fewer of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from merge_callback.live.batch_sums import BatchSums, standard_error
from merge_callback.live.evaluate import LoggedValue
from merge_callback.live.sharding import all_reduce_sum
from merge_callback.prediction.bias import gain
from merge_callback.validation.evaluation import Evaluated, Evaluation
from merge_callback.validation.logged import LoggedName, Names


@dataclass(frozen=True)
class Comparison:
    """Values of merges that can be compared with a live validation, with what they gain over it.

    Args:
        live: Metric -> live value, on the batches of the merges.
        merged: Merge -> metric -> merged value. If the merges had fewer batches than the live model, this is the live
            value of the whole validation less the gain on those batches, so that the two can be set side by side.
        gains: Merge -> metric -> gain, on the same batches.
        errors: Merge -> metric -> standard error of that gain; only where the merges had fewer batches and the values
            of single batches are known.
    """

    live: Mapping[str, LoggedValue]
    merged: dict[str, dict[str, LoggedValue]] = field(default_factory=dict)
    gains: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)


def are_sums_known(merges: Iterable[Evaluated]) -> bool:
    """Returns whether a live validation tells all that these merges are compared with, also on its first batches."""
    return all(value.sums is not None for merge in merges for value in merge.values.values())


def compare(evaluation: Evaluation, live: Mapping[str, LoggedValue], names: Names) -> Comparison:
    """Compares the merges of an evaluation with the live validation that followed. All ranks must call it together.

    Args:
        evaluation: What the validation of the merges found.
        live: Metric -> value of the whole live validation.
        names: Tell in which metrics more is better.
    """
    found = Comparison(_on_same_batches(evaluation, live))
    for merge, values in evaluation.values.items():
        merged, gains, errors = dict(values), {}, {}
        for metric, value in values.items():
            if metric not in live or metric not in found.live:
                continue
            is_better_higher = names.is_higher_better(metric, value)
            gains[metric] = better = gain(found.live[metric].value, value.value, is_better_higher)
            if not evaluation.is_limited:
                continue
            whole = live[metric].value
            merged[metric] = replace(value, value=whole + better if is_better_higher else whole - better)
            if (error := _error(found.live[metric].sums, value.sums)) is not None:
                errors[metric] = error
        found.merged[merge], found.gains[merge], found.errors[merge] = merged, gains, errors
    return found


def _on_same_batches(evaluation: Evaluation, live: Mapping[str, LoggedValue]) -> Mapping[str, LoggedValue]:
    if not evaluation.is_limited:
        return live
    if evaluation.live is not None:
        return evaluation.live
    found = {}
    # All merges had the same batches.
    for metric, value in next(iter(evaluation.values.values()), {}).items():
        known = live[metric].sums if metric in live else None
        first = known.until(value.sums.batches[-1]) if known is not None and value.sums is not None else None
        if first is not None:
            found[metric] = replace(live[metric], value=first.mean(), sums=first)
    return found


def _error(live: BatchSums | None, merged: BatchSums | None) -> float | None:
    if live is None or merged is None:
        return None
    return standard_error(live, merged, all_reduce_sum if merged.is_synced else lambda sums: sums)


def merged_and_gains(
    names: Names, comparison: Comparison, live: Mapping[str, LoggedValue]
) -> dict[LoggedName, LoggedValue]:
    """Returns the values of merges, their gains over the live values and the errors of these gains, to log.

    Args:
        names: The callback's names for them.
        comparison: The values.
        live: Metric -> value of the whole live validation, in the order in which they were logged.
    """
    logged = {}
    in_bar = next((metric for metric, value in live.items() if value.prog_bar), None)
    for merge, values in comparison.merged.items():
        for metric, value in values.items():
            is_better_higher = names.is_higher_better(metric, value)
            logged[names("merged", metric, merge)] = replace(
                value, prog_bar=merge == names.primary and metric == in_bar, higher_is_better=is_better_higher
            )
            if (better := comparison.gains[merge].get(metric)) is not None:
                logged[names("merge_gain", metric, merge)] = LoggedValue(better, logger=value.logger)
            if (error := comparison.errors[merge].get(metric)) is not None:
                known = torch.tensor(error, device=value.value.device)
                logged[names("merge_gain_stderr", metric, merge)] = LoggedValue(known, logger=value.logger)
    return logged
