"""One training run as `MergeCallback` sees it: captured weights, merges, and validations of the merges."""

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from merge_callback.callbacks.explanations import explain_costs, explain_phase
from merge_callback.capture.merge_set import MergeSet
from merge_callback.capture.phase import RateUpdates
from merge_callback.capture.state import (
    STATE_FORMAT,
    TensorReader,
    capture_state,
    captured_tensors,
    put_into_checkpoint,
    restore_capture_,
)
from merge_callback.checkpoints.write import save, weights_checkpoint
from merge_callback.live.batch_norm import Recalibration
from merge_callback.live.learning_rates import are_updates_over, learning_rates, optimizer_step, rate_updates
from merge_callback.live.observe import validation_follows
from merge_callback.live.sharding import as_in, export_copy, local_clones, reshard
from merge_callback.live.swap import overwrite_
from merge_callback.live.weights import tensors_by_name
from merge_callback.merging.rules import Rule, merge_coefficients
from merge_callback.utilities.messages import Messages
from merge_callback.validation.merged_validation import MergedValidation

# The modules in which Lightning defines hooks that do nothing.
_EMPTY_HOOKS = ("lightning.pytorch.core.hooks", "pytorch_lightning.core.hooks")


class MergeSession:
    """One run, which may be fresh, resumed from a checkpoint, or continued by another fit of the same module.

    `MergeCallback` makes a new session for each fit that does not continue the previous one.

    Args:
        merges: The user's merges, with the capture that they are made from.
        recalibration: Recalibrates batch norm statistics of merges.
        validation: Validates the merges.
        messages: Logs infos and warnings for the user.
    """

    def __init__(
        self, merges: MergeSet, recalibration: Recalibration, validation: MergedValidation, messages: Messages
    ) -> None:
        self.merges = merges
        self.capture = merges.capture
        self.validation = validation
        self.module: LightningModule | None = None
        self.step = 0
        self._recalibration = recalibration
        self._messages = messages
        # Learning rates of the step in progress, and how often the schedulers had set them.
        self._rates: list[float] = []
        self._updates: list[int] = []

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
        step, is_new = optimizer_step(trainer), self.module is None
        self.module, self.step = pl_module, step
        if is_new:
            self._recalibration.check(pl_module)
            self.capture.num_local_processes = trainer.num_devices
            self.capture.prepare(pl_module)
        self._messages.begin()
        self._recalibration.begin(trainer)
        if state is not None:
            self._load(state, trainer, pl_module)
        elif is_new and step > 0:
            self._messages.warn("the checkpoint holds no state of it, so the window starts empty", "resumed")
        for problem in self.validation.predictions.predictor.read():
            self._messages.warn(f"left out of the records: {problem}", problem)
        names = ", ".join(merge.name for merge in self.merges)
        self._messages.say(f"{self.capture.describe()}; merges: {names}", "start")

    def before_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Records the learning rates and the inputs of a training batch."""
        self._rates, self._updates = learning_rates(trainer.optimizers), rate_updates(trainer)
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
        self._capture(trainer, pl_module)
        # The module's own hook comes next and may write to the weights, for example to clip them. So may other
        # callbacks around a validation or at the end of an epoch, for example to average weights.
        is_own_hook = pl_module.on_train_batch_end.__module__ not in _EMPTY_HOOKS
        if is_own_hook or is_validated or trainer.is_last_batch:
            self.capture.finish()
        waited = self.capture.waited_seconds - waited_before
        self.validation.budget.spend(time.perf_counter() - began - waited)
        explain_phase(self.merges, self._messages, self.step, trainer)
        explain_costs(self.capture, self._messages, trainer)

    def _capture(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_over = not self.capture.window.phase.is_stable and are_updates_over(trainer)
        updates = RateUpdates(self._updates, rate_updates(trainer), is_over)
        self.capture.after_step(pl_module, self.step, self._rates, learning_rates(trainer.optimizers), updates)

    def end(self, trainer: Trainer) -> None:
        """Ends the training: tells the user what was not captured or not checked, and closes."""
        self.capture.averages.wait()
        self.capture.kind.wait()
        explain_phase(self.merges, self._messages, self.step, trainer, is_end=True)
        window, predictions = self.capture.window, self.validation.predictions
        if not self.merges.are_any_ready and window.phase.is_stable:
            due = window.start if window.start != "stable" else window.schedule.next_step
            self._messages.say(f"nothing was captured in {self.step} steps; the first is due at step {due}", "nothing")
        if predictions.are_any and not window.phase.is_stable and not predictions.is_checked:
            self._messages.warn(
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
        tensors = {} if self.capture.sharding.is_sharded else {t.key: t.part for t in captured_tensors(self.capture)}
        capture = capture_state(self.capture)
        self.merges.warn_of_unusable(capture["problems"])
        return {
            "format": STATE_FORMAT,
            "step": self.step,
            "rates": self._rates,
            "updates": self._updates,
            "capture": capture,
            "tensors": tensors,
            "inputs": inputs,
            "proven_rules": sorted(self.merges.proven_rules),
            **self.validation.state_dict(),
        }

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
        if state.get("format") != STATE_FORMAT:
            self._messages.warn(
                f"the checkpoint's state has format {state.get('format', 1)}, and this version reads format"
                f" {STATE_FORMAT}. Nothing of it is used: window, averages, validation count and predictions start"
                " anew. Checkpoints of version 0.1.0 have format 1",
                "resumed",
            )
            return
        reader = TensorReader(state["tensors"], self.capture.sharding, trainer.ckpt_path)
        if changes := restore_capture_(self.capture, state["capture"], pl_module, reader):
            self._messages.warn(f"resumed, but {'; '.join(changes)}", "resumed")
        if state["inputs"] is not None:
            self._recalibration.inputs.load_state_dict(state["inputs"], pl_module.device)
        self.merges.proven_rules = set(state["proven_rules"])
        self.validation.load_state_dict(state)
        if state["step"] < self.step:
            # A callback earlier in the list saved the checkpoint before this one had seen the step.
            self._rates, self._updates = state["rates"], state["updates"]
            self._capture(trainer, pl_module)

    # Called by users, through `MergeCallback`.

    def merged_state_dict(self, name: str | None) -> dict[str, Any]:
        """Returns the state dict of the module under a merge, as copies."""
        self.merges.captured(name)
        assert self.module is not None
        with self.merges.merged_weights(self.module, name):
            state = self.module.state_dict()
            return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in state.items()}

    def save_merged(self, path: str | os.PathLike[str], name: str | None) -> None:
        """Writes a merge to a file; see `MergeCallback.save_merged`."""
        merge = self.merges.captured(name)
        assert self.module is not None
        with self.merges.merged_weights(self.module, name):
            # Copies in host memory, so that the GPU holds no second merge beside the one that is swapped in.
            state = {k: export_copy(v) if isinstance(v, Tensor) else v for k, v in self.module.state_dict().items()}
        save(path, weights_checkpoint(self.module, state, self.step), merge.provenance())

    # Called by callbacks that change the training.

    def forget_since(self, step: int, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Drops snapshots and validations from a step on, and all inputs kept for batch norm. Averages restart.

        Args:
            step: The first step to forget.
            buffers: Floating-point buffers at the newest remaining snapshot; None keeps the current ones.
        """
        self.capture.forget_since(step)
        if buffers:
            self.capture.buffers = local_clones(buffers)
        self._recalibration.inputs.clear()
        self.validation.predictions.forget_since(step)

    def put_into_(
        self, pl_module: torch.nn.Module, rule: str | Rule, steps: Sequence[int], buffers: Mapping[str, Tensor]
    ) -> None:
        """Writes a merge of snapshots into the live model permanently: training continues from it.

        Args:
            pl_module: The module that is trained.
            rule: Rule of the merge.
            steps: Steps of the snapshots to merge, which follow each other in the ring.
            buffers: Name -> value of floating-point buffers.
        """
        assert self.capture.ring is not None
        assert self.capture.layout is not None
        first = self.capture.steps.index(steps[0])
        last = first + len(steps)
        values = [0.0] * len(self.capture.steps)
        values[first:last] = merge_coefficients(rule, self.capture.covered[first:last])
        row = self.capture.ring.combine(values)
        merged = self.capture.layout.views(row)
        self.capture.finish()
        live = tensors_by_name(pl_module, [*merged, *buffers])
        overwrite_(live, as_in(live, merged) | dict(buffers), before=partial(reshard, pl_module))
