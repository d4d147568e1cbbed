"""`MergedCheckpoint`: Lightning's `ModelCheckpoint`, with merged weights in its files."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from merge_callback.callbacks.merge_callback import MergeCallback
from merge_callback.callbacks.pickling import PickledWithoutItsRun
from merge_callback.live.learning_rates import learning_rates, optimizer_step
from merge_callback.utilities.calls import ShownAsItsCall


class _NotSavedError(Exception):
    """There is no merge, or its file cannot be written."""


class MergedCheckpoint(ShownAsItsCall, PickledWithoutItsRun, ModelCheckpoint):
    """A `ModelCheckpoint` that saves merged weights, and can keep the best ones by a merged metric.

    Its files are those of `MergeCallback.save_merged`: weights with provenance, but no optimizer. To resume a run, add
    a plain `ModelCheckpoint` beside it. While there is no merge yet, nothing is saved, without a warning. If a file
    cannot be written, a warning names it and training goes on. Earlier files, and what is known to be best, then stay
    as they were.

    A merge is ranked only by a value of its own step: between validations, saving waits for the next one.

    With ``at="stable_end"`` it saves one file for each constant learning rate: when the rate moves, so a decay or
    another rate begins, or when the run ends. The merge is the last one that was made at that rate.

    List it after its `MergeCallback`. `lightning.pytorch` puts it there by itself; `pytorch_lightning` does not.

    Args:
        merge_callback: Makes the merges.
        merge: Name of the merge to save; None is the primary one.
        at: ``"stable_end"`` saves when a constant rate ends; None saves when ``arguments`` say.
        **arguments: Arguments of `ModelCheckpoint`, such as ``monitor="merged/val_loss"`` and ``save_top_k=3``.

    Raises:
        TypeError: If ``merge_callback`` is not a `MergeCallback`.
        ValueError: If it has no merge with this name, or ``at`` is something else or comes with a ``monitor``.

    Examples:
        >>> from merge_callback import MergeCallback, MergedCheckpoint
        >>> merging = MergeCallback()
        >>> callbacks = [merging, MergedCheckpoint(merging, monitor="merged/val_loss", filename="merged-{step}")]
    """

    _ELSEWHERE = {"name": "to save another merge than the first write merge='...'"}  # noqa: RUF012
    # Not the name that Lightning looks for: `ckpt_path="last"` must never find a merge.
    CHECKPOINT_NAME_LAST = "merged-last"
    # It waits for the value that it monitors, as `EarlyStopping(strict=False)` does.
    strict = False

    def __init__(
        self,
        merge_callback: MergeCallback,
        merge: str | None = None,
        *,
        at: Literal["stable_end"] | None = None,
        **arguments: Any,
    ) -> None:
        if not isinstance(merge_callback, MergeCallback):
            raise TypeError(f"merge_callback must be a MergeCallback, got {merge_callback!r}")
        if merge is not None and merge not in merge_callback.merges:
            raise ValueError(f"there is no merge called {merge!r}; there are: {', '.join(merge_callback.merges)}")
        if at not in (None, "stable_end"):
            raise ValueError(f"at must be 'stable_end' or None, got {at!r}")
        if at is not None and arguments.get("monitor") is not None:
            raise ValueError(f"at={at!r} saves one merge, whatever it is worth, so monitor must be None")
        defaults: dict[str, Any] = {"filename": "merged-{epoch}-{step}"}
        if at is not None:
            # Nothing of Lightning's own triggers, and no file takes the place of another.
            defaults = {"filename": "merged-stable-end-{step}", "every_n_epochs": 0, "save_top_k": -1}
        super().__init__(**(defaults | arguments))
        self.merge_callback = merge_callback
        self.merge = merge
        self.at = at
        self.begin_anew()

    def begin_anew(self) -> None:
        # Whether a merge is to be saved at the next validation, which tells what it is worth.
        self._is_due = False
        self._is_missing_said = False
        # With `at`: of how many constant rates the merge was saved.
        self._num_saved = 0

    @property
    def state_key(self) -> str:
        return f"{super().state_key}[{self.merge_callback.state_key}{self.merge or ''}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.merge_callback not in trainer.callbacks:  # type: ignore[attr-defined]
            raise ValueError("the MergeCallback that MergedCheckpoint was given must be in the Trainer's callbacks")
        if stage == "fit" and all(isinstance(callback, MergedCheckpoint) for callback in trainer.checkpoint_callbacks):
            rank_zero_warn(
                "MergedCheckpoint saves merges, which no run can be resumed from; add a ModelCheckpoint() for that."
            )

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        # Before the first step at another rate, whose snapshot may begin a new window.
        if self.at is not None:
            phase = self.merge_callback.session.capture.window.phase
            if phase.is_over_with(learning_rates(trainer.optimizers)):
                self._save_stable_end(trainer)
                self._num_saved = phase.num_begun

    def _save_stable_end(self, trainer: Trainer) -> None:
        """Saves the merge of the latest constant rate, unless that was done when it ended."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            # Lightning saves no checkpoints then.
            return
        session = self.merge_callback.session
        if session.capture.window.phase.num_begun > self._num_saved and session.merges[self.merge].is_ready:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._is_due and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # No validation follows any more.
        self._is_due = False
        with self._unchanged_without_a_file():
            super().on_exception(trainer, pl_module, exception)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        session = self.merge_callback.session
        step, name = optimizer_step(trainer), session.merges[self.merge].name
        is_evaluated, is_there = session.validation.evaluated_at(step, name), self.monitor in monitor_candidates
        self._is_due = self.monitor is not None and not (is_there and is_evaluated)
        if self._is_due and is_evaluated and not self._is_missing_said:
            self._is_missing_said = True
            there = ", ".join(sorted(key for key in monitor_candidates if key.startswith("merge"))) or "none"
            rank_zero_warn(
                f"MergedCheckpoint: {self.monitor!r} is not among the metrics of the validation at step {step}, so"
                f" nothing is saved until it is. Those of merges are: {there}"
            )
        if not self._is_due:
            with self._unchanged_without_a_file():
                super()._save_topk_checkpoint(trainer, monitor_candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # No validation follows any more.
        self._is_due = False
        super().on_train_end(trainer, pl_module)
        if self.at is not None:
            self._save_stable_end(trainer)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"is_due": self._is_due, "num_saved": self._num_saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._is_due, self._num_saved = state_dict.get("is_due", False), state_dict.get("num_saved", 0)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self._is_due:
            # The next validation saves both. Lightning would take this step for done.
            return
        with self._unchanged_without_a_file():
            super()._save_last_checkpoint(trainer, monitor_candidates)

    @contextmanager
    def _unchanged_without_a_file(self) -> Iterator[None]:
        """Takes back what Lightning has noted of a checkpoint that was then not saved. It removes files only later."""
        before = vars(self) | {"best_k_models": dict(self.best_k_models)}
        try:
            yield
        except _NotSavedError:
            vars(self).clear()
            vars(self).update(before)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        is_saved = self.merge_callback.session.merges[self.merge].is_ready
        if is_saved:
            try:
                self.merge_callback.save_merged(filepath, self.merge)
            except (OSError, ValueError) as error:
                rank_zero_warn(f"MergedCheckpoint: {error}. Training goes on.")
                is_saved = False
        # Only rank 0 writes the file of a whole model.
        if not trainer.strategy.reduce_boolean_decision(is_saved, all=True):
            raise _NotSavedError
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        # Lightning resolves `ckpt_path="last"` with this, and no run can be resumed from a merge.
        return set()
