"""What `MergeCallback` and `Merger` share: which merges are made of which weights, and questions about them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from merge_callback.callbacks import arguments
from merge_callback.callbacks.parts import Parts
from merge_callback.callbacks.session import MergeSession
from merge_callback.capture.capture import SnapshotCapture
from merge_callback.capture.directory import SnapshotDirectory
from merge_callback.capture.merge_set import MergeSet
from merge_callback.capture.merges import AverageMerge, Merge, WindowMerge
from merge_callback.capture.places import SnapshotMemory
from merge_callback.capture.window import Start
from merge_callback.live.batch_norm import Recalibration
from merge_callback.merging.averages import Average, is_average
from merge_callback.merging.rules import Rule
from merge_callback.prediction.bias import Prediction
from merge_callback.prediction.forecasts import Forecaster
from merge_callback.prediction.predictor import AnnealPredictor
from merge_callback.utilities.calls import ShownAsItsCall
from merge_callback.utilities.checks import check_count, patterns
from merge_callback.utilities.messages import Messages
from merge_callback.validation.logged import Names
from merge_callback.validation.predictions import LoggedPredictions


class MergesOfARun(ShownAsItsCall):
    """Merges of the weights of one run after another. The arguments are those of `MergeCallback`.

    Raises:
        ValueError: If an argument has an invalid value; the message names both.
        TypeError: If an argument has another type than described.
    """

    _session: MergeSession
    # What uses such an object.
    _RUN = "loop"
    # Where another object may be that was used instead.
    _COPIES = ""
    _ELSEWHERE = {  # noqa: RUF012
        "decay": "for an average over every step write merges=Ema(half_life_steps=...), where a decay of d a step is a"
        " half-life of log(0.5) / log(d) steps",
        "monitor": "to keep the best merges write MergedCheckpoint(callback, monitor='merged/val_loss')",
    }

    def __init__(
        self,
        every_n_train_steps: int | None,
        num_snapshots: int,
        merges: str | Rule | Average | Mapping[str, str | Rule | Average],
        *,
        snapshot: Literal["point", "mean"],
        mean_samples: int | None,
        start: Start,
        storage: str | SnapshotMemory | SnapshotDirectory | os.PathLike[str],
        dtype: torch.dtype | str | None,
        calibration: str | os.PathLike[str] | None,
        forecast: float | int | None,
        higher_is_better: str | Sequence[str],
        parts: str | Parts | Sequence[str],
        name: str,
    ) -> None:
        check_count("num_snapshots", num_snapshots)
        arguments.check_start(start)
        arguments.check_calibration(calibration)
        arguments.check_length("forecast", forecast)
        arguments.check_name(name)
        self.every_n_train_steps = every_n_train_steps
        self.num_snapshots = num_snapshots
        self.merges = arguments.named_merges(merges)
        self.snapshot: Literal["point", "mean"] = snapshot
        self.mean_samples = mean_samples
        self.start = start
        self.storage = arguments.snapshot_place(storage)
        arguments.snapshot_kind(snapshot, mean_samples, self.storage)
        self.dtype = arguments.floating_dtype(dtype)
        self.calibration = calibration
        self.forecast_length = forecast
        self.higher_is_better = patterns("higher_is_better", higher_is_better)
        self.parts = arguments.parts_to_merge(parts)
        self.name = name

    @property
    def snapshot_steps(self) -> list[int]:
        """Optimizer steps of the snapshots in the ring, oldest first."""
        return self._session.capture.steps

    def coefficients(self, name: str | None = None) -> dict[int, float]:
        """Returns the coefficients of a merge by snapshot step, oldest first; they sum to one.

        Args:
            name: Name of the merge; None is the primary one.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If no merge has this name, or it is an average over every step, which has no coefficients.
        """
        return self.captured_merges().coefficients(name)

    def implied_decay(self, name: str | None = None) -> list[tuple[int, float]]:
        """Returns the learning-rate decay that a merge corresponds to: (snapshot step, multiplier), oldest first.

        A multiplier applies to the updates since the previous snapshot. Raises the same errors as `coefficients`.
        """
        return self.captured_merges().implied_decay(name)

    @contextmanager
    def merged_weights(self, pl_module: nn.Module, name: str | None = None) -> Iterator[None]:
        """Swaps the merge into a module inside the context; afterwards always restores the module's own weights.

        Args:
            pl_module: The module that was trained, or another of the same architecture.
            name: Name of the merge; None is the primary one.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If no merge has this name, it cannot be made, or the module's tensors do not match it.
        """
        with self.captured_merges().merged_weights(pl_module, name):
            yield

    def forecast(
        self,
        metric: str,
        span_steps: int | None = None,
        *,
        span: float | None = None,
        shape: str = "linear",
        final_rate: float = 0.0,
    ) -> Prediction:
        """Forecasts a loss at the end of a decay that begins at the latest validation; needs no real anneal.

        `merge_callback.prediction.river` says how. Real anneals of this run in ``calibration`` shift it.

        Args:
            metric: Name of a metric of the validation where less is better.
            span_steps: Length of the decay in optimizer steps.
            span: Instead: length as a share of all steps at the end of the decay, in (0, 1). None takes ``forecast``.
            shape: ``"linear"``, ``"1-sqrt"`` or ``"cosine"``.
            final_rate: Share of the rate at the end of the decay.

        Returns:
            The value in the metric's unit, with the interval that should contain it in nine cases of ten.

        Raises:
            RuntimeError: If nothing can be foretold; the message says why.
            ValueError: If an argument is invalid.
        """
        length = arguments.decay_length(span_steps, span, self.forecast_length)
        arguments.check_shape(shape, final_rate)
        return self._session.predictions.forecast(metric, length, shape, final_rate).prediction

    def captured_merges(self) -> MergeSet:
        """Returns the merges of a run; raises RuntimeError if no run has used this object."""
        if self._session.module is None:
            who = f"no {self._RUN} has used this {type(self).__name__} object"
            raise RuntimeError(f"nothing was captured yet: {who}{self._COPIES}")
        return self._session.merges

    # For the building of sessions.

    def _new_merges(self, recalibration: Recalibration, messages: Messages) -> MergeSet:
        """Returns the merges, with a capture that has seen nothing yet."""
        averages = {name: merge for name, merge in self.merges.items() if is_average(merge)}
        rules = {name: merge for name, merge in self.merges.items() if not is_average(merge)}
        capture = SnapshotCapture(
            self.every_n_train_steps,
            self.num_snapshots,
            rules.values(),
            self.start,
            self.dtype,
            kind=arguments.snapshot_kind(self.snapshot, self.mean_samples, self.storage),
            storage=self.storage,
            name=self.name,
            averages=averages,
            selection=self.parts.selection,
        )
        made: dict[str, Merge] = {name: WindowMerge(name, rule, capture) for name, rule in rules.items()}
        made |= {name: AverageMerge(name, average, capture) for name, average in averages.items()}
        return MergeSet([made[name] for name in self.merges], capture, recalibration, messages)

    def _new_predictions(self, merges: MergeSet, names: Names, messages: Messages) -> LoggedPredictions:
        predictor, forecaster = AnnealPredictor(self.calibration), Forecaster(self.forecast_length)
        return LoggedPredictions(merges, names, predictor, forecaster, messages)

    def _new_names(self, merges: MergeSet) -> Names:
        return Names(self.name, merges.primary, self.higher_is_better)
