"""`SpikeRecovery`: after a loss spike, writes a merge of earlier snapshots into the live model."""

import math
import os
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from merge_callback.callbacks.merge_callback import MergeCallback
from merge_callback.callbacks.pickling import PickledWithoutItsRun
from merge_callback.callbacks.spike_detector import SpikeDetector
from merge_callback.live.learning_rates import RateOverlay, is_overlaid, optimizer_step
from merge_callback.live.sharding import local, local_clones
from merge_callback.live.weights import nonfinite_names, snapshot_buffers
from merge_callback.utilities.calls import ShownAsItsCall
from merge_callback.utilities.checks import check_count

# If this many first steps return no loss, `training_step` is assumed never to return one.
_MOST_WITHOUT_LOSS = 20


class SpikeRecovery(ShownAsItsCall, PickledWithoutItsRun):
    """Watches the training loss and, after a spike, writes a merge of earlier snapshots into the model.

    Merging a few checkpoints from before a collapse lets a run continue that would diverge again from the last of them
    (arXiv 2505.12082, which merges three). When a loss or a gradient is NaN or infinite, or when the detector finds a
    spike:

    1. The run is saved as it is, if a folder is given.
    2. Snapshots that were taken since the spike began are dropped, and averages over every step restart.
    3. The uniform merge of the latest ``num_snapshots`` remaining snapshots is written into the model. If another
       recovery follows soon, it reaches further back: it skips as many snapshots as were merged before.
    4. Optimizers restart without the momenta of the spike, unless ``optimizer_state="keep"``.
    5. For ``rate_steps`` steps the learning rates are lowered, unless an `AnnealBranch` lowers them already.

    Steps and data are not rewound: the batches of the spike are skipped and not trained on again. All ranks act alike,
    on the mean of their losses. Until the first recovery, training is bit-identical to training without this callback.
    Every step costs a pass over the gradients and waits for the device.

    Args:
        merge_callback: Takes the snapshots. List it before this callback in the Trainer's callbacks.
        detector: Decides what a spike is; None is a `SpikeDetector` with its defaults.
        num_snapshots: Number of snapshots to merge.
        optimizer_state: ``"reset"`` or ``"keep"``. Gradients that are NaN or infinite never enter it.
        rate_factor: Factor on the learning rates after a recovery, in (0, 1].
        rate_steps: Number of optimizer steps with lowered learning rates.
        max_recoveries: Maximum number of recoveries; the next spike ends the run with an error.
        folder: Where the run is saved before each recovery, as ``before-recovery-<step>.ckpt``; None saves nothing.

    Raises:
        ValueError: If an argument is invalid.
        RuntimeError: During training, at a spike after ``max_recoveries`` recoveries or without an earlier snapshot.

    Examples:
        >>> from merge_callback import MergeCallback, SpikeRecovery
        >>> merge = MergeCallback(every_n_train_steps=100)
        >>> callbacks = [merge, SpikeRecovery(merge, rate_factor=0.5, rate_steps=200)]
    """

    def __init__(
        self,
        merge_callback: MergeCallback,
        *,
        detector: SpikeDetector | None = None,
        num_snapshots: int = 3,
        optimizer_state: Literal["reset", "keep"] = "reset",
        rate_factor: float = 1.0,
        rate_steps: int = 0,
        max_recoveries: int = 3,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(merge_callback, MergeCallback):
            raise TypeError(f"merge_callback must be a MergeCallback, got {merge_callback!r}")
        if not merge_callback.session.capture.num_snapshots:
            raise ValueError("merge_callback must keep snapshots, but all its merges are averages over every step")
        if not merge_callback.parts.selection.is_everything:
            raise ValueError("merge_callback must merge all parameters, or those it leaves out would stay in the spike")
        check_count("num_snapshots", num_snapshots)
        check_count("max_recoveries", max_recoveries)
        check_count("rate_steps", rate_steps, minimum=0)
        if optimizer_state not in ("reset", "keep"):
            raise ValueError(f"optimizer_state must be 'reset' or 'keep', got {optimizer_state!r}")
        if not 0 < rate_factor <= 1:
            raise ValueError(f"rate_factor must lie in (0, 1], got {rate_factor}")
        if (rate_factor < 1) != (rate_steps > 0):
            raise ValueError(f"rate_factor and rate_steps go together, got {rate_factor} and {rate_steps}")
        self.merge_callback = merge_callback
        self.detector = detector or SpikeDetector()
        self.num_snapshots = num_snapshots
        self.optimizer_state = optimizer_state
        self.rate_factor = rate_factor
        self.rate_steps = rate_steps
        self.max_recoveries = max_recoveries
        self.folder = folder
        self.begin_anew()

    def begin_anew(self) -> None:
        # Steps of the recoveries so far.
        self.recoveries: list[int] = []
        self._num_in_a_row = 0
        self._rates_until = 0
        self._overlay: RateOverlay | None = None
        self._losses: list[Tensor] = []
        # The first loss sets it to minus infinity, so that it never reaches the limit.
        self._num_without_loss = 0.0
        self._has_bad_gradient = False
        # Snapshot step -> floating-point buffers; the window itself keeps only those of the newest snapshot.
        self._buffers: dict[int, dict[str, Tensor]] = {}
        self._step = 0
        self._loaded_state: dict[str, Any] | None = None

    # Hooks, called by Lightning.

    def state_dict(self) -> dict[str, Any]:
        if self._loaded_state is not None:
            return self._loaded_state
        return {
            "detector": self.detector.state_dict(),
            "recoveries": self.recoveries,
            "num_in_a_row": self._num_in_a_row,
            "rates_until": self._rates_until,
            "losses": [float(loss) for loss in self._losses],
            "buffers": self._buffers,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded_state = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if self.merge_callback not in callbacks or callbacks.index(self.merge_callback) > callbacks.index(self):
            raise ValueError(
                "SpikeRecovery must come after its MergeCallback, and both must be in the Trainer's callbacks"
            )
        self._loaded_state = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = optimizer_step(trainer)
        self.detector.clear()
        self.recoveries, self._num_in_a_row, self._rates_until = [], 0, 0
        self._losses, self._num_without_loss = [], 0
        # Another fit of the same module continues with the same window.
        kept = self.merge_callback.snapshot_steps
        self._buffers = {step: buffers for step, buffers in self._buffers.items() if step in kept}
        if (state := self._loaded_state) is not None:
            self.detector.load_state_dict(state["detector"])
            self.recoveries, self._num_in_a_row = list(state["recoveries"]), state["num_in_a_row"]
            self._rates_until = state["rates_until"]
            self._losses = [torch.tensor(loss, device=pl_module.device) for loss in state["losses"]]
            self._buffers = {
                step: {name: buffer.to(pl_module.device, copy=True) for name, buffer in of_step.items()}
                for step, of_step in state["buffers"].items()
            }
            self._loaded_state = None
        # This callback may have been added on resume, after the snapshot was taken.
        if kept and kept[-1] not in self._buffers:
            self._buffers[kept[-1]] = local_clones(self.merge_callback.session.capture.buffers)
        self._lower_rates(trainer)
        rank_zero_info(
            f"SpikeRecovery: {self.detector}; up to {self.max_recoveries} times back to a merge of {self.num_snapshots}"
            " snapshots"
        )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        # A gradient scaler skips steps with infinite gradients by itself, and some of these are normal.
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # Each rank checks its own shards as plain tensors, since one list may mix shards and plain tensors.
        own = {str(place): _dense(local(gradient)) for place, gradient in enumerate(gradients)}
        is_bad = trainer.strategy.reduce_boolean_decision(bool(own and nonfinite_names(own)), all=False)
        if is_bad:
            # Without gradients the optimizer step changes nothing.
            self._has_bad_gradient = True
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, dict) and outputs.get("loss") is not None:
            self._losses.append(outputs["loss"].detach())
        step = optimizer_step(trainer)
        if step == self._step:
            return
        self._step = step
        if step >= self._rates_until:
            self._restore_rates()
        self._remember_buffers(pl_module)
        if not self._losses:
            # `training_step` may skip a batch now and then and return no loss.
            self._num_without_loss += 1
            if self._num_without_loss == _MOST_WITHOUT_LOSS:
                raise ValueError(
                    f"SpikeRecovery needs the loss that training_step returns, and it returned none in the first"
                    f" {_MOST_WITHOUT_LOSS} steps"
                )
            return
        self._num_without_loss = -math.inf
        loss = float(trainer.strategy.reduce(torch.stack(self._losses).float().mean(), reduce_op="mean"))
        self._losses.clear()
        began = step if self._has_bad_gradient else self.detector.update(step, loss)
        self._has_bad_gradient = False
        if began is not None:
            self._recover(trainer, pl_module, began, loss)
        elif self.recoveries and step - self.recoveries[-1] > self.detector.window:
            self._num_in_a_row = 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_rates()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_rates()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore_rates()

    # Implementation.

    def _recover(self, trainer: Trainer, pl_module: LightningModule, began: int, loss: float) -> None:
        what = f"SpikeRecovery: at step {self._step} the loss is {loss:.4g}, which began at step {began}"
        if self.folder is not None:
            path = os.path.join(self.folder, f"before-recovery-{self._step}.ckpt")  # noqa: PTH118 (may be a URL)
            trainer.save_checkpoint(path, weights_only=False)
        if len(self.recoveries) >= self.max_recoveries:
            raise RuntimeError(f"{what}; max_recoveries={self.max_recoveries} allows no further recovery")
        self.merge_callback.session.merges.drop_unusable()
        steps = [step for step in self.merge_callback.snapshot_steps if step < began]
        self._buffers = {step: buffers for step, buffers in self._buffers.items() if step < began}
        self.merge_callback.session.forget_since(began, self._buffers_near(steps[-1]) if steps else None)
        reach = self._num_in_a_row * self.num_snapshots
        merged = (steps[: len(steps) - reach] or steps[:1])[-self.num_snapshots :]
        if not merged:
            raise RuntimeError(f"{what}, and there is no earlier snapshot to go back to")
        self.merge_callback.session.put_into_(pl_module, "sma", merged, self._buffers_near(merged[-1]))
        if self.optimizer_state == "reset":
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        self.recoveries.append(self._step)
        self._num_in_a_row += 1
        self.detector.clear()
        self._rates_until = self._step + self.rate_steps
        self._restore_rates()
        self._lower_rates(trainer)
        state = "are reset" if self.optimizer_state == "reset" else "are kept"
        rates = f"; rates are {self.rate_factor} of theirs for {self.rate_steps} steps" if self._overlay else ""
        rank_zero_warn(f"{what}. Back to the merge of steps {merged}; optimizer states {state}{rates}")
        pl_module.log("recovery/num_recoveries", float(len(self.recoveries)), on_step=True, on_epoch=False)

    def _buffers_near(self, step: int) -> dict[str, Tensor]:
        """Returns the buffers of a snapshot, or of the nearest snapshot whose buffers are known."""
        nearest = min(self._buffers, key=lambda known: abs(known - step), default=None)
        return self._buffers[nearest] if nearest is not None else {}

    def _remember_buffers(self, pl_module: LightningModule) -> None:
        steps = self.merge_callback.snapshot_steps
        self._buffers = {step: buffers for step, buffers in self._buffers.items() if step in steps}
        if steps and steps[-1] == self._step:
            self._buffers[self._step] = local_clones(snapshot_buffers(pl_module))

    def _lower_rates(self, trainer: Trainer) -> None:
        # An `AnnealBranch` lowers the rates already.
        if self._step < self._rates_until and not is_overlaid(trainer.optimizers):
            factor = self.rate_factor
            self._overlay = RateOverlay(trainer.optimizers, lambda: factor, is_decay=False)

    def _restore_rates(self) -> None:
        if self._overlay is not None:
            self._overlay.remove()
            self._overlay = None


def _dense(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
