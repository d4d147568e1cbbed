"""`AnnealBranch`: a real decay from a trunk's checkpoint, recorded beside what the trunk's merges said about it."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from merge_callback.live.evaluate import LoggedValue
from merge_callback.live.learning_rates import RateOverlay, learning_rates, optimizer_step
from merge_callback.live.observe import observe_validations, stop_observing_validations
from merge_callback.merging.rules import DECAY_SHAPES
from merge_callback.prediction.records import (
    AnnealRecord,
    StableValidation,
    append_record,
    completed,
    trunk_in_checkpoint,
)
from merge_callback.utilities.checks import check_count

# A checkpoint of shards is a folder, in which Lightning gives this name to what is no shard.
_METADATA = "meta.pt"


class AnnealBranch(Callback):
    """Turns a run that is resumed from a trunk's checkpoint into a branch whose learning rate decays to zero.

    At every optimizer step the rates that the run's own schedulers set are multiplied by the shape's value, one at the
    first step and zero after the last; at the end the branch is validated, recorded, and stops. Outside the steps the
    rates stay the schedulers' own, so that a run which continues from the branch has them back. Training data go on
    where the trunk's stood if the loader can resume.

    A branch knows its trunk by the `MergeCallback` state in the checkpoint, which holds the trunk's validations so far.

    Args:
        span_steps: Length of the decay in optimizer steps.
        shape: ``"linear"``, ``"1-sqrt"`` or ``"cosine"``.
        span: Instead of ``span_steps``: length as a share of all steps up to the end of the branch, in (0, 1).
        record: File to which a line is appended at the end; many branches may share one. None records nothing.
        trunk: A later checkpoint of the same trunk. If the trunk was validated where the branch ends, the record is
            complete at once. Otherwise a trunk that runs with ``MergeCallback(calibration=record)`` completes it.

    Raises:
        ValueError: If an argument makes no sense; at the start of the fit if the decay does not fit into the run, an
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
            if path is not None and not isinstance(path, str | os.PathLike):
                raise TypeError(f"{name} must be the path of a file, got {path!r}")
            if path is not None and Path(path).is_dir() and not (name == "trunk" and Path(path, _METADATA).exists()):
                raise ValueError(f"{name} must be the path of a file, but {str(path)!r} is a folder")
        self.span_steps = span_steps
        self.shape = shape
        self.span = span
        self.record = record
        self.trunk = trunk

        self._start_step: int | None = None
        self._end_step = 0
        self._loaded_start: int | None = None
        self._run: str | None = None
        self._history: list[StableValidation] = []
        self._overlay: RateOverlay | None = None
        self._first_rates: list[float] = []
        self._annealed: dict[str, float] | None = None
        self._check_val_every_n_epoch: int | None = None
        self._has_begun = self._is_finished = self._is_recorded = False

    def multiplier(self, step: int) -> float:
        """What the rates of the optimizer step after ``step`` steps are multiplied by; one before the branch."""
        if self._start_step is None or step <= self._start_step:
            return 1.0
        share = (step - self._start_step) / (self._end_step - self._start_step)
        return DECAY_SHAPES[self.shape](min(1.0, share))

    # What Lightning calls.

    @property
    def state_key(self) -> str:
        return self._generate_state_key(span_steps=self.span_steps, span=self.span, shape=self.shape)

    def state_dict(self) -> dict[str, Any]:
        return {"start_step": self._start_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded_start = state_dict["start_step"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._run, self._history = trunk_in_checkpoint(checkpoint)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded_start, self._run, self._history = None, None, []
        self._has_begun = self._is_finished = self._is_recorded = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_begun = True
        start = optimizer_step(trainer) if self._loaded_start is None else self._loaded_start
        span_steps = self.span_steps or _span_steps(start, self.span or 0.0)
        end = start + span_steps
        self._check(trainer, end, span_steps)
        if self.trunk is not None:
            self._run, self._history = self._later_trunk(self.trunk)
        self._start_step, self._end_step, self._annealed = start, end, None
        self._first_rates = learning_rates(trainer.optimizers)
        self._overlay = RateOverlay(trainer.optimizers, lambda: self.multiplier(optimizer_step(trainer)))
        observe_validations(trainer, self)
        if self.record is not None and self._run is None:
            rank_zero_warn(
                "AnnealBranch: the checkpoint holds no validation of a MergeCallback, so nobody will know what the"
                " trunk of this branch was, and its record calibrates nothing"
            )
        rank_zero_info(f"AnnealBranch: {self.shape} decay over {span_steps} steps, from step {start} to step {end}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # The rates outside the steps, and so what monitors of rates show, are the schedulers' own.
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
            # Lightning validates when it is asked to stop, in epochs that are validated at all.
            self._check_val_every_n_epoch = trainer.check_val_every_n_epoch
            if self._check_val_every_n_epoch is not None:
                trainer.check_val_every_n_epoch = 1
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
            # A batch of manual optimization may take more than one step.
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
        elif (rates := learning_rates(trainer.optimizers)) != self._first_rates:
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

    # What `evaluate.observe_validations` calls.

    def before_validation(self, trainer: Trainer) -> None:
        """Nothing: the branch is validated as it is."""

    def after_validation(self, trainer: Trainer, live: Mapping[str, LoggedValue]) -> dict[str, LoggedValue]:
        """Keeps the values of the validation at the end of the decay."""
        if self._is_finished and live:
            self._annealed = {name: float(logged.value) for name, logged in live.items()}
        return {}

    # How it does it.

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
            raise ValueError(f"{planned}, where this checkpoint is already: the branch has ended")

    def _later_trunk(self, path: str | os.PathLike[str]) -> tuple[str | None, list[StableValidation]]:
        run, history = _trunk_in_file(path)
        is_same = run is not None and self._run in (None, run)
        if not is_same or len(history) < len(self._history):
            raise ValueError(f"trunk={str(path)!r} is no later checkpoint of the run that this branch is from")
        return run, history

    def _remove(self, trainer: Trainer) -> None:
        stop_observing_validations(trainer, self)
        if self._overlay is not None:
            self._overlay.remove()
            self._overlay = None
        if self._check_val_every_n_epoch is not None:
            trainer.check_val_every_n_epoch = self._check_val_every_n_epoch
            self._check_val_every_n_epoch = None


def _span_steps(start: int, span: float) -> int:
    if start == 0:
        raise ValueError(f"span={span} is a share of the steps so far, but the run begins at step 0; give ckpt_path")
    return max(1, round(start * span / (1 - span)))


def _trunk_in_file(path: str | os.PathLike[str]) -> tuple[str | None, list[StableValidation]]:
    file = Path(path, _METADATA) if Path(path).is_dir() else Path(path)
    try:
        return trunk_in_checkpoint(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"trunk={str(path)!r} is no checkpoint that loads with weights_only=True: {error}") from error
