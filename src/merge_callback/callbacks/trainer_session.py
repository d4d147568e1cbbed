"""One run of a Lightning Trainer as `MergeCallback` sees it: a session, with validations of its merges."""

import os
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from merge_callback.callbacks.explanations import explain_costs, explain_phase
from merge_callback.callbacks.session import MergeSession
from merge_callback.capture.merge_set import MergeSet
from merge_callback.capture.phase import RateUpdates
from merge_callback.capture.state import TensorReader, captured_tensors, put_into_checkpoint
from merge_callback.checkpoints.write import save, weights_checkpoint
from merge_callback.live.batch_norm import Recalibration
from merge_callback.live.learning_rates import are_updates_over, learning_rates, optimizer_step, rate_updates
from merge_callback.live.observe import validation_follows
from merge_callback.live.sharding import export_copy
from merge_callback.utilities.messages import Messages
from merge_callback.validation.merged_validation import MergedValidation

# The modules in which Lightning defines hooks that do nothing.
_EMPTY_HOOKS = ("lightning.pytorch.core.hooks", "pytorch_lightning.core.hooks")


class TrainerSession(MergeSession):
    """A run of a Trainer. `MergeCallback` makes a new one for each fit that does not continue the previous one.

    Args:
        merges: The user's merges, with the capture that they are made from.
        recalibration: Recalibrates batch norm statistics of merges.
        validation: Validates the merges.
        messages: Logs infos and warnings for the user.
    """

    def __init__(
        self, merges: MergeSet, recalibration: Recalibration, validation: MergedValidation, messages: Messages
    ) -> None:
        super().__init__(merges, validation.predictions, messages)
        self.validation = validation
        self._recalibration = recalibration

    # Called by the hooks of `MergeCallback`, in Lightning's order.

    def is_continued_by(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Returns whether a fit continues this session: it has the same module and does not restart its step count."""
        return self.module is pl_module and self.step <= optimizer_step(trainer)

    def begin(self, trainer: Trainer, pl_module: LightningModule, state: Mapping[str, Any] | None) -> None:
        """Begins a fit.

        Args:
            trainer: The Trainer, before the first step of the fit.
            pl_module: The module that is trained, on its device.
            state: The state of a session from a checkpoint, to continue from; None if there is none.
        """
        if self.module is None:
            self._recalibration.check(pl_module)
        is_new = self.prepare(pl_module, optimizer_step(trainer), trainer.num_devices)
        self._recalibration.begin(trainer)
        if state is not None:
            self._load(state, trainer, pl_module)
        elif is_new and self.step > 0:
            self.messages.warn("the checkpoint holds no state of it, so the window starts empty", "resumed")
        self.announce()
        self._recalibration.explain(pl_module)

    def before_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Records the learning rates and the inputs of a training batch."""
        self.rates, self.updates = learning_rates(trainer.optimizers), rate_updates(trainer)
        self._recalibration.remember(pl_module, batch, is_saved=self.capture.storage.in_checkpoints)

    def after_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Captures weights, if the optimizers have stepped."""
        is_validated = validation_follows(trainer)
        self.validation.count.foresee(trainer, is_validated)
        step = optimizer_step(trainer)
        if step == self.step:
            return
        self.step = step
        began, waited_before = time.perf_counter(), self.capture.waited_seconds
        self._capture(trainer)
        # The module's own hook comes next and may write to the weights, for example to clip them. So may other
        # callbacks around a validation or at the end of an epoch, for example to average weights.
        is_own_hook = pl_module.on_train_batch_end.__module__ not in _EMPTY_HOOKS
        if is_own_hook or is_validated or trainer.is_last_batch:
            self.capture.finish()
        waited = self.capture.waited_seconds - waited_before
        self.validation.budget.spend(time.perf_counter() - began - waited)
        explain_phase(self.merges, self.messages, self.step, lambda: trainer.estimated_stepping_batches)
        self._explain_costs(trainer)

    def _capture(self, trainer: Trainer) -> None:
        is_over = not self.capture.window.phase.is_stable and are_updates_over(trainer)
        updates = RateUpdates(self.updates, rate_updates(trainer), is_over)
        self.capture_step(learning_rates(trainer.optimizers), updates)

    def _explain_costs(self, trainer: Trainer) -> None:
        if not self.messages.is_said("costs"):
            saved = [not getattr(each, "save_weights_only", False) for each in trainer.checkpoint_callbacks]
            optimizers = trainer.optimizers
            explain_costs(self.capture, self.messages, trainer.lightning_module, optimizers, is_saved=any(saved))

    def end(self, trainer: Trainer) -> None:
        """Ends the training: tells the user what was not captured or not checked, and closes."""
        self.capture.averages.wait()
        self.capture.kind.wait()
        explain_phase(self.merges, self.messages, self.step, lambda: 0, is_end=True)
        window, predictions = self.capture.window, self.predictions
        if not self.merges.are_any_ready and window.phase.is_stable:
            self.messages.say(
                f"nothing was captured in {self.step} steps; the first is due at step {window.first_due}", "nothing"
            )
        if predictions.are_any and not window.phase.is_stable and predictions.decayed is None:
            self.messages.warn(
                f"the run ended at step {self.step}, in a decay, without a validation there: its last prediction was"
                " not checked",
                "checked",
            )
        self.close(trainer)

    def close(self, trainer: Trainer) -> None:
        """Finishes copies under way, since the model may leave its device next, and ends the validations."""
        try:
            self.capture.finish()
        finally:
            self.validation.close(trainer)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is needed to continue as if there had been no interruption.

        Tensors are included by reference, except those of a sharded model; see `put_shards_into`.
        """
        inputs = self._recalibration.inputs.state_dict() if self.capture.storage.in_checkpoints else None
        return {**super().state_dict(), "inputs": inputs, **self.validation.state_dict()}

    def put_shards_into(self, checkpoint: dict[str, Any], state_key: str) -> None:
        """Adds the state of a sharded run to a checkpoint that all ranks are about to save; otherwise does nothing.

        Only rank 0 writes what `state_dict` returns, so the shards are saved beside those of the model.
        """
        if not self.capture.sharding.is_sharded:
            return
        self.capture.leave_out_unusable()
        state = self.state_dict()
        state["tensors"] = put_into_checkpoint(captured_tensors(self.capture), self.capture.sharding, checkpoint)
        checkpoint["callbacks"][state_key] = state

    def _load(self, state: Mapping[str, Any], trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.restore(state, TensorReader(state.get("tensors", {}), self.capture.sharding, trainer.ckpt_path)):
            return
        if state["inputs"] is not None:
            self._recalibration.inputs.load_state_dict(state["inputs"], pl_module.device)
        self.validation.load_state_dict(state)
        if state["step"] < self.step:
            # A callback earlier in the list saved the checkpoint before this one had seen the step.
            self.rates, self.updates = state["rates"], state["updates"]
            self._capture(trainer)

    def save_merged(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Writes a merge to a file; see `MergeCallback.save_merged`."""
        merge = self.merges.captured(name)
        module: Any = self.module
        with self.merges.merged_weights(module, name):
            # Copies in host memory, so that the GPU holds no second merge beside the one that is swapped in.
            state = {k: export_copy(v) if isinstance(v, Tensor) else v for k, v in module.state_dict().items()}
        save(path, weights_checkpoint(module, state, self.step), merge.provenance())

    def forget_since(self, step: int, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Also drops all inputs kept for batch norm."""
        super().forget_since(step, buffers)
        self._recalibration.inputs.clear()
