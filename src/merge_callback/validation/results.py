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


def beside(live: float, gain: float, *, higher_is_better: bool) -> float:
    """Returns the merged value that belongs beside a live one, also if the merge was validated on fewer batches.

    Examples:
        >>> beside(2.0, 0.5, higher_is_better=False), beside(0.5, 0.25, higher_is_better=True)
        (1.5, 0.75)
    """
    return live + gain if higher_is_better else live - gain


def fit_result(
    names: Names, step: int, live: Mapping[str, LoggedValue], logged: Mapping[LoggedName, LoggedValue]
) -> FitResult:
    """Returns the values of a validation.

    Args:
        names: The callback's names of logged values.
        step: Optimizer steps done.
        live: Metric -> live value.
        logged: What the callback has logged beside them.
    """

    def found(kind: str, metric: str) -> float | None:
        value = logged.get(names(kind, metric))
        return None if value is None else float(value.value)

    metrics = {}
    for metric, value in live.items():
        gain, predicted = (found(kind, metric) for kind in ("merge_gain", "annealed"))
        is_higher_better = names.is_higher_better(metric, value)
        merged = None if gain is None else beside(float(value.value), gain, higher_is_better=is_higher_better)
        metrics[metric] = MetricResult(float(value.value), merged, gain, predicted, is_higher_better)
    return FitResult(names.callback, step, found("merge", "span_steps"), found("merge", "seconds"), metrics)


def result_of_last_fit(results: Sequence[FitResult]) -> FitResult:
    """Returns, of the callbacks of the last fit, the result of the first one that has a merge, else of the first one.

    Args:
        results: What was collected; at least one.
    """
    last: list[FitResult] = []
    for result in reversed(results):
        # Where a name occurs again, an earlier fit ended.
        if result.callback in [each.callback for each in last]:
            break
        last.insert(0, result)
    return next((each for each in last if each.span_steps is not None), last[0])


_collected: ContextVar[list[FitResult] | None] = ContextVar("collected", default=None)


@contextmanager
def collecting_results() -> Iterator[list[FitResult]]:
    """Yields a list to which every fit inside the context adds its result at its end, on the rank that logs."""
    results: list[FitResult] = []
    token = _collected.set(results)
    try:
        yield results
    finally:
        _collected.reset(token)


def collect(make: Callable[[], FitResult]) -> None:
    """Adds a result to the list of whoever collects them; nothing is made if nobody does."""
    if (results := _collected.get()) is not None:
        results.append(make())
