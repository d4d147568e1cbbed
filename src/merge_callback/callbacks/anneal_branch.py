"""`AnnealBranch`: a real learning-rate decay from a checkpoint of a stable run, recorded beside that run's merges."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from merge_callback.callbacks.merge_callback import MergeCallback
from merge_callback.callbacks.pickling import PickledWithoutItsRun
from merge_callback.checkpoints.stable_run import METADATA, stable_run_in_file
from merge_callback.live.evaluate import LoggedValue
from merge_callback.live.learning_rates import RateOverlay, learning_rates, optimizer_step
from merge_callback.live.observe import observe_validations, stop_observing_validations
from merge_callback.merging.decays import DECAY_SHAPES
from merge_callback.prediction.forecasts import steps_of
from merge_callback.prediction.records import (
    AnnealRecord,
    StableValidation,
    append_record,
    completed,
    stable_run_in_checkpoint,
)
from merge_callback.utilities.calls import ShownAsItsCall
from merge_callback.utilities.checks import check_count
from merge_callback.utilities.locations import local_path
from merge_callback.validation.closing import Decayed


class AnnealBranch(ShownAsItsCall, PickledWithoutItsRun):
    """Anneals: turns a run resumed from a checkpoint of a stable run into a branch whose rate decays to zero.

    At every optimizer step the rates of the run's own schedulers are multiplied by the shape's value: one at the first
    step, zero after the last. At the end the branch is validated and recorded, and stops. Outside optimizer steps the
    rates stay those of the schedulers, so a run that continues from the branch has them back. Training data continue
    where the stable run stopped, if the loader can resume.

    The branch reads from the checkpoint's `MergeCallback` state which run it comes from, and that run's validations. Of
    several callbacks, that with ``calibration=record`` counts, else the first one.

    Args:
        span_steps: Length of the decay in optimizer steps.
        shape: ``"linear"``, ``"1-sqrt"`` or ``"cosine"``.
        span: Instead of ``span_steps``: length as a share of all steps up to the end of the branch, in (0, 1).
        record: File to which a line is appended at the end; many branches may share one. None records nothing.
        trunk: A later checkpoint of the same stable run. If that run was validated where the branch ends, the record
            is complete at once. Otherwise the run completes it if it has ``MergeCallback(calibration=record)``.

    Raises:
        ValueError: If an argument is invalid; at the start of the fit if the decay does not fit into the run, an
            optimizer has no rate, or there is no validation to record.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from merge_callback import AnnealBranch, MergeCallback
        >>> branch = AnnealBranch(span_steps=1000, shape="1-sqrt", record="anneals.jsonl")
        >>> callbacks = [MergeCallback(), branch]  # Trainer(callbacks=callbacks).fit(model, ckpt_path="step=9000.ckpt")
    """

    def __init__(
        self,
        span_steps: int | None = None,
        shape: str = "linear",
        *,
        span: float | None = None,
        record: str | os.PathLike[str] | None = None,
        trunk: str | os.PathLike[str] | None = None,
    ) -> None:
        if (span_steps is None) == (span is None):
            raise ValueError(f"AnnealBranch takes exactly one of span_steps and span, got {span_steps} and {span}")
        if span_steps is not None:
            check_count("span_steps", span_steps)
        if span is not None and not (isinstance(span, float) and 0 < span < 1):
            raise ValueError(f"span must be a share of the steps in (0, 1), got {span!r}")
        if not isinstance(shape, str) or shape not in DECAY_SHAPES:
            raise ValueError(f"shape must be one of {', '.join(DECAY_SHAPES)}, got {shape!r}")
        for name, path in (("record", record), ("trunk", trunk)):
            if path is None:
                continue
            if not isinstance(path, str | os.PathLike):
                raise TypeError(f"{name} must be the path of a file, got {path!r}")
            local = local_path(name, path)
            if local.is_dir() and not (name == "trunk" and (local / METADATA).exists()):
                raise ValueError(f"{name} must be the path of a file, but {str(path)!r} is a folder")
        self.span_steps = span_steps
        self.shape = shape
        self.span = span
        self.record = record
        self.trunk = trunk
        self.begin_anew()

    def begin_anew(self) -> None:
        self._start_step: int | None = None
        self._end_step = 0
        self._loaded_start: int | None = None
        self._run: str | None = None
        self._history: list[StableValidation] = []
        self._overlay: RateOverlay | None = None
        self._first_rates: list[float] = []
        self._annealed: dict[str, float] | None = None
        # The trainer's `check_val_every_n_epoch` and `min_epochs`, from the end of the decay to that of the fit.
        self._set_aside: tuple[int | None, int | None] | None = None
        self._has_begun = self._is_finished = self._is_recorded = False

    def multiplier(self, step: int) -> float:
        """Returns the factor on the rates of the optimizer step that follows ``step`` steps; one before the branch."""
        if self._start_step is None or step <= self._start_step:
            return 1.0
        share = (step - self._start_step) / (self._end_step - self._start_step)
        return DECAY_SHAPES[self.shape](min(1.0, share))

    # Hooks, called by Lightning.

    @property
    def state_key(self) -> str:
        return self._generate_state_key(span_steps=self.span_steps, span=self.span, shape=self.shape)

    def state_dict(self) -> dict[str, Any]:
        return {"start_step": self._loaded_start if self._start_step is None else self._start_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded_start = state_dict["start_step"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._run, self._history = stable_run_in_checkpoint(checkpoint, self._calibrated(trainer))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.begin_anew()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_begun = True
        start = optimizer_step(trainer) if self._loaded_start is None else self._loaded_start
        span_steps = self.span_steps or _span_steps(start, self.span or 0.0)
        end = start + span_steps
        self._check(trainer, end, span_steps)
        if self.trunk is not None:
            self._run, self._history = self._later_stable_run(self.trunk, self._calibrated(trainer))
        self._start_step, self._end_step, self._annealed = start, end, None
        self._first_rates = learning_rates(trainer.optimizers)
        self._overlay = RateOverlay(trainer.optimizers, lambda: self.multiplier(optimizer_step(trainer)))
        observe_validations(trainer, self)
        if self.record is not None and self._run is None:
            rank_zero_warn(
                "AnnealBranch: the checkpoint holds no validation of a MergeCallback, so the stable run of this branch"
                " is unknown and its record calibrates nothing"
            )
        rank_zero_info(f"AnnealBranch: {self.shape} decay over {span_steps} steps, from step {start} to step {end}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Learning-rate monitors read outside the steps and show the schedulers' own rates, so log the factor on them.
        if not trainer.barebones:
            multiplier = self.multiplier(optimizer_step(trainer))
            pl_module.log("anneal/multiplier", multiplier, on_step=True, on_epoch=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = optimizer_step(trainer)
        assert self._overlay is not None
        assert self._start_step is not None
        if step > self._start_step and not self._overlay.num_steps:
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise RuntimeError(f"the rates could not be multiplied: {names} did not call the hooks around its step")
        if step >= self._end_step and not self._is_finished:
            # Lightning validates when it is asked to stop, but only in epochs that have a validation, and it does not
            # stop before `min_epochs`.
            self._set_aside = (trainer.check_val_every_n_epoch, trainer.fit_loop.min_epochs)
            if trainer.check_val_every_n_epoch is not None:
                trainer.check_val_every_n_epoch = 1
            trainer.fit_loop.min_epochs = 0
            trainer.should_stop = self._is_finished = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._annealed is None or self._start_step is None or self.record is None or self._is_recorded:
            return
        self._is_recorded = True
        if not trainer.is_global_zero:
            return
        span_steps = self._end_step - self._start_step
        record = AnnealRecord(
            run=self._run or f"checkpoint {trainer.ckpt_path}",
            start_step=self._start_step,
            # May lie beyond the planned end: with manual optimization a batch may take more than one step.
            step=optimizer_step(trainer),
            span_steps=span_steps,
            shape=self.shape,
            annealed=self._annealed,
        )
        append_record(self.record, completed(record, self._history))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove(trainer)
        if not self._is_finished:
            rank_zero_warn(
                f"AnnealBranch: the run ended at step {optimizer_step(trainer)}, before the end of the decay at step"
                f" {self._end_step}, so nothing was recorded"
            )
        elif self.record is not None and not self._is_recorded:
            rank_zero_warn(
                "AnnealBranch: the validation at the end of the decay logged nothing, so nothing was recorded"
            )
        if self._is_finished:
            self._tell(trainer)
        if self._is_finished and (rates := learning_rates(trainer.optimizers)) != self._first_rates:
            rank_zero_warn(
                f"AnnealBranch: the run's own schedule moved the rates from {self._first_rates} to {rates} while they"
                f" decayed, so this was no plain {self.shape} decay"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._has_begun = True
        self._remove(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove(trainer)
        if stage == "fit" and not self._has_begun:
            rank_zero_warn(
                "AnnealBranch: nothing was annealed, because the run was over before it began:"
                f" max_steps={trainer.max_steps}, max_epochs={trainer.max_epochs}"
            )

    def _tell(self, trainer: Trainer) -> None:
        """Says what the decay came to, beside the stable run before it, unless a `MergeCallback` says it."""
        before = [each for each in self._history if each.step <= (self._start_step or 0)]
        others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        is_said = any(isinstance(each, MergeCallback) and each.session.predictions.decayed for each in others)
        if not self._annealed or not before or is_said:
            return
        if text := Decayed(before[-1], optimizer_step(trainer), self._annealed).describe():
            rank_zero_info(f"AnnealBranch: {text}")

    # Called by validations, after `observe_validations`.

    def before_validation(self, trainer: Trainer) -> None:
        """Does nothing: the branch is validated with its live weights."""

    def after_validation(self, trainer: Trainer, live: Mapping[str, LoggedValue]) -> dict[str, LoggedValue]:
        """Keeps the values of the validation at the end of the decay."""
        if self._is_finished and live:
            self._annealed = {name: float(logged.value) for name, logged in live.items()}
        return {}

    # Implementation.

    def _check(self, trainer: Trainer, end: int, span_steps: int) -> None:
        planned = f"a decay over {span_steps} steps ends at step {end}"
        num_optimizers = max(1, len(trainer.optimizers))
        if trainer.max_steps != -1 and trainer.max_steps < end * num_optimizers:
            raise ValueError(f"{planned}, but max_steps={trainer.max_steps} stops the run before")
        if trainer.min_steps is not None and trainer.min_steps > end * num_optimizers:
            raise ValueError(f"{planned}, but min_steps={trainer.min_steps} keeps the run going")
        if self.record is not None and not trainer.enable_validation:
            raise ValueError(f"record={str(self.record)!r} needs a validation, and this run has none")
        if optimizer_step(trainer) >= end:
            raise ValueError(f"{planned}, but this checkpoint is already there: the branch has ended")

    def _calibrated(self, trainer: Trainer) -> str | None:
        """Returns the key of the state of the callback that reads the record; None if there is none."""
        if self.record is None:
            return None
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        read = {each.state_key: each.calibration for each in callbacks if isinstance(each, MergeCallback)}
        record = Path(self.record).absolute()
        return next((key for key, path in read.items() if path is not None and Path(path).absolute() == record), None)

    def _later_stable_run(
        self, path: str | os.PathLike[str], callback: str | None
    ) -> tuple[str | None, list[StableValidation]]:
        run, history = stable_run_in_file(Path(path), f"trunk={str(path)!r}", callback)
        is_same = run is not None and self._run in (None, run)
        if not is_same or len(history) < len(self._history):
            raise ValueError(f"trunk={str(path)!r} is not a later checkpoint of the run that this branch comes from")
        return run, history

    def _remove(self, trainer: Trainer) -> None:
        stop_observing_validations(trainer, self)
        if self._overlay is not None:
            self._overlay.remove()
            self._overlay = None
        if self._set_aside is not None:
            trainer.check_val_every_n_epoch, trainer.fit_loop.min_epochs = self._set_aside
            self._set_aside = None


def _span_steps(start: int, span: float) -> int:
    if start == 0:
        raise ValueError(f"span={span} is a share of the steps so far, but the run begins at step 0; give ckpt_path")
    return steps_of(span, start)
