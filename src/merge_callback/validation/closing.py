"""What the terminal shows at the end of a run: its merges beside the live model, and what came of its decay."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from merge_callback.live.evaluate import LoggedValue
from merge_callback.prediction.bias import Prediction
from merge_callback.prediction.forecasts import Forecast
from merge_callback.prediction.predictor import is_same_span
from merge_callback.prediction.validations import StableValidation
from merge_callback.utilities.tables import NOTHING, number, text_table
from merge_callback.validation.directions import is_a_quality
from merge_callback.validation.logged import BOUNDS, LoggedName
from merge_callback.validation.reasons import Circumstances

# A table of more metrics is not read; all of them are in the loggers.
MAX_METRICS = 20


@dataclass(frozen=True)
class Compared:
    """Merges beside the live model, at one validation.

    Args:
        step: Optimizer steps at the validation.
        live: Metric -> live value, as it stands beside the merged one.
        logged: The values that the callback logged at the validation.
        merges: Label of a merge -> its name, and what it is made of; the primary one comes first.
        circumstances: What may make the primary merge worse than the live model; None if it was not validated.
    """

    step: int
    live: Mapping[str, LoggedValue]
    logged: Mapping[LoggedName, LoggedValue]
    merges: Mapping[str, tuple[str, str]]
    circumstances: Circumstances | None

    def describe(self, since: str = "") -> str:
        """Returns a table of live and merged values, gains and predictions, and why a merge may be worse.

        Args:
            since: What the title adds to the step, such as ``", before the decay"``.
        """
        qualities = [name for name in self.logged if name.kind == "merged" and is_a_quality(name.metric)]
        shown = [name for name in qualities if self._gain(name) is not None]
        metrics = list(dict.fromkeys(name.metric for name in shown))
        kept = set(metrics[:MAX_METRICS])
        rows = [self._row(name) for name in shown if name.metric in kept]
        if not rows:
            return ""
        when = f"at step {self.step}{since}"
        names, made_of = zip(*self.merges.values(), strict=True) if self.merges else ((), ())
        if len(names) == 1:
            title, rows = f"{names[0]} ({made_of[0]}), {when}", [[row[0], NOTHING, *row[2:]] for row in rows]
        else:
            title = f"merges {when}"
        header = ["metric", "merge", "live", "merged", "gain", "predicted"]
        lines = [text_table(header, rows, title=title, num_left=2)]
        if len(names) > 1:
            lines += [f"{name}: {what}" for name, what in self.merges.values()]
        if left_out := len(metrics) - len(kept):
            lines.append(f"and {left_out} further metrics, which are in the loggers")
        return "\n".join([*lines, *self._why_worse(shown)])

    def _row(self, name: LoggedName) -> list[str]:
        live, merged = (float(value.value) for value in (self.live[name.metric], self.logged[name]))
        values = [number(live), number(merged), number(self._gain(name) or 0.0, "+")]
        return [name.metric, self.merges[name.label][0], *values, self._predicted(name)]

    def _gain(self, name: LoggedName) -> float | None:
        found = self.logged.get(LoggedName("merge_gain", name.label, name.metric))
        return None if found is None else float(found.value)

    def _predicted(self, name: LoggedName) -> str:
        ends = [self.logged.get(LoggedName("annealed", name.label, name.metric, end)) for end in ("", *BOUNDS)]
        found = [float(end.value) for end in ends if end is not None]
        if len(found) < len(ends):
            return NOTHING
        return f"{number(found[0])} ± {number(max(abs(end - found[0]) for end in found))}"

    def _why_worse(self, shown: list[LoggedName]) -> list[str]:
        primary = next(iter(self.merges), None)
        gains = {name.metric: self._gain(name) or 0.0 for name in shown if name.label == primary}
        worse = {metric: gain for metric, gain in gains.items() if gain < 0}
        return self.circumstances.explain(worse) if worse and self.circumstances is not None else []


@dataclass(frozen=True)
class Decayed:
    """What was said before a decay of the run, and what came of it.

    Args:
        before: The last validation at a constant rate.
        step: Optimizer steps at the end of the decay.
        values: Metric -> live value there.
        predictions: Metric -> annealed value that was predicted at the last validation at a constant rate.
        forecasts: Metric -> what was forecast there.
    """

    before: StableValidation
    step: int
    values: Mapping[str, float]
    predictions: Mapping[str, Prediction] = field(default_factory=dict)
    forecasts: Mapping[str, Forecast] = field(default_factory=dict)

    def describe(self) -> str:
        """Returns a table of it, with whether each interval holds what came."""
        rows = []
        metrics = [name for name in self.before.live if name in self.values and is_a_quality(name)]
        for metric in metrics[:MAX_METRICS]:
            came = self.values[metric]
            for what, known in (("live", self.before.live), ("merged", self.before.merged)):
                if metric in known:
                    rows.append([metric, what, number(known[metric]), NOTHING, number(came), NOTHING])
            if (predicted := self.predictions.get(metric)) is not None:
                rows.append(_said(metric, "predicted", predicted, came))
            if (foretold := self.forecasts.get(metric)) is not None:
                rows.append(_said(metric, "forecast", foretold.prediction, came, self._other_length(foretold)))
        if not rows:
            return ""
        header = ["metric", "said", "value", "interval", "came to", "holds"]
        start = self.before.step
        title = f"after the decay, at step {self.step}, and what step {start} had said"
        return text_table(header, rows, title=title, num_left=2)

    def _other_length(self, foretold: Forecast) -> str:
        """Returns for which decay a forecast was made, if that was not about the one that came."""
        forecast_steps, steps = foretold.decay.span_steps, self.step - foretold.decay.start
        return "" if is_same_span(forecast_steps, steps) else f" of {forecast_steps} steps"


def _said(metric: str, what: str, said: Prediction, came: float, of_other: str = "") -> list[str]:
    holds = "yes" if said.low <= came <= said.high else "no"
    interval = f"{number(said.low)} to {number(said.high)}"
    return [metric, f"{what}{of_other}", number(said.value), interval, number(came), NOTHING if of_other else holds]
