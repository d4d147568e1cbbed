"""One run of training as `MergeCallback` sees it: what was captured, its merges, and what validations found of them."""

import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from merge_callback.capture.merge_set import MergeSet
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
from merge_callback.live.learning_rates import learning_rates, optimizer_step
from merge_callback.live.observe import validation_follows
from merge_callback.live.sharding import export_copy, local_clones, reshard
from merge_callback.live.swap import overwrite_
from merge_callback.live.weights import tensors_by_name
from merge_callback.utilities.messages import Messages
from merge_callback.validation.merged_validation import MergedValidation

# Where Lightning defines hooks that do nothing.
_EMPTY_HOOKS = ("lightning.pytorch.core.hooks", "pytorch_lightning.core.hooks")


class MergeSession:
    """Lives as long as one run: fresh, resumed from a checkpoint, or continued by another fit of the same module.

    `MergeCallback` makes a new session when a run begins that does not go on with the one before.

    Args:
        merges: The user's merges, and the capture that they are made of.
        recalibration: Of batch norm statistics.
        validation: Of the merges.
        messages: For the user.
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
        # Learning rates that the step in progress uses.
        self._rates: list[float] = []

    # What hooks of `MergeCallback` hand on, in the order in which Lightning calls them.

    def is_continued_by(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether a fit goes on with this session: it is of the same module and does not count its steps anew."""
        return self.module is pl_module and self.step <= optimizer_step(trainer)

    def begin(self, trainer: Trainer, pl_module: LightningModule, state: Mapping[str, Any] | None) -> None:
        """Begins a fit.

        Args:
            trainer: At the first step of the fit.
            pl_module: The module that is trained, on its device.
            state: What a checkpoint holds of a session, to go on from; None if there is none.
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
        self.validation.predictor.read()
        names = ", ".join(merge.name for merge in self.merges)
        self._messages.say(f"{self.capture.describe()}; merges: {names}", "start")

    def before_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Takes note of the rates and the inputs of a training step."""
        self._rates = learning_rates(trainer.optimizers)
        self._recalibration.remember(pl_module, batch, is_saved=self.capture.storage.in_checkpoints)

    def after_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Captures, if the optimizers have stepped."""
        is_validated = validation_follows(trainer)
        self.validation.num_validations += is_validated
        step = optimizer_step(trainer)
        if step == self.step:
            return
        self.step = step
        began, waited_before = time.perf_counter(), self.capture.waited_seconds
        self.capture.after_step(pl_module, step, self._rates, learning_rates(trainer.optimizers))
        # The module's own hook comes next, and may write to the weights, as clipping them does; so may other callbacks
        # around a validation and at the end of an epoch, such as one that averages weights.
        is_own_hook = pl_module.on_train_batch_end.__module__ not in _EMPTY_HOOKS
        if is_own_hook or is_validated or trainer.is_last_batch:
            self.capture.finish()
        waited = self.capture.waited_seconds - waited_before
        self.validation.budget.spend(time.perf_counter() - began - waited)
        self._explain_phase(trainer)

    def end(self, trainer: Trainer) -> None:
        """The training is over: says what was not captured or not checked, and closes."""
        self.capture.averages.wait()
        self._explain_phase(trainer, is_end=True)
        window, predictor = self.capture.window, self.validation.predictor
        if not self.merges.are_any_ready and window.phase.is_stable:
            due = window.start if window.start != "stable" else window.schedule.next_step
            self._messages.say(f"nothing was captured in {self.step} steps; the first is due at step {due}", "nothing")
        if predictor.predictions and not window.phase.is_stable and not predictor.is_checked:
            self._messages.warn(
                f"the run ended at step {self.step}, in a decay, without a validation there: its last prediction was"
                " not checked",
                "checked",
            )
        self.close(trainer)

    def close(self, trainer: Trainer) -> None:
        """Leaves nothing under way: the model may be about to leave its device."""
        try:
            self.capture.finish()
        finally:
            self.validation.close(trainer)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on as if there had been no interruption.

        Tensors are there by reference; those of a sharded model are not, see `put_shards_into`.
        """
        inputs = self._recalibration.inputs.state_dict() if self.capture.storage.in_checkpoints else None
        tensors = {} if self.capture.sharding.is_sharded else {t.key: t.part for t in captured_tensors(self.capture)}
        return {
            "format": STATE_FORMAT,
            "step": self.step,
            "rates": self._rates,
            "capture": capture_state(self.capture),
            "tensors": tensors,
            "inputs": inputs,
            "proven_rules": sorted(self.merges.proven_rules),
            **self.validation.state_dict(),
        }

    def put_shards_into(self, checkpoint: dict[str, Any], state_key: str) -> None:
        """Adds the state of a sharded run to a checkpoint that all ranks are about to save; otherwise does nothing.

        Rank 0 alone writes what `state_dict` returns, so shards go where those of the model go.
        """
        if not self.capture.sharding.is_sharded:
            return
        self.merges.drop_unusable()
        state = self.state_dict()
        state["tensors"] = put_into_checkpoint(captured_tensors(self.capture), self.capture.sharding, checkpoint)
        checkpoint["callbacks"][state_key] = state

    def _load(self, state: Mapping[str, Any], trainer: Trainer, pl_module: LightningModule) -> None:
        if state.get("format") != STATE_FORMAT:
            self._messages.warn(
                f"the checkpoint's state has format {state.get('format', 1)}, and this version reads format"
                f" {STATE_FORMAT}: the window starts empty. Checkpoints of version 0.1.0 are of format 1",
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
            # Saved by a callback earlier in the list, before this one had seen the step.
            self.capture.after_step(pl_module, self.step, state["rates"], learning_rates(trainer.optimizers))

    # What a user asks of the merges.

    def merged_state_dict(self, name: str | None) -> dict[str, Any]:
        """The state dict of the module under a merge, as copies that can be exported."""
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
            # Beside the merge that is swapped in, a GPU need not hold another one.
            state = {k: export_copy(v) if isinstance(v, Tensor) else v for k, v in self.module.state_dict().items()}
        save(path, weights_checkpoint(self.module, state, self.step), merge.provenance())

    # What callbacks that act on the training ask of it.

    def forget_since(self, step: int, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Drops what was captured, validated and kept for batch norm from a step on; averages begin anew.

        Args:
            step: The first that is forgotten.
            buffers: Floating-point buffers at the newest snapshot that is left; None keeps those of the newest now.
        """
        self.capture.forget_since(step)
        if buffers:
            self.capture.buffers = local_clones(buffers)
        self._recalibration.inputs.clear()
        self.validation.predictor.forget_since(step)

    def put_into_(
        self, pl_module: torch.nn.Module, coefficients: Mapping[int, float], buffers: Mapping[str, Tensor]
    ) -> None:
        """Writes a merge of snapshots into the live model, for good: training goes on from it.

        Args:
            pl_module: The module that is trained.
            coefficients: By snapshot step, summing to one.
            buffers: Name -> value of floating-point buffers.
        """
        assert self.capture.ring is not None
        assert self.capture.layout is not None
        row = self.capture.ring.combine([coefficients.get(step, 0.0) for step in self.capture.steps])
        values = self.capture.layout.views(row) | dict(buffers)
        self.capture.finish()
        overwrite_(tensors_by_name(pl_module, values), values, before=partial(reshard, pl_module))

    def _explain_phase(self, trainer: Trainer, is_end: bool = False) -> None:
        window, steps = self.capture.window, self.capture.steps
        if window.phase.is_stable or window.start != "stable":
            return
        if self.merges.are_any_ready:
            kept = f"the window of {len(steps)} snapshots up to step {steps[-1]}" if steps else "the average"
            self._messages.say(
                f"the learning rate moved at step {self.step}: {kept} stays as it is until the rate is constant again",
                "frozen",
            )
        elif window.phase.never_settled(0 if is_end else trainer.estimated_stepping_batches):
            self._messages.warn(
                f"the learning rate was not constant in {window.phase.num_unsettled_steps} steps (a cosine"
                " schedule? a schedule-free optimizer?), so nothing was captured. MergeCallback(start=STEP) captures"
                " from a step on whatever the rate does; what its merge says about annealing then is less certain",
                "unsettled",
            )
