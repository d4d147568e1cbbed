"""Compares merges with the live model: on the same batches, also if the merges had fewer of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from merge_callback.capture.merge_set import MergeSet
from merge_callback.live.batch_sums import standard_error
from merge_callback.live.evaluate import LoggedValue
from merge_callback.live.sharding import all_gather_dict, all_reduce_sum, rank
from merge_callback.prediction.validations import FurtherMerge, StableValidation
from merge_callback.validation.evaluation import Evaluated, Evaluation
from merge_callback.validation.logged import LoggedName, Names


@dataclass(frozen=True)
class Comparison:
    """Values of merges beside those of a live validation, with what the merges gain.

    Args:
        live: Metric -> live value, on the batches of the merges.
        beside: Metric -> live value that fits the merged one: for means over batches that of the whole validation,
            else that on the batches of the merges.
        merged: Merge -> metric -> merged value. If the merges had fewer batches than the live model, means over batches
            are the live value of the whole validation less the difference on those batches, so that the two can be set
            side by side.
        differences: Merge -> metric -> live minus merged value, on the same batches.
        errors: Merge -> metric -> standard error of that difference; only where the merges had fewer batches and the
            values of single batches are known.
    """

    live: Mapping[str, LoggedValue]
    beside: Mapping[str, LoggedValue]
    merged: dict[str, dict[str, LoggedValue]] = field(default_factory=dict)
    differences: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)


def are_sums_known(merges: Mapping[str, Evaluated]) -> bool:
    """Returns whether a live validation tells all that these merges are compared with, also on its first batches.

    All ranks must call it together: a module may log a metric on one of them alone.
    """
    sums = {(name, metric): value.sums for name, each in merges.items() for metric, value in each.values.items()}
    told = [(key, known is not None and known.is_synced) for key, known in sums.items()]
    by_rank = all_gather_dict({rank(): (told, all(known is not None for known in sums.values()))})
    return all(are_known and theirs == told for theirs, are_known in by_rank.values())


def compare(evaluation: Evaluation, live: Mapping[str, LoggedValue]) -> Comparison:
    """Compares the merges of an evaluation with the live validation that followed. All ranks must call it together."""
    on_same = _on_same_batches(evaluation, live)
    firsts = {metric for values in evaluation.values.values() for metric, value in values.items() if value.sums is None}
    found = Comparison(on_same, dict(live) | {metric: value for metric, value in on_same.items() if metric in firsts})
    for merge, values in evaluation.values.items():
        merged, differences = dict(values), {}
        for metric, value in values.items():
            if metric not in live or metric not in found.live:
                continue
            differences[metric] = difference = found.live[metric].value - value.value
            if evaluation.is_limited and value.sums is not None:
                merged[metric] = replace(value, value=live[metric].value - difference)
        found.merged[merge], found.differences[merge] = merged, differences
        found.errors[merge] = _errors(found.live, values) if evaluation.is_limited else {}
    return found


def _on_same_batches(evaluation: Evaluation, live: Mapping[str, LoggedValue]) -> Mapping[str, LoggedValue]:
    if not evaluation.is_limited:
        return live
    if evaluation.live is not None:
        return evaluation.live
    firsts = {}
    # All merges had the same batches.
    for metric, value in next(iter(evaluation.values.values()), {}).items():
        known = live[metric].sums if metric in live else None
        first = known.until(value.sums.last) if known is not None and value.sums is not None else None
        if first is not None:
            firsts[metric] = first
    return {
        metric: replace(live[metric], value=firsts[metric].mean(), sums=firsts[metric]) for metric in _on_all(firsts)
    }


def _errors(live: Mapping[str, LoggedValue], merged: Mapping[str, LoggedValue]) -> dict[str, float]:
    pairs = {
        metric: (ours, theirs)
        for metric, value in merged.items()
        if (theirs := value.sums) is not None and metric in live and (ours := live[metric].sums) is not None
    }
    found = {}
    for metric in _on_all(pairs):
        ours, theirs = pairs[metric]
        error = standard_error(ours, theirs, all_reduce_sum if theirs.is_synced else lambda sums: sums)
        if error is not None:
            found[metric] = error
    return found


def _on_all(found: Mapping[str, object]) -> list[str]:
    """Returns the names that are there on all ranks, in an order that is the same on all of them."""
    by_rank = all_gather_dict({rank(): list(found)})
    return [name for name in found if all(name in names for names in by_rank.values())]


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
            if (difference := comparison.differences[merge].get(metric)) is not None:
                better = -difference if is_better_higher else difference
                logged[names("merge_gain", metric, merge)] = LoggedValue(better, logger=value.logger)
            if (error := comparison.errors[merge].get(metric)) is not None:
                known = torch.tensor(error, device=value.value.device)
                logged[names("merge_gain_stderr", metric, merge)] = LoggedValue(known, logger=value.logger)
    return logged


def stable_values(
    evaluation: Evaluation, live: Mapping[str, LoggedValue], comparison: Comparison, merges: MergeSet, optimizer: str
) -> StableValidation:
    """Returns what a validation in the stable phase, with optimizers of that name, teaches about annealing.

    If the merges had fewer batches, their values are the live ones of the whole validation less the differences.
    """
    primary = evaluation.merges[merges.primary]
    values = {name: float(live[name].value) for name in comparison.differences[merges.primary]}

    def merged(merge: str) -> dict[str, float]:
        known = {name: float(comparison.merged[merge][name].value) for name in comparison.differences[merge]}
        if evaluation.is_limited:
            known |= {
                name: values[name] - float(difference)
                for name, difference in comparison.differences[merge].items()
                if name in values and comparison.merged[merge][name].sums is None
            }
        return known

    others = [(name, made) for name, each in evaluation.merges.items() if (made := each.composition) is not None]
    return StableValidation(
        step=evaluation.step,
        span_steps=round(evaluation.diagnostics["span_steps"]),
        live=values,
        merged=merged(merges.primary),
        rule=primary.merge.label,
        composition=primary.composition,
        further=tuple(FurtherMerge(made, merged(name)) for name, made in others if name != merges.primary),
        phase=merges.capture.window.phase.num_begun,
        optimizer=optimizer,
    )
