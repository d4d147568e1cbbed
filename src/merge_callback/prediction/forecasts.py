"""Forecasts of decays that have not begun, from a run's own validations at a constant rate, without a real anneal."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from merge_callback.prediction.bias import HUGE, Prediction
from merge_callback.prediction.fitted import Widths, fitted
from merge_callback.prediction.records import AnnealRecord
from merge_callback.prediction.river import HISTORY_SHARE, KEPT, Composition, Decay, River, Seen, are_apart, river
from merge_callback.prediction.validations import StableValidation
from merge_callback.utilities.tables import number

# Spans of decays, as shares of all steps at their end, that were measured.
MEASURED_SPANS = (0.04, 0.26)
MIN_VALIDATIONS = 4
# The closest snapshots that were measured: at smaller distances their noise is nearly the same.
MIN_GAP_STEPS = 4
# Optimizers whose decays were measured, and could not be foretold.
UNFORESEEN = ("SGD",)
# The most that a real anneal of the run counts, in half the interval of its forecast.
MAX_ERROR = 3.0
# Before this share of a run the loss is no power law of the steps.
FIRST_SHARE = 0.1


class NoForecastError(RuntimeError):
    """Nothing can be foretold; the message says why, and what to do."""


@dataclass(frozen=True)
class Forecast:
    """What a metric will be at the end of a decay.

    Args:
        decay: The decay.
        prediction: Value and interval.
        source: What it stands on, in words.
    """

    decay: Decay
    prediction: Prediction
    source: str

    def __str__(self) -> str:
        half = (self.prediction.high - self.prediction.low) / 2
        return f"forecast {number(self.prediction.value)} ± {number(half)} at step {self.decay.start}"


def steps_of(length: float | int, now: int) -> int:
    """Returns the length in steps of a decay that begins now; a float is a share of all steps at its end.

    Examples:
        >>> steps_of(0.1, now=900), steps_of(50, now=900)
        (100, 50)
    """
    return max(1, round(now * length / (1 - length))) if isinstance(length, float) else length


def forecast(
    history: Sequence[StableValidation],
    metric: str,
    decay: Decay,
    *,
    anneals: Iterable[AnnealRecord] = (),
    num_steps: int | None = None,
) -> Forecast:
    """Forecasts a loss at the end of a decay that begins at or after the newest validation.

    Args:
        history: Validations of the run so far, ascending; only those at the newest one's constant rate are used.
        metric: Name of a metric where less is better.
        decay: The decay.
        anneals: Real anneals of the run. The errors of forecasts that would have been made for those that began before
            now shift the forecast: in half the width of the interval, by their mean, times ``n / (n + 1)`` of ``n``.
        num_steps: Planned steps of the run; None if unknown.

    Raises:
        NoForecastError: If nothing can be foretold.
    """
    known = _usable(history, metric)
    found = _river(known, metric)
    _refuse_decay(decay, found, num_steps)
    is_of_ring = _is_of_ring(known[-1], metric)
    prediction = found.forecast(decay, _widths(known[-1], metric))
    errors = [error for each in anneals if (error := _error(each, history, metric)) is not None]
    if errors:
        shift = fmean(errors) * len(errors) / (len(errors) + 1) * (prediction.high - prediction.value)
        prediction = Prediction(*(end + shift for end in (prediction.value, prediction.low, prediction.high)))
    source = "merges of one ring and the validations so far" if is_of_ring else "the validations so far"
    if not known[-1].is_like_adam:
        source += f", with {known[-1].optimizer} in a wide interval: its numbers come from runs with AdamW"
    if errors:
        source += f", and {len(errors)} real anneals of this run"
    return Forecast(decay, prediction, source)


def current_river(history: Sequence[StableValidation], metric: str) -> River:
    """Returns level, slope and noise of a loss at the newest validation.

    Raises:
        NoForecastError: If they cannot be told.
    """
    return _river(_usable(history, metric), metric)


def _usable(history: Sequence[StableValidation], metric: str) -> list[StableValidation]:
    """Returns those validations at the newest one's rate that count, with the metric and the merge's composition."""
    if not history:
        raise NoForecastError("there is no validation of the merge at a constant rate yet")
    now = history[-1]
    if metric not in now.merged:
        raise NoForecastError(f"the validation has no {metric!r}; it has: {', '.join(now.merged)}")
    if now.composition is None:
        raise NoForecastError(
            "it is not known of which snapshots the primary merge was made: it is an average over every step, where one"
            " of snapshots is needed, or an earlier version wrote the checkpoint"
        )
    if set(now.optimizer.split(", ")) & set(UNFORESEEN):
        raise NoForecastError(
            f"with {now.optimizer}, decays gained much more than live and merged losses tell, by amounts that nothing"
            " in the run foretold (benchmarks/forecast)"
        )
    known: list[StableValidation] = []
    for each in reversed(history):
        is_old = each.step < (1 - HISTORY_SHARE) * now.step and len(known) >= MIN_VALIDATIONS
        if is_old or each.phase != now.phase:
            break
        if (
            each.rule == now.rule
            and _is_on_river(each.step, each.composition)
            and all(abs(values.get(metric, math.nan)) < HUGE for values in (each.live, each.merged))
        ):
            known.append(each)
    known.reverse()
    if len(known) < MIN_VALIDATIONS or known[-1] is not now:
        raise NoForecastError(
            f"it needs {MIN_VALIDATIONS} validations with finite values at this rate, and there are {len(known)}"
        )
    if now.merged[metric] >= now.live[metric]:
        raise NoForecastError(f"the merge is no better than the live model, so {metric!r} shows no noise to anneal")
    return known


def _river(known: Sequence[StableValidation], metric: str) -> River:
    now = known[-1]
    merges = _merges(now, metric)
    if merges[0].squares > 0.5:
        raise NoForecastError("the merge has hardly less noise than a single snapshot; it needs more snapshots")
    gap = now.span_steps * merges[0].squares / (1 - merges[0].squares)
    if gap < MIN_GAP_STEPS:
        raise NoForecastError(
            f"snapshots are {gap:.1f} steps apart on average, and their noise is alike below {MIN_GAP_STEPS} steps;"
            " use a longer every_n_train_steps or fewer snapshots"
        )
    history = [_merges(each, metric)[0] for each in known]
    found = river(now.step, now.live[metric], merges, history, now.span_steps)
    if found is None or found.noise <= 0:
        raise NoForecastError("the validations so far tell no slope and noise of the loss")
    return found


def _merges(validation: StableValidation, metric: str) -> list[Seen]:
    """Returns the merges of a validation, the primary one first."""
    assert validation.composition is not None
    pairs = [(validation.composition, validation.merged[metric])]
    pairs += [(each.composition, each.merged[metric]) for each in validation.further if metric in each.merged]
    step = validation.step
    return [
        Seen(step - made.age, made.squares, loss)
        for made, loss in pairs
        if abs(loss) < HUGE and _is_on_river(step, made)
    ]


def _is_on_river(step: int, made: Composition | None) -> bool:
    """Returns whether a merge has a place after the first step, and noise."""
    return made is not None and step > 0 and made.age < step and 0 < made.squares < HUGE


def _is_of_ring(now: StableValidation, metric: str) -> bool:
    return are_apart(_merges(now, metric), now.span_steps)


def _widths(now: StableValidation, metric: str) -> Widths:
    widths = fitted().ring if _is_of_ring(now, metric) else fitted().history
    return widths if now.is_like_adam else widths.times(fitted().unlike_adam)


def _refuse_decay(decay: Decay, found: River, num_steps: int | None) -> None:
    low, high = MEASURED_SPANS
    if not low <= decay.span <= high:
        raise NoForecastError(
            f"the decay takes {decay.span:.0%} of the steps at its end, and forecasts were measured for"
            f" {low:.0%} to {high:.0%}"
        )
    if (decay.end - found.now) / decay.end > high:
        raise NoForecastError(
            f"the decay ends {decay.end - found.now} steps from now, which is more than {high:.0%} of the steps by then"
        )
    if num_steps is not None and found.now < FIRST_SHARE * num_steps:
        raise NoForecastError(f"step {found.now} lies in the first tenth of the {num_steps} steps of the run")


def _error(record: AnnealRecord, history: Sequence[StableValidation], metric: str) -> float | None:
    """Returns by how much an anneal ended above its forecast, in half the interval; None if there is none.

    One that is far off says that something else happened, and counts no more than `MAX_ERROR`.
    """
    before, now = history[: bisect_right(history, record.start_step, key=lambda each: each.step)], history[-1]
    annealed = record.annealed.get(metric, math.nan)
    if not before or before[-1].step != record.start_step or not abs(annealed) < HUGE or record.shape not in KEPT:
        return None
    if (before[-1].phase, before[-1].rule) != (now.phase, now.rule):
        return None
    decay = Decay(record.start_step, record.step - record.start_step, record.shape)
    try:
        usable = _usable(before, metric)
        found = _river(usable, metric)
        _refuse_decay(decay, found, None)
    except NoForecastError:
        return None
    made = found.forecast(decay, _widths(usable[-1], metric))
    return max(-MAX_ERROR, min(MAX_ERROR, (annealed - made.value) / (made.high - made.value)))


class Forecaster:
    """Forecasts losses at every validation, for a decay that would begin there, and keeps the latest ones.

    Args:
        span: Length of the decay: a share of all steps at its end, or a number of steps; None forecasts nothing.
    """

    def __init__(self, span: float | int | None = None) -> None:
        self.span = span
        # By metric, from the latest validation at a constant rate; kept while the rate decays.
        self.forecasts: dict[str, Forecast] = {}

    def update(self, step: int, losses: Iterable[str], make: Callable[[str, Decay], Forecast]) -> dict[str, str]:
        """Makes the forecasts of a validation anew.

        Args:
            step: Optimizer step of the validation.
            losses: Names of the metrics where less is better.
            make: Makes the forecast of a metric for a decay, or raises `NoForecastError`.

        Returns:
            Why there is none, by metric.
        """
        self.forecasts = {}
        if self.span is None:
            return {}
        reasons = {}
        for metric in losses:
            made = _made_or_why_not(make, metric, Decay(step, steps_of(self.span, step)))
            if isinstance(made, Forecast):
                self.forecasts[metric] = made
            else:
                reasons[metric] = made
        return reasons

    def forget_since(self, step: int) -> None:
        """Drops the forecasts of decays that begin at that step or later."""
        self.forecasts = {metric: each for metric, each in self.forecasts.items() if each.decay.start < step}

    def state_dict(self) -> dict[str, Any]:
        return {metric: asdict(each) for metric, each in self.forecasts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`, unless nothing is forecast any more."""
        if self.span is not None:
            self.forecasts = {
                metric: Forecast(Decay(**kept["decay"]), Prediction(**kept["prediction"]), kept["source"])
                for metric, kept in state.items()
            }


def _made_or_why_not(make: Callable[[str, Decay], Forecast], metric: str, decay: Decay) -> Forecast | str:
    try:
        return make(metric, decay)
    except NoForecastError as error:
        return str(error)
