"""`MergeCallback`: Lightning's hooks, each handed to the file whose business it is."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from merge_callback.callbacks.arguments import (
    check_calibration,
    check_start,
    floating_dtype,
    named_merges,
    refuse_strategy,
    selection,
    snapshot_storage,
)
from merge_callback.capture.capture import SnapshotCapture
from merge_callback.capture.directory import SnapshotDirectory
from merge_callback.capture.merges import CapturedMerges
from merge_callback.capture.state import put_shards, shard_reader
from merge_callback.checkpoints.write import provenance, save, save_sharded, weights_checkpoint
from merge_callback.live.batch_norm import Recalibration
from merge_callback.live.learning_rates import learning_rates, optimizer_step
from merge_callback.live.names import check_patterns
from merge_callback.live.observe import validation_follows
from merge_callback.live.sharding import local_clones, rank, reshard
from merge_callback.live.swap import overwrite_
from merge_callback.live.weights import tensors_by_name
from merge_callback.merging.averages import Average, is_average
from merge_callback.merging.rules import Rule, decay_from_coefficients, rule_label
from merge_callback.prediction.bias import Prediction
from merge_callback.utilities.checks import check_count, check_limit, check_optional_count, check_share, patterns
from merge_callback.utilities.messages import Messages
from merge_callback.validation.budget import Budget
from merge_callback.validation.logged import Names
from merge_callback.validation.merged_validation import MergedValidation
from merge_callback.validation.routers import Routers
from merge_callback.validation.trunk import Trunk

# Where Lightning defines hooks that do nothing.
_EMPTY_HOOKS = ("lightning.pytorch.core.hooks", "pytorch_lightning.core.hooks")


class MergeCallback(Callback):
    """Shows, beside the live metrics, those of the merge of the latest weights: the model as if it were annealed now.

    Keeps a rolling buffer of snapshots while the learning rate is constant, merges them at every validation, validates
    the merge over the same batches, and logs ``merged/m`` and ``merge_gain/m`` beside every metric ``m``. Training is
    bit-identical to training without it. Implements *Model Merging in Pre-training of Large Language Models*
    (arXiv 2505.12082); `merge_callback.merging.rules` tells which decay a merge stands for.

    Args:
        every_n_train_steps: Optimizer steps between two snapshots; with several optimizers a step is one round of them.
            None starts at one step and doubles as training grows, so that the ring always covers at least the last
            tenth of training.
        num_snapshots: Capacity of the rolling buffer.
        merges: The merge to evaluate: a rule's name (``"sma"``, ``"wma"``, ``"ema"``, ``"linear"``, ``"1-sqrt"``,
            ``"cosine"``), a `Window`, an `Extrapolate`, or a function of the snapshots' steps; or an `Ema` or a
            `PowerEma` over every step. Or several, as a mapping of names to any of these; the first is the primary one.
        start: ``"stable"`` captures while the learning rate is constant, and begins a new window when it is constant
            again at another value; an int captures from that optimizer step on, whatever the rate does.
        storage: Where snapshots live: ``"device"`` is the memory of the model's device; ``"cpu"`` is host memory,
            pinned and filled beside the training where there is a GPU, and averages over every step live there too,
            updated by a thread of their own; a directory, as a path or a `SnapshotDirectory`, gets one file a snapshot
            and rank. But for ``"device"``, merges are made in host memory.
        dtype: Dtype in which snapshots are kept, e.g. ``torch.bfloat16`` or ``"bfloat16"``; None keeps each parameter's
            own. Merges accumulate in float32 or better all the same.
        evaluate_every_n_validations: Evaluates the merges at every n-th validation.
        limit_batches: How much of each validation loader the merged validation takes: a number of batches or a share;
            None for as much as the live validation. With a limit the gain compares the same batches, for which the live
            model is evaluated on them once more.
        max_overhead: Largest share of the run's wall time that the callback may take, such as 0.02. Merged validations
            that would exceed it are left out, and ``merge/num_skipped`` counts them; the first one is never left out.
            None leaves none out. Which ones are left out depends on the clock, so it is not the same in every run.
        calibration: What real anneals said, to predict the next: the file that `AnnealBranch` adds its records to,
            which may grow while this run goes on, or not be there yet; or ``"prior"``, for what the benchmark of this
            project found of runs with AdamW, with its spread as interval. From two branches on, ``annealed/m`` is
            logged, with ``annealed/m/low`` and ``annealed/m/high``; see `merge_callback.prediction.bias`. None predicts
            nothing.
        higher_is_better: Patterns (``"*acc*"``) of metrics where more is better, for the sign of ``merge_gain/m``.
            torchmetrics objects that are logged know it themselves; of numbers and tensors nobody knows it.
        include: Patterns (``"*lora*"``) of the names of parameters that are merged; ``"*"`` fits all. The others stay
            live, as frozen ones do.
        exclude: Patterns (``"*.router.*"``) of those that are not; a tied parameter is known by its first name.
        recalibrate_batches: From the inputs of so many of the latest training batches, statistics of batch norm layers
            are calculated for the merge, instead of taken from the newest snapshot. The module is called with the first
            item of a batch that is a list or tuple, else with the batch. Copies of the inputs are kept, and go into
            checkpoints. None for models without such layers.
        routers: Where a mixture of experts has its routers; logs ``merge/router_agreement``. See `Routers`.
        save_state: What checkpoints hold: ``"full"`` is all that a resumed run needs to go on exactly (the ring);
            ``"none"`` leaves the snapshots out, and the window starts empty after a resume.
        name: Distinguishes two callbacks in one Trainer, in checkpoints and in logged names.

    Raises:
        ValueError: If an argument has a value that makes no sense; the message names both.
        TypeError: If an argument is of another type than described.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from merge_callback import MergeCallback, Window
        >>> callback = MergeCallback(every_n_train_steps=100, merges={"sma": "sma", "late": Window(span=0.05)})
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        num_snapshots: int = 10,
        *,
        merges: str | Rule | Average | Mapping[str, str | Rule | Average] = "sma",
        start: Literal["stable"] | int = "stable",
        storage: str | SnapshotDirectory | os.PathLike[str] = "device",
        dtype: torch.dtype | str | None = None,
        evaluate_every_n_validations: int = 1,
        limit_batches: int | float | None = None,
        max_overhead: float | None = None,
        calibration: str | os.PathLike[str] | None = None,
        higher_is_better: str | Sequence[str] = (),
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        recalibrate_batches: int | None = None,
        routers: Routers | None = None,
        save_state: Literal["full", "none"] = "full",
        name: str = "merge",
    ) -> None:
        check_optional_count("every_n_train_steps", every_n_train_steps)
        check_count("num_snapshots", num_snapshots)
        check_count("evaluate_every_n_validations", evaluate_every_n_validations)
        check_limit(limit_batches)
        check_share("max_overhead", max_overhead)
        check_calibration(calibration)
        check_optional_count("recalibrate_batches", recalibrate_batches)
        check_start(start)
        if not isinstance(routers, Routers | None):
            raise TypeError(f"routers must be a Routers or None, got {routers!r}")
        if save_state not in ("full", "none"):
            raise ValueError(f"save_state must be 'full' or 'none', got {save_state!r}")
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a non-empty string, got {name!r}")
        self.every_n_train_steps = every_n_train_steps
        self.num_snapshots = num_snapshots
        self.merges = named_merges(merges)
        self.start = start
        self.storage = snapshot_storage(storage)
        self.dtype = floating_dtype(dtype)
        self.evaluate_every_n_validations = evaluate_every_n_validations
        self.limit_batches = limit_batches
        self.max_overhead = max_overhead
        self.calibration = calibration
        self.higher_is_better = patterns("higher_is_better", higher_is_better)
        self.selection = selection(include, exclude)
        self.recalibrate_batches = recalibrate_batches
        self.routers = routers
        self.save_state = save_state
        self.name = name

        self._module: LightningModule | None = None
        self._loaded_state: dict[str, Any] | None = None
        self._step = 0
        self._rates: list[float] = []
        self._messages = Messages(f"MergeCallback({name!r})")
        self._begin_anew()

    # What a user asks of it.

    @property
    def snapshot_steps(self) -> list[int]:
        """Optimizer steps of the snapshots in the buffer, oldest first."""
        return self._capture.steps

    def coefficients(self, name: str | None = None) -> dict[int, float]:
        """Coefficients of a merge by snapshot step, oldest first; they sum to one.

        Args:
            name: Which merge; None is the primary one.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If there is no merge of that name, its rule gives no proper coefficients, or it is an average
                over all steps, which has none.
        """
        return self._merges.coefficients(name)

    def implied_decay(self, name: str | None = None) -> list[tuple[int, float]]:
        """The learning-rate decay that a merge stands for: (snapshot step, multiplier), oldest first.

        The multiplier applies to the updates that led up to that snapshot from the one before; for the oldest it is
        one. Raises as `coefficients` does.
        """
        coefficients = self.coefficients(name)
        return list(zip(coefficients, decay_from_coefficients(list(coefficients.values())), strict=True))

    def merged_state_dict(self, name: str | None = None) -> dict[str, Tensor]:
        """The merge as a state dict of the LightningModule, which takes it with ``strict=True``.

        Trainable parameters are merged; floating-point buffers are those of the newest snapshot; frozen parameters and
        integer buffers are the live ones. The tensors are copies; of a sharded model they are sharded as the live ones.
        Raises as `merged_weights` does.
        """
        return self._merged_copy(name, torch.clone)

    def _merged_copy(self, name: str | None, copy: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        self._merges.check_captured(name)
        assert self._module is not None
        with self.merged_weights(self._module, name):
            state = self._module.state_dict()
            return {key: copy(value.detach()) if isinstance(value, Tensor) else value for key, value in state.items()}

    def forecast(self, metric: str, span_steps: int) -> Prediction:
        """What a metric will be after a linear decay that begins now, with an interval.

        Extrapolates the merged values so far; see `merge_callback.prediction.bias.forecast` for what it assumes.

        Args:
            metric: Name of a metric that validations log, such as ``"val_loss"``.
            span_steps: Length of the decay in optimizer steps.

        Raises:
            RuntimeError: If there are no records of real anneals, or too few, or too few validations so far.
        """
        check_count("span_steps", span_steps)
        return self._validation.trunk.forecast(metric, span_steps)

    @contextmanager
    def merged_weights(self, pl_module: torch.nn.Module, name: str | None = None) -> Iterator[None]:
        """Inside the context the module holds the merge; afterwards, whatever happened, its own weights again.

        Args:
            pl_module: The module that was trained, or another one of the same architecture.
            name: Which merge; None is the primary one.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If there is no merge of that name, its rule gives no proper coefficients, or the module has
                other tensors.
        """
        with self._merges.swapped_in(pl_module, self._merges.row(name), self._merges.buffers(name)):
            yield

    def save_merged(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Writes the merge with its provenance to a file, whole or not at all.

        A ``.ckpt`` is taken by ``load_from_checkpoint`` and by ``Trainer.fit(ckpt_path=...)``, which starts a new run
        from the merged weights; a ``.safetensors`` holds the state dict alone.

        With several ranks all of them call this, and rank 0 writes. The tensors of a sharded model are gathered one
        after the other; to a path without an ending every rank writes its own shards instead
        (`torch.distributed.checkpoint`).

        Args:
            path: Ends in ``.ckpt`` or ``.safetensors``. Missing folders are made.
            name: Which merge; None is the primary one.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If the path ends otherwise, or there is no merge of that name.
            OSError: If the file cannot be written; the message says what was not saved.
        """
        rule, is_sharded = self._merges.rule(name), self._capture.sharding.is_sharded
        # Beside the merge that is swapped in, a GPU need not hold another one.
        state = self._merged_copy(
            name, torch.clone if is_sharded else partial(torch.Tensor.to, device="cpu", copy=True)
        )
        assert self._module is not None
        checkpoint = weights_checkpoint(self._module, state, self._step)
        if is_average(rule):
            origin = provenance(repr(rule), step=self._capture.shadows[name or self._merges.primary].step)
        else:
            origin = provenance(rule_label(rule), self.coefficients(name))
        if is_sharded:
            save_sharded(path, checkpoint, origin)
        elif rank() == 0:
            save(path, checkpoint, origin)

    # What other callbacks ask of it.

    @property
    def is_evaluated(self) -> bool:
        """Whether the latest validation has evaluated the primary merge."""
        return self._validation.is_evaluated

    def is_captured(self, name: str | None = None) -> bool:
        """Whether there is something to make a merge of."""
        return self._merges.is_captured(name)

    @property
    def newest_buffers(self) -> dict[str, Tensor]:
        """Floating-point buffers at the newest snapshot, by name."""
        return self._capture.buffers

    def forget_since(self, step: int, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Drops the snapshots of a step and of later ones, and begins averages over every step anew.

        What validations since then have found is dropped too, and all inputs that were kept for batch norm statistics,
        since those of the spike may be among them.

        Args:
            step: The first that is forgotten.
            buffers: Floating-point buffers at the newest snapshot that is left; None keeps those of the newest now.
        """
        self._capture.forget_since(step)
        if buffers:
            self._capture.buffers = local_clones(buffers)
        self._recalibration.inputs.clear()
        self._validation.trunk.forget_since(step)

    def put_into_(
        self, pl_module: torch.nn.Module, coefficients: Mapping[int, float], buffers: Mapping[str, Tensor]
    ) -> None:
        """Writes a merge into the live model, for good: training goes on from it.

        Args:
            pl_module: The module that is trained.
            coefficients: By snapshot step, summing to one.
            buffers: Name -> value of floating-point buffers.
        """
        assert self._capture.ring is not None
        assert self._capture.layout is not None
        row = self._capture.ring.combine([coefficients.get(step, 0.0) for step in self.snapshot_steps])
        values = self._capture.layout.views(row) | dict(buffers)
        self._capture.finish()
        overwrite_(tensors_by_name(pl_module, values), values, before=partial(reshard, pl_module))

    # What Lightning calls.

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        capture = self._capture.state_dict(with_snapshots=self.save_state == "full")
        return {
            "capture": capture,
            "step": self._step,
            "inputs": self._recalibration.inputs.state_dict() if self.save_state == "full" else None,
            "rates": self._rates,
            "proven_rules": sorted(self._merges.proven_rules),
            **self._validation.state_dict(),
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._capture.sharding.is_sharded:
            return
        # Rank 0 alone writes what `state_dict` returns; shards go where the model's and the optimizers' go.
        self._merges.drop_unusable()
        state = self.state_dict()
        checkpoint["callbacks"][self.state_key] = state
        if self.save_state == "full":
            state["shards"] = put_shards(self._capture.shards(), self._capture.sharding, checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Some strategies load before the model is on its device: kept until the fit begins.
        self._loaded_state = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_strategy(trainer.strategy)
        self._loaded_state = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_up(trainer, pl_module)
        self._validation.begin(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded_state is not None:
            # The checkpoint was that of a finished run: nothing was trained, but its merges are there.
            self._take_up(trainer, pl_module)

    def _take_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a window, or goes on with the one of the checkpoint or of the fit before."""
        step = optimizer_step(trainer)
        # Another fit of the same module goes on with its window, unless it starts counting anew.
        continues = self._module is pl_module and self._step <= step
        self._module, self._step = pl_module, step
        if self._loaded_state is not None or not continues:
            check_patterns(pl_module, self.selection)
            if self.routers is not None:
                self.routers.find(pl_module)
            self._recalibration.check(pl_module)
            self._begin_anew()
            self._capture.num_local_processes = trainer.num_devices
            self._capture.prepare(pl_module)
        self._messages.begin()
        self._recalibration.begin(trainer)
        if self._loaded_state is not None:
            reader = shard_reader(self._loaded_state.get("shards"), trainer.ckpt_path)
            if changes := self._capture.load_state_dict(self._loaded_state["capture"], pl_module, reader):
                self._messages.warn(f"resumed, but {'; '.join(changes)}", "resumed")
            if self._loaded_state["inputs"] is not None:
                self._recalibration.inputs.load_state_dict(self._loaded_state["inputs"], pl_module.device)
            self._merges.proven_rules = set(self._loaded_state["proven_rules"])
            self._validation.load_state_dict(self._loaded_state)
            if self._loaded_state["step"] < step:
                # Saved by a callback earlier in the list, before this one had seen the step.
                self._capture.after_step(
                    pl_module, step, self._loaded_state["rates"], learning_rates(trainer.optimizers)
                )
            self._loaded_state = None
        elif not continues and step > 0:
            self._messages.warn("the checkpoint holds no state of it, so the window starts empty", "resumed")
        self._validation.trunk.read()
        self._messages.say(f"{self._capture.describe()}; merges: {', '.join(self.merges)}", "start")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._rates = learning_rates(trainer.optimizers)
        self._recalibration.remember(pl_module, batch, is_saved=self.save_state == "full")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._capture.finish()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_validated = validation_follows(trainer)
        self._validation.num_validations += is_validated
        step = optimizer_step(trainer)
        if step == self._step:
            return
        self._step = step
        began, waited_before = time.perf_counter(), self._capture.waited_seconds
        self._capture.after_step(pl_module, step, self._rates, learning_rates(trainer.optimizers))
        # The module's own hook comes next, and may write to the weights, as clipping them does; so may other callbacks
        # around a validation and at the end of an epoch, such as one that averages weights.
        is_own_hook = pl_module.on_train_batch_end.__module__ not in _EMPTY_HOOKS
        if is_own_hook or is_validated or trainer.is_last_batch:
            self._capture.finish()
        waited = self._capture.waited_seconds - waited_before
        self._validation.budget.spend(time.perf_counter() - began - waited)
        self._explain_phase(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._capture.wait()
        self._explain_phase(trainer, is_end=True)
        if not any(map(self._merges.is_captured, self.merges)) and self._capture.phase.is_stable:
            due = self.start if self.start != "stable" else self._capture.schedule.next_step
            self._messages.say(f"nothing was captured in {self._step} steps; the first is due at step {due}", "nothing")
        trunk = self._validation.trunk
        if trunk.predictions and not self._capture.phase.is_stable and not trunk.is_checked:
            self._messages.warn(
                f"the run ended at step {self._step}, in a decay, without a validation there: its last prediction was"
                " not checked",
                "checked",
            )
        self._close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close(trainer)

    # How it does it.

    @property
    def _capture(self) -> SnapshotCapture:
        return self._merges.capture

    def _begin_anew(self) -> None:
        """With nothing captured and nothing validated."""
        averages = {name: rule for name, rule in self.merges.items() if is_average(rule)}
        capture = SnapshotCapture(
            self.every_n_train_steps,
            self.num_snapshots,
            [rule for rule in self.merges.values() if not is_average(rule)],
            self.start,
            self.dtype,
            storage=self.storage,
            name=self.name,
            averages=averages,
            selection=self.selection,
        )
        self._recalibration = Recalibration(self.recalibrate_batches, self._messages)
        self._merges = CapturedMerges(self.merges, capture, self._recalibration, self._messages)
        names = Names(self.name, self._merges.primary, self.higher_is_better)
        self._validation = MergedValidation(
            self._merges,
            names,
            Trunk(self.calibration, names, self._messages),
            Budget(self.max_overhead),
            self._messages,
            every_n_validations=self.evaluate_every_n_validations,
            limit_batches=self.limit_batches,
            routers=self.routers,
        )

    def _close(self, trainer: Trainer) -> None:
        try:
            # The model may be about to leave its device, and a copy of it may still be under way.
            self._capture.finish()
        finally:
            self._validation.close(trainer)

    def _explain_phase(self, trainer: Trainer, is_end: bool = False) -> None:
        if self._capture.phase.is_stable or self.start != "stable":
            return
        if any(map(self._merges.is_captured, self.merges)):
            window = (
                f"the window of {len(self.snapshot_steps)} snapshots up to step {max(self.snapshot_steps, default=0)}"
            )
            self._messages.say(
                f"the learning rate moved at step {self._step}: {window if self.snapshot_steps else 'the average'}"
                " stays as it is until the rate is constant again",
                "frozen",
            )
        elif self._capture.phase.never_settled(0 if is_end else trainer.estimated_stepping_batches):
            self._messages.warn(
                f"the learning rate was not constant in {self._capture.phase.num_unsettled_steps} steps (a cosine"
                " schedule? a schedule-free optimizer?), so nothing was captured. MergeCallback(start=STEP) captures"
                " from a step on whatever the rate does; what its merge says about annealing then is less certain",
                "unsettled",
            )
