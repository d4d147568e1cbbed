"""A run at a constant rate as its validations know it, and what real anneals make of them."""

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from merge_callback.live.evaluate import LoggedValue
from merge_callback.prediction.bias import Prediction, curvature_gain
from merge_callback.prediction.calibration import PRIOR, AnnealCalibration
from merge_callback.prediction.records import StableValidation
from merge_callback.utilities.messages import Messages
from merge_callback.validation.logged import BOUNDS, LoggedName, Names


class Trunk:
    """Remembers what validations of the primary merge have found, and predicts from them what an anneal would give.

    Args:
        calibration: As `MergeCallback` takes it.
        names: What predictions are called where they are logged.
        messages: For the user.
    """

    def __init__(self, calibration: str | os.PathLike[str] | None, names: Names, messages: Messages) -> None:
        # Every validation of the primary merge at a constant rate: what real anneals are compared with.
        self.history: list[StableValidation] = []
        # The latest at a constant rate; kept while the rate decays.
        self.predictions: dict[str, Prediction] = {}
        # Whether the latest validation has compared them with the end of a decay.
        self.is_checked = False
        self._anneals = AnnealCalibration(calibration) if calibration is not None else None
        self._names = names
        self._messages = messages

    def read(self) -> None:
        """Reads the records of anneals, for the beginning of a fit.

        Raises:
            ValueError: If the file holds something else.
        """
        if self._anneals is not None:
            self._anneals.read()

    def learn(self, values: StableValidation, losses: Collection[str], may_write: bool) -> None:
        """Takes note of a validation, and predicts anew.

        Args:
            values: What it found.
            losses: Metrics where less is better.
            may_write: Whether this process adds to the records of anneals what this run knows of them.
        """
        self.history.append(values)
        if self._anneals is not None:
            if problem := self._anneals.update(self.history, may_write):
                self._messages.warn(f"the records of anneals were left alone: {problem}", "records")
            self.predictions = self._predict(self._anneals, losses)

    def _predict(self, anneals: AnnealCalibration, losses: Collection[str]) -> dict[str, Prediction]:
        predictions = {}
        for metric in self.history[-1].merged:
            now = self.history[-1]
            # The prior is about losses, of runs in which the merge was better than the live model.
            if anneals.source == PRIOR and not (metric in losses and now.merged[metric] < now.live[metric]):
                continue
            if (basis := anneals.basis(self.history, metric)) is not None:
                predictions[metric] = basis.predict(self.history[-1], metric)
                self._messages.say(f"{self._names('annealed', metric)} predicts {basis}", f"annealed {metric}")
        if not predictions and anneals.source != PRIOR:
            self._messages.say(f"uncalibrated until {anneals.source} holds two real anneals of a kind", "uncalibrated")
        return predictions

    def predicted(self, live: Mapping[str, LoggedValue], *, is_end_of_decay: bool) -> dict[LoggedName, LoggedValue]:
        """What to log of the predictions.

        Args:
            live: Values of the validation.
            is_end_of_decay: Whether the run has decayed by itself and ends here: then also how wrong they were.
        """
        logged: dict[LoggedName, LoggedValue] = {}
        self.is_checked = is_end_of_decay
        for metric, prediction in self.predictions.items():
            name = self._names("annealed", metric)
            ends = zip(("", *BOUNDS), (prediction.value, prediction.low, prediction.high), strict=True)
            numbers = {replace(name, end=end): value for end, value in ends}
            if is_end_of_decay and metric in live:
                numbers[replace(name, kind="annealed_error")] = prediction.value - float(live[metric].value)
            is_written = metric not in live or live[metric].logger
            logged |= {n: LoggedValue(torch.tensor(value), logger=is_written) for n, value in numbers.items()}
        if self._anneals is not None and self._anneals.source == PRIOR and self.predictions:
            logged[self._names("merge", "is_prior")] = LoggedValue(torch.tensor(1.0))
        return logged

    def forecast(self, metric: str, span_steps: int) -> Prediction:
        """The value after a linear decay that begins now.

        Raises:
            RuntimeError: If there are no records of real anneals, or too few, or too few validations so far.
        """
        anneals = self._anneals
        found = anneals.forecast(self.history, metric, span_steps) if anneals and self.history else None
        if found is None:
            calibration = anneals.source if anneals else None
            raise RuntimeError(
                f"no forecast of {metric!r} after {span_steps} steps: it needs two real anneals in calibration="
                f"{calibration!r} and four validations of the merge in the last half of the steps,"
                f" of which there are {len(self.history)} in all"
            )
        return found

    def curvature_gain(self, metric: str, coefficients: Mapping[int, float], step: int) -> float | None:
        """`prediction.curvature_gain` at this step, where each snapshot was validated when it was the live model."""
        if not self.history or self.history[-1].step != step or metric not in self.history[-1].merged:
            return None
        losses = {known.step: known.live[metric] for known in self.history if metric in known.live}
        return curvature_gain(coefficients, losses, self.history[-1].merged[metric])

    def forget_since(self, step: int) -> None:
        """Drops what validations at that step and later ones have found."""
        self.history = [known for known in self.history if known.step < step]

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [asdict(values) for values in self.history],
            "predictions": {metric: asdict(prediction) for metric, prediction in self.predictions.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave; predictions only if there still is something to predict from."""
        self.history = [StableValidation(**values) for values in state["history"]]
        if self._anneals is not None:
            self.predictions = {metric: Prediction(**kept) for metric, kept in state["predictions"].items()}
