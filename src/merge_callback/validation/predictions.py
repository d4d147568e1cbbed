"""What validations teach about annealing: predictions and forecasts to log beside the live values."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from merge_callback.capture.merge_set import MergeSet
from merge_callback.live.evaluate import LoggedValue
from merge_callback.prediction.forecasts import (
    MIN_VALIDATIONS,
    Forecast,
    Forecaster,
    NoForecastError,
    forecast,
    steps_of,
)
from merge_callback.prediction.predictor import AnnealPredictor, is_same_span
from merge_callback.prediction.river import Decay
from merge_callback.prediction.validations import StableValidation
from merge_callback.utilities.messages import Messages
from merge_callback.validation.closing import Decayed
from merge_callback.validation.comparison import Comparison, stable_values
from merge_callback.validation.directions import is_a_quality
from merge_callback.validation.evaluation import Evaluation
from merge_callback.validation.logged import LoggedName, Names, predictions_and_errors
from merge_callback.validation.moment import Moment


class LoggedPredictions:
    """Learns from validations at a constant rate what an anneal would give, and checks that when the rate decays.

    Args:
        merges: The merges of the run.
        names: The names of logged values.
        predictor: Predicts annealed values by real anneals, and keeps the validations.
        forecaster: Forecasts decays that begin now.
        messages: Logs infos and warnings for the user.
    """

    def __init__(
        self, merges: MergeSet, names: Names, predictor: AnnealPredictor, forecaster: Forecaster, messages: Messages
    ) -> None:
        self.predictor = predictor
        self.forecaster = forecaster
        # What came of the run's decay, if the latest validation was at its end.
        self.decayed: Decayed | None = None
        self._merges = merges
        self._names = names
        self._messages = messages
        # Planned steps of the run, and the metrics where less is better; None until a validation has told.
        self.num_steps: int | None = None
        self.losses: list[str] | None = None

    @property
    def are_any(self) -> bool:
        """Whether there are predictions or forecasts that the end of a decay can check."""
        return bool(self.predictor.predictions or self.forecaster.forecasts)

    def after_validation(
        self, moment: Moment, evaluation: Evaluation | None, live: Mapping[str, LoggedValue], comparison: Comparison
    ) -> dict[LoggedName, LoggedValue]:
        """Learns from a validation, if merge and live model can be compared; returns what to log.

        Args:
            moment: Where the run stands.
            evaluation: What the validation found of the merges; None if they were not validated.
            live: Metric -> value of the live validation.
            comparison: Merges and live model side by side.
        """
        capture = self._merges.capture
        step, is_decaying = moment.step, not capture.window.phase.is_stable
        is_end_of_decay = is_decaying and moment.is_last
        self.decayed = self._outcome(step, live) if is_end_of_decay and self.predictor.history else None
        # Merges and the live model belong to the same stable phase, which still goes on.
        is_comparable = not is_decaying and capture.is_current
        if evaluation is not None and self._merges.primary in evaluation.merges and is_comparable:
            validation = stable_values(evaluation, live, comparison, self._merges, moment.optimizer)
            self.losses, self.num_steps = self._losses(evaluation), moment.num_steps
            self._learn(validation, moment)
            self._forecast(validation)
        if not is_decaying and (evaluation is None or not is_comparable):
            return {}
        logged = predictions_and_errors(
            self._names, "annealed", self.predictor.predictions, live, is_end_of_decay=is_end_of_decay
        )
        if self.predictor.is_prior and self.predictor.predictions:
            logged[self._names("merge", "is_prior")] = LoggedValue(torch.tensor(1.0))
        made = self.forecaster.forecasts
        # A decay that is much longer or shorter than the one that was forecast says nothing about the forecast.
        is_as_forecast = is_end_of_decay and all(
            is_same_span(each.decay.span_steps, step - each.decay.start) for each in made.values()
        )
        foretold = {metric: each.prediction for metric, each in made.items()}
        if made:
            # All are of one decay.
            end = next(iter(made.values())).decay.end
            logged[self._names("merge", "forecast_end")] = LoggedValue(torch.tensor(float(end)))
        return logged | predictions_and_errors(self._names, "forecast", foretold, live, is_end_of_decay=is_as_forecast)

    def forecast(self, metric: str, length: float | int, shape: str, final_rate: float) -> Forecast:
        """Forecasts a metric at the end of a decay that begins at the latest validation; see `MergeCallback.forecast`.

        Raises:
            NoForecastError: If nothing can be foretold.
        """
        history = self.predictor.history
        phase = self._merges.capture.window.phase
        if history and not (phase.is_stable and history[-1].phase == phase.num_begun):
            raise NoForecastError(
                "the learning rate has moved since the latest validation, and forecasts are for decays that begin now"
            )
        if history and metric in history[-1].merged and self.losses is not None and metric not in self.losses:
            raise NoForecastError(f"{metric!r} is no loss")
        step = history[-1].step if history else 0
        return self._made(metric, Decay(step, steps_of(length, step), shape, final_rate))

    def _made(self, metric: str, decay: Decay) -> Forecast:
        known = self.predictor
        return forecast(known.history, metric, decay, anneals=known.own_anneals, num_steps=self.num_steps)

    def _learn(self, validation: StableValidation, moment: Moment) -> None:
        for problem in self.predictor.learn(validation, self.losses or (), may_write=moment.may_write):
            self._messages.warn(f"left out of the records: {problem}", problem)
        for metric, fit in self.predictor.fits.items():
            # Once of each kind, whatever the numbers.
            topic = re.sub(r"\d", "", f"annealed {metric} {fit.source}")
            self._messages.say(f"{self._names('annealed', metric)} predicts {fit}", topic)
        calibration = self.predictor.calibration
        if calibration is not None and not self.predictor.is_prior and not self.predictor.fits:
            self._messages.say(f"uncalibrated until {calibration} holds two real anneals of a kind", "uncalibrated")

    def _forecast(self, validation: StableValidation) -> None:
        reasons = self.forecaster.update(validation.step, self.losses or (), self._made)
        if len(self.predictor.history) < MIN_VALIDATIONS:
            return
        for metric, reason in reasons.items():
            # Once of each kind, whatever the numbers.
            topic = re.sub(r"\d", "", f"{metric}: {reason}")
            self._messages.say(f"no {self._names('forecast', metric)} at step {validation.step}: {reason}", topic)
        for metric, made in self.forecaster.forecasts.items():
            name = self._names("forecast", metric)
            self._messages.say(f"{name} stands on {made.source}", f"{name} {made.source}")

    def _losses(self, evaluation: Evaluation) -> list[str]:
        """Returns the metrics of the primary merge where less is better, in the order in which they are logged."""
        values = evaluation.merges[self._merges.primary].values
        return [
            name
            for name, value in values.items()
            if is_a_quality(name) and not self._names.is_higher_better(name, value)
        ]

    def curvature_gain(self, evaluation: Evaluation) -> dict[str, float]:
        """Returns the curvature gain of the first loss; empty unless the merge's snapshots have known losses."""
        if self._merges.primary not in evaluation.merges or not (losses := self._losses(evaluation)):
            return {}
        primary = evaluation.merges[self._merges.primary]
        # The live model was validated at points, not at means over intervals.
        coefficients = primary.coefficients if not primary.intervals else {}
        found = self.predictor.curvature_gain(losses[0], coefficients, evaluation.step)
        return {} if found is None else {"curvature_gain": found}

    def foretold(self) -> str:
        """Returns what is forecast, a line a metric."""
        return "\n".join(
            f"{metric}: {made} for a {made.decay.shape} decay over {made.decay.span_steps} steps"
            for metric, made in self.forecaster.forecasts.items()
        )

    def _outcome(self, step: int, live: Mapping[str, LoggedValue]) -> Decayed:
        values = {metric: float(value.value) for metric, value in live.items()}
        said = dict(self.predictor.predictions), dict(self.forecaster.forecasts)
        return Decayed(self.predictor.history[-1], step, values, *said)

    def forget_since(self, step: int) -> None:
        """Drops the validations at that step and later, and forecasts made there."""
        self.predictor.forget_since(step)
        self.forecaster.forget_since(step)

    def state_dict(self) -> dict[str, Any]:
        return {**self.predictor.state_dict(), "forecasts": self.forecaster.state_dict(), "losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.predictor.load_state_dict(state)
        self.forecaster.load_state_dict(state["forecasts"])
        self.losses = state["losses"]
