"""Compares decays that begin now or later, by their forecasts. Pure functions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from merge_callback.prediction.forecasts import Forecast, NoForecastError, forecast, steps_of
from merge_callback.prediction.records import AnnealRecord
from merge_callback.prediction.river import Decay
from merge_callback.prediction.validations import StableValidation


@dataclass(frozen=True)
class Option:
    """A decay that could be chosen.

    Args:
        decay: The decay.
        forecast: What it would give; None if that cannot be told.
        reason: Why it cannot be told; empty if it can.
    """

    decay: Decay
    forecast: Forecast | None
    reason: str = ""


def plan(
    history: Sequence[StableValidation],
    metric: str,
    *,
    shapes: Iterable[str],
    spans: Iterable[float],
    budget: int | None = None,
    anneals: Iterable[AnnealRecord] = (),
) -> list[Option]:
    """Returns the decays that begin now, and those that end with the budget, in the order of their ends.

    Args:
        history: Validations of the run so far, ascending.
        metric: Name of a metric where less is better.
        shapes: Shapes of the decays.
        spans: Lengths of the decays, as shares of all steps at their end.
        budget: Optimizer steps that are left for the rest of the run and its decay; None is no limit.
        anneals: Real anneals of the run, which shift the forecasts.
    """
    now = history[-1].step
    decays: dict[Decay, None] = {}
    for span in spans:
        for shape in shapes:
            length = steps_of(span, now)
            if budget is None or length <= budget:
                decays[Decay(now, length, shape)] = None
            if budget is not None and (length := round(span * (now + budget))) <= budget:
                decays[Decay(now + budget - length, length, shape)] = None
    known = list(anneals)
    options = [option(history, metric, decay, known) for decay in decays]
    return sorted(options, key=lambda each: (each.decay.end, each.decay.start))


def option(
    history: Sequence[StableValidation], metric: str, decay: Decay, anneals: Iterable[AnnealRecord] = ()
) -> Option:
    """Returns a decay with its forecast, or with the reason why there is none."""
    try:
        return Option(decay, forecast(history, metric, decay, anneals=anneals))
    except NoForecastError as error:
        return Option(decay, None, str(error))


def later(decay: Decay, num_steps: int) -> Decay:
    """Returns the decay of the same shape and share of the steps that begins so many steps later.

    Examples:
        >>> later(Decay(900, 100), 900)
        Decay(start=1800, span_steps=200, shape='linear', final_rate=0.0)
    """
    start = decay.start + num_steps
    return Decay(start, steps_of(decay.span, start), decay.shape, decay.final_rate)


def verdict(options: Sequence[Option]) -> str:
    """Returns in words which decay ends lowest, and whether its interval lies apart from those of the others."""
    told = [(each.decay, each.forecast.prediction) for each in options if each.forecast is not None]
    if not told:
        return "Nothing can be foretold"
    told.sort(key=lambda pair: pair[1].value)
    (best, lowest), *others = told
    said = f"Lowest: {describe(best)}"
    close = [decay for decay, made in others if made.low <= lowest.high]
    if close:
        return f"{said}; but its interval overlaps with those of {len(close)} others, so these cannot be told apart"
    return f"{said}; the intervals of all others lie above" if others else said


def describe(decay: Decay) -> str:
    """Returns a decay in words.

    Examples:
        >>> describe(Decay(900, 100))
        'linear over 100 steps (10%) from step 900'
    """
    return f"{decay.shape} over {decay.span_steps} steps ({decay.span:.0%}) from step {decay.start}"
