"""The last values of a fit, for programs that compare fits, whatever logger these have."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from merge_callback.live.evaluate import LoggedValue
from merge_callback.validation.logged import LoggedName, Names


@dataclass(frozen=True)
class MetricResult:
    """One metric at the last validation of a fit: live, merged and predicted value; None if there was none."""

    live: float
    merged: float | None
    gain: float | None
    predicted: float | None
    higher_is_better: bool


@dataclass(frozen=True)
class FitResult:
    """The last validation of a fit.

    Args:
        callback: Name of the callback; several of one fit have different ones.
        step: Optimizer steps done.
        span_steps: Steps that the primary merge covers; None if there was no merge.
        seconds: Time that the validation of the merges took; None if there was none.
        metrics: Metric -> its values with the primary merge, in the order in which they were logged.
    """

    callback: str
    step: int
    span_steps: float | None
    seconds: float | None
    metrics: dict[str, MetricResult]


def fit_result(
    names: Names, step: int, live: Mapping[str, LoggedValue], logged: Mapping[LoggedName, LoggedValue]
) -> FitResult:
    """Returns the values of a validation.

    Args:
        names: The callback's names of logged values.
        step: Optimizer steps done.
        live: Metric -> live value, as it stands beside the merged one.
        logged: What the callback has logged beside them.
    """

    def found(kind: str, metric: str) -> float | None:
        value = logged.get(names(kind, metric))
        return None if value is None else float(value.value)

    metrics = {}
    for metric, value in live.items():
        merged, gain, predicted = (found(kind, metric) for kind in ("merged", "merge_gain", "annealed"))
        is_higher_better = names.is_higher_better(metric, value)
        metrics[metric] = MetricResult(float(value.value), merged, gain, predicted, is_higher_better)
    return FitResult(names.callback, step, found("merge", "span_steps"), found("merge", "seconds"), metrics)


def result_of_last_fit(fits: Sequence[Sequence[FitResult]]) -> FitResult | None:
    """Returns, of the last fit with results, that of the first callback that has a merge, else of the first one.

    Args:
        fits: What was collected. The result is None if there is none.
    """
    last = next((results for results in reversed(fits) if results), [])
    return next((each for each in last if each.span_steps is not None), next(iter(last), None))


_collected: ContextVar[list[list[FitResult]] | None] = ContextVar("collected", default=None)


@contextmanager
def collecting_results() -> Iterator[list[list[FitResult]]]:
    """Yields a list to which every fit inside the context adds its results at its end, on the rank that logs."""
    fits: list[list[FitResult]] = []
    token = _collected.set(fits)
    try:
        yield fits
    finally:
        _collected.reset(token)


def begin_fit() -> None:
    """Starts a new group of results. All callbacks of a fit call it before the first of them has a result."""
    if (fits := _collected.get()) is not None:
        fits.append([])


def collect(make: Callable[[], FitResult]) -> None:
    """Adds a result to those of the fit, for whoever collects them; nothing is made if nobody does."""
    if (fits := _collected.get()) is not None:
        fits[-1].append(make())
