"""`MergeCallback`: Lightning's hooks, each handed to the file whose business it is."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from merge_callback.arguments import (
    check_calibration,
    check_count,
    check_limit,
    check_optional_count,
    check_share,
    floating_dtype,
    named_merges,
    refuse_strategy,
    safe_name,
    selection,
    snapshot_storage,
)
from merge_callback.budget import Budget
from merge_callback.calibration import PRIOR, AnnealCalibration
from merge_callback.capture import SnapshotCapture
from merge_callback.dashboards import BOUNDS, Dashboards, LoggedName, MergeNow
from merge_callback.evaluate import (
    LoggedValue,
    evaluate,
    is_last_validation,
    logged_step,
    num_limited_batches,
    observe_validations,
    saving_live_weights,
    stop_observing_validations,
    validation_follows,
)
from merge_callback.export import provenance, save, save_sharded, weights_checkpoint
from merge_callback.prediction import Prediction, curvature_gain, gain
from merge_callback.rates import learning_rates, optimizer_step
from merge_callback.recalibrate import RecentInputs, batch_norms, batch_statistics, recalibrate_
from merge_callback.records import TrunkValues
from merge_callback.routers import Choices, Routers
from merge_callback.rules import Rule, decay_from_coefficients, merge_coefficients, rule_label
from merge_callback.shadow import Average, is_average
from merge_callback.shards import copies, local, put_shards, rank, reshard, shard_reader
from merge_callback.storage import SnapshotDirectory
from merge_callback.swap import overwrite_, swapped_weights
from merge_callback.weights import check_patterns, fits, has_lazy_parameters, tensors_by_name


@dataclass(frozen=True)
class _Evaluation:
    """What the evaluation before a live validation found, kept until the live values are there to compare with."""

    merged: dict[str, dict[str, LoggedValue]]
    # By merge: coefficient by snapshot step; none of an average.
    coefficients: dict[str, dict[int, float]]
    live: dict[str, LoggedValue] | None
    diagnostics: dict[str, float]


class MergeCallback(Callback):
    """Shows, beside the live metrics, those of the merge of the latest weights: the model as if it were annealed now.

    Keeps a rolling buffer of snapshots while the learning rate is constant, merges them at every validation, validates
    the merge over the same batches, and logs ``merged/m`` and ``merge_gain/m`` beside every metric ``m``. Training is
    bit-identical to training without it. Implements *Model Merging in Pre-training of Large Language Models*
    (arXiv 2505.12082); `merge_callback.rules` tells which decay a merge stands for.

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
            logged, with ``annealed/m/low`` and ``annealed/m/high``; see `merge_callback.prediction`. None predicts
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
        if start != "stable":
            check_count("start", start, minimum=0)
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
        self.higher_is_better = (higher_is_better,) if isinstance(higher_is_better, str) else tuple(higher_is_better)
        self.selection = selection(include, exclude)
        self.recalibrate_batches = recalibrate_batches
        self.routers = routers
        self.save_state = save_state
        self.name = name

        self._module: LightningModule | None = None
        self._capture = self._new_capture()
        self._loaded_state: dict[str, Any] | None = None
        self._step = 0
        self._rates: list[float] = []
        self._num_validations = 0
        self._inputs = RecentInputs(recalibrate_batches or 0)
        self._step_context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._budget = Budget(max_overhead or 1.0)
        self._began = time.perf_counter()
        self._evaluation: _Evaluation | None = None
        self._dashboards = Dashboards(f"MergeCallback({name!r})", self._label())
        # Makes the closing table; only at the end of a fit is it needed.
        self._closing: Callable[[], str] | None = None
        # Every validation of the primary merge at a constant rate: what real anneals are compared with.
        self._history: list[TrunkValues] = []
        self._anneals = AnnealCalibration(calibration) if calibration is not None else None
        # The latest at a constant rate; kept while the rate decays.
        self._predictions: dict[str, Prediction] = {}
        # Whether the latest validation has compared them with the end of a decay.
        self._is_checked = False
        # Merges whose rule has given proper coefficients once.
        self._worked: set[str] = set()
        self._said: set[str] = set()

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
        rule = self._merge(name)
        if is_average(rule):
            raise ValueError(f"the merge {name or self._primary!r} is an average over every step, not over snapshots")
        self._check_captured(bool(self.snapshot_steps))
        return dict(zip(self.snapshot_steps, merge_coefficients(rule, self.snapshot_steps), strict=True))

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
        self._check_captured(self._is_captured(name))
        assert self._module is not None
        with self.merged_weights(self._module, name):
            state = self._module.state_dict()
            return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in state.items()}

    def forecast(self, metric: str, span_steps: int) -> Prediction:
        """What a metric will be after a linear decay that begins now, with an interval.

        Extrapolates the merged values so far; see `merge_callback.prediction.forecast` for what it assumes.

        Args:
            metric: Name of a metric that validations log, such as ``"val_loss"``.
            span_steps: Length of the decay in optimizer steps.

        Raises:
            RuntimeError: If there are no records of real anneals, or too few, or too few validations so far.
        """
        check_count("span_steps", span_steps)
        found = self._anneals.forecast(self._history, metric, span_steps) if self._anneals and self._history else None
        if found is None:
            raise RuntimeError(
                f"no forecast of {metric!r} after {span_steps} steps: it needs two real anneals in calibration="
                f"{self.calibration!r} and four validations of the merge in the last half of the steps,"
                f" of which there are {len(self._history)} in all"
            )
        return found

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
        self._drop_unusable()
        self._check_captured(self._is_captured(name))
        with self._swapped_in(pl_module, self._row(name), self._buffers(name)):
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
        state, merge = self.merged_state_dict(name), self._merge(name)
        assert self._module is not None
        checkpoint = weights_checkpoint(self._module, state, self._step)
        if is_average(merge):
            origin = provenance(repr(merge), step=self._capture.shadows[name or self._primary].step)
        else:
            origin = provenance(rule_label(merge), self.coefficients(name))
        if self._capture.sharding.is_sharded:
            save_sharded(path, checkpoint, origin)
        elif rank() == 0:
            save(path, checkpoint, origin)

    # What whoever acts on training asks of it.

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
            self._capture.buffers = copies(buffers)
        self._inputs.clear()
        self._history = [known for known in self._history if known.step < step]

    def put_into(
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
            "inputs": self._inputs.state_dict() if self.save_state == "full" else None,
            "rates": self._rates,
            "num_validations": self._num_validations,
            "worked": sorted(self._worked),
            "budget": asdict(replace(self._budget, elapsed=self._elapsed())),
            "history": [asdict(values) for values in self._history],
            "predictions": {metric: asdict(prediction) for metric, prediction in self._predictions.items()},
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._capture.sharding.is_sharded:
            return
        # Rank 0 alone writes what `state_dict` returns; shards go where the model's and the optimizers' go.
        self._drop_unusable()
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
        step = optimizer_step(trainer)
        self._step_context = trainer.precision_plugin.train_step_context
        # Another fit of the same module goes on with its window, unless it starts counting anew.
        continues = self._module is pl_module and self._step <= step
        self._module, self._step = pl_module, step
        if self._loaded_state is not None or not continues:
            self._check_module(pl_module)
            self._inputs.clear()
            self._capture = self._new_capture()
            self._capture.prepare(pl_module)
            self._num_validations, self._worked, self._history, self._predictions = 0, set(), [], {}
            self._budget = Budget(self._budget.share)
        self._said.clear()
        self._closing = None
        self._began = time.perf_counter()
        if self._loaded_state is not None:
            reader = shard_reader(self._loaded_state.get("shards"), trainer.ckpt_path)
            if changes := self._capture.load_state_dict(self._loaded_state["capture"], pl_module, reader):
                self._say(f"resumed, but {'; '.join(changes)}", topic="resumed", warn=True)
            if self._loaded_state["inputs"] is not None:
                self._inputs.load_state_dict(self._loaded_state["inputs"], pl_module.device)
            self._num_validations = self._loaded_state["num_validations"]
            self._worked = set(self._loaded_state["worked"])
            self._budget = replace(Budget(**self._loaded_state["budget"]), share=self._budget.share)
            self._history = [TrunkValues(**values) for values in self._loaded_state["history"]]
            if self._anneals is not None:
                self._predictions = {m: Prediction(**kept) for m, kept in self._loaded_state["predictions"].items()}
            if self._loaded_state["step"] < step:
                # Saved by a callback earlier in the list, before this one had seen the step.
                self._capture.after_step(
                    pl_module, step, self._loaded_state["rates"], learning_rates(trainer.optimizers)
                )
            self._loaded_state = None
        elif not continues and step > 0:
            self._say("the checkpoint holds no state of it, so the window starts empty", topic="resumed", warn=True)
        if self._anneals is not None:
            self._anneals.read()
        self._say(f"{self._capture.describe()}; merges: {', '.join(self.merges)}", topic="start")
        if trainer.barebones:
            self._say("a barebones trainer logs nothing, so merges are kept for export but not evaluated", topic="bare")
        elif trainer.enable_validation:
            observe_validations(trainer, self)
        else:
            self._say("there is no validation, so merges are kept for export but not evaluated", topic="validation")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._rates = learning_rates(trainer.optimizers)
        if self.recalibrate_batches is not None:
            self._remember_inputs(pl_module, batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._capture.finish()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._num_validations += validation_follows(trainer)
        step = optimizer_step(trainer)
        if step == self._step:
            return
        self._step = step
        began = time.perf_counter()
        self._capture.after_step(pl_module, step, self._rates, learning_rates(trainer.optimizers))
        if is_overridden("on_train_batch_end", pl_module):
            # The module's own hook comes next, and may write to the weights, as clipping them does.
            self._capture.finish()
        self._budget.spend(time.perf_counter() - began)
        self._explain_phase(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._capture.wait()
        self._explain_phase(trainer, is_end=True)
        if self._predictions and not self._capture.phase.is_stable and not self._is_checked:
            self._say(
                f"the run ended at step {self._step}, in a decay, without a validation there: its last prediction was"
                " not checked",
                topic="checked",
                warn=True,
            )
        self._close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close(trainer)

    # What `evaluate.observe_validations` calls.

    @property
    def is_evaluated(self) -> bool:
        """Whether the latest validation has evaluated the primary merge."""
        return self._evaluation is not None and self._primary in self._evaluation.merged

    def before_validation(self, trainer: Trainer) -> None:
        """Validates every merge, and the live weights on the same batches where these are fewer."""
        self._evaluation = None
        if self._num_validations % self.evaluate_every_n_validations:
            return
        if not self._fits_budget(trainer):
            return
        self._drop_unusable()
        for name in self._capture.drop_nonfinite_shadows():
            rank_zero_warn(
                f"MergeCallback({self.name!r}): no merge {name!r} at step {self._step}: its average holds NaN or inf,"
                " and begins anew with the next step"
            )
        captured = [name for name in self.merges if self._is_captured(name)]
        if not captured:
            return
        began = time.perf_counter()
        num_batches, num_live_batches = num_limited_batches(trainer, self.limit_batches)
        merged, diagnostics, used = {}, {}, {}
        choices: dict[str, Choices] = {}
        for name, coefficients, row in self._rows(captured):
            if name == self._primary:
                diagnostics = self._diagnostics(coefficients, row)
            with saving_live_weights(trainer), self._swapped_in(trainer.lightning_module, row, self._buffers(name)):
                merged[name] = evaluate(trainer, self.limit_batches)
                if name == self._primary:
                    choices = self._choices(trainer)
            self._worked.add(name)
            used[name] = dict(zip(self.snapshot_steps, coefficients, strict=False))
            # Otherwise the next merge would be made while this one still takes its memory.
            del row
        live = evaluate(trainer, self.limit_batches) if num_batches < num_live_batches else None
        if self.routers is not None and choices:
            diagnostics |= self.routers.compare(choices, self._choices(trainer))
        diagnostics["seconds"] = time.perf_counter() - began
        self._budget.spend(diagnostics["seconds"], is_costly=True)
        self._evaluation = _Evaluation(merged, used, live, diagnostics)

    def after_validation(self, trainer: Trainer, live: Mapping[str, LoggedValue]) -> dict[str, LoggedValue]:
        """What to log beside the live values: merged values, gains and diagnostics."""
        self._learn(trainer, live)
        logged = self._predicted(trainer, live)
        if self.max_overhead is not None:
            logged[self._name("merge", "num_skipped")] = LoggedValue(torch.tensor(float(self._budget.num_skipped)))
        if (evaluation := self._evaluation) is not None:
            step = logged_step(trainer, live)
            live = evaluation.live or live
            logged |= self._merged(evaluation, live)
            device = trainer.lightning_module.device
            for key, diagnostic in (evaluation.diagnostics | self._curvature_gain(evaluation)).items():
                logged[self._name("merge", key)] = LoggedValue(torch.tensor(diagnostic, device=device))
            if trainer.is_global_zero:
                self._show(trainer, evaluation, live, logged, step)
        return {str(name): value for name, value in logged.items()}

    # How it does it.

    @property
    def _primary(self) -> str:
        return next(iter(self.merges))

    def _check_module(self, module: LightningModule) -> None:
        """Raises `ValueError` if the callback was told of something that the module does not have."""
        check_patterns(module, self.selection)
        if self.routers is not None:
            self.routers.find(module)
        if self.recalibrate_batches is None:
            return
        if not batch_norms(module):
            raise ValueError(f"recalibrate_batches is for batch norm layers, of which {type(module).__name__} has none")
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise ValueError("recalibrate_batches needs a training step that takes batches, not dataloader_iter")

    def _remember_inputs(self, module: LightningModule, batch: Any) -> None:
        """For `recalibrate_`, before a training step."""
        self._inputs.append(module, batch)
        if "tried" not in self._said and not has_lazy_parameters(module):
            # Before hours of training, rather than at the first merged validation.
            self._said.add("tried")
            batch_statistics(module, self._inputs, self._step_context)
        if self.save_state == "full" and not self._inputs.is_plain:
            self._say(
                "inputs other than tensors, numbers and strings in lists and dicts do not go into checkpoints; after a"
                f" resume batch norm statistics are those of {self.recalibrate_batches} batches only once so many have"
                " been trained on",
                topic="inputs",
                warn=True,
            )

    def _new_capture(self) -> SnapshotCapture:
        return SnapshotCapture(
            self.every_n_train_steps,
            self.num_snapshots,
            [merge for merge in self.merges.values() if not is_average(merge)],
            self.start,
            self.dtype,
            storage=self.storage,
            name=self.name,
            averages={name: merge for name, merge in self.merges.items() if is_average(merge)},
            selection=self.selection,
        )

    def _is_captured(self, name: str | None) -> bool:
        if is_average(self._merge(name)):
            return self._capture.shadows[name or self._primary].step is not None
        return bool(self.snapshot_steps)

    def _check_captured(self, is_captured: bool) -> None:
        if not is_captured:
            begins = "once the learning rate is constant" if self.start == "stable" else f"at step {self.start}"
            raise RuntimeError(f"nothing was captured yet, so there is no merge: capturing begins {begins}")

    def _elapsed(self) -> float:
        return self._budget.elapsed + time.perf_counter() - self._began

    def _fits_budget(self, trainer: Trainer) -> bool:
        if self.max_overhead is None:
            return True
        # Clocks of ranks differ, and all have to validate or none.
        is_allowed: bool = trainer.strategy.broadcast(self._budget.allows(time.perf_counter() - self._began))
        self._budget.num_skipped += not is_allowed
        return is_allowed

    def _drop_unusable(self) -> None:
        for problem in self._capture.drop_unusable():
            rank_zero_warn(f"MergeCallback({self.name!r}): a snapshot is left out of the merges: {problem}")

    def _proper_coefficients(self, name: str) -> list[float] | None:
        """Those of a merge; none of an average; None where its rule fails now."""
        try:
            return [] if is_average(self._merge(name)) else list(self.coefficients(name).values())
        except ValueError as error:
            # A rule that never worked is a mistake to mend; one that worked before must not end a long run.
            if name not in self._worked:
                raise
            rank_zero_warn(f"MergeCallback({self.name!r}): no merge {name!r} at step {self._step}: {error}")
            return None

    def _rows(self, names: Sequence[str]) -> Iterator[tuple[str, list[float], list[Tensor]]]:
        """The merges of those names as far as their rules work, and their coefficients; each good until the next."""
        usable = {name: values for name in names if (values := self._proper_coefficients(name)) is not None}
        over_snapshots = [values for values in usable.values() if values]
        rows = self._capture.ring.merges(over_snapshots) if self._capture.ring is not None else iter(())
        for name, values in usable.items():
            yield name, values, next(rows) if values else self._capture.shadow_row(name)

    def _row(self, name: str | None) -> list[Tensor]:
        """The merge of that name, made anew."""
        if is_average(self._merge(name)):
            self._capture.check_shadow(name or self._primary)
            return self._capture.shadow_row(name or self._primary)
        assert self._capture.ring is not None
        return self._capture.ring.combine(list(self.coefficients(name).values()))

    def _buffers(self, name: str | None) -> dict[str, Tensor]:
        return self._capture.shadow_buffers if is_average(self._merge(name)) else self._capture.buffers

    def _choices(self, trainer: Trainer) -> dict[str, Choices]:
        """Of the routers, as the module is now."""
        if (routers := self.routers) is None:
            return {}
        return routers.choices(trainer.lightning_module, lambda: evaluate(trainer, routers.num_batches))

    def _diagnostics(self, coefficients: list[float], row: list[Tensor]) -> dict[str, float]:
        """Of the primary merge."""
        merge = self._merge(None)
        if is_average(merge):
            return {"span_steps": merge.span_steps(self._step)}
        used = [step for step, value in zip(self.snapshot_steps, coefficients, strict=True) if value != 0]
        spread = self._capture.spread(coefficients, row)
        return {"num_snapshots": float(len(used)), "span_steps": float(used[-1] - used[0]), "spread": spread}

    def _curvature_gain(self, evaluation: _Evaluation) -> dict[str, float]:
        """Of the first loss, where every snapshot of the primary merge was validated when it was the live model."""
        if not self._history or self._history[-1].step != self._step:
            return {}
        values = evaluation.merged[self._primary]
        metric = next((name for name, value in values.items() if not self._is_higher_better(name, value)), None)
        if metric is None or metric not in self._history[-1].merged:
            return {}
        losses = {known.step: known.live[metric] for known in self._history if metric in known.live}
        merged = self._history[-1].merged[metric]
        found = curvature_gain(evaluation.coefficients[self._primary], losses, merged)
        return {} if found is None else {"curvature_gain": found}

    def _merged(self, evaluation: _Evaluation, live: Mapping[str, LoggedValue]) -> dict[LoggedName, LoggedValue]:
        """Merged values and gains."""
        logged = {}
        in_bar = next((metric for metric, value in live.items() if value.prog_bar), None)
        for name, values in evaluation.merged.items():
            for metric, merged in values.items():
                is_better_higher = self._is_higher_better(metric, merged)
                logged[self._name("merged", metric, name)] = replace(
                    merged, prog_bar=name == self._primary and metric == in_bar, higher_is_better=is_better_higher
                )
                if metric in live:
                    better = gain(live[metric].value, merged.value, is_better_higher)
                    logged[self._name("merge_gain", metric, name)] = LoggedValue(better, logger=merged.logger)
        return logged

    def _show(
        self,
        trainer: Trainer,
        evaluation: _Evaluation,
        live: Mapping[str, LoggedValue],
        logged: Mapping[LoggedName, LoggedValue],
        step: int,
    ) -> None:
        """Brings dashboards, and what is said at the end, up to date; on one rank."""
        began = time.perf_counter()
        self._dashboards.show(trainer.loggers, logged, step, evaluation.coefficients.get(self._primary))
        merges = {}
        for name, coefficients in evaluation.coefficients.items():
            merge = self._merge(name)
            span_steps = merge.span_steps(self._step) if is_average(merge) else 0.0
            merges[self._label(name)] = MergeNow(name, coefficients, span_steps)
        self._closing = partial(self._dashboards.closing_table, self._step, live, logged, merges)
        self._budget.spend(time.perf_counter() - began)

    def _close(self, trainer: Trainer) -> None:
        stop_observing_validations(trainer, self)
        # The model is about to leave its device, and a copy of it may still be under way.
        self._capture.finish()
        self._dashboards.close()
        if self._closing is not None:
            spent, elapsed = self._budget.spent, self._elapsed()
            cost = f"merges took {spent:.1f} s, {spent / elapsed:.1%} of the run"
            self._say(f"{cost}\n{self._closing()}", topic="closing")
            self._closing = None

    def _learn(self, trainer: Trainer, live: Mapping[str, LoggedValue]) -> None:
        """Remembers this validation, and what real anneals make of it, where merge and live model can be compared."""
        if not (self.is_evaluated and self._capture.is_comparable):
            return
        assert self._evaluation is not None
        self._remember(self._evaluation, live)
        if self._anneals is not None:
            if problem := self._anneals.update(self._history, may_write=trainer.is_global_zero):
                self._say(f"the records of anneals were left alone: {problem}", topic="records", warn=True)
            self._predictions = self._predict(self._anneals, self._evaluation.merged[self._primary])

    def _predicted(self, trainer: Trainer, live: Mapping[str, LoggedValue]) -> dict[LoggedName, LoggedValue]:
        """What to log of the predictions; at the end of a decay, also how wrong they were."""
        logged: dict[LoggedName, LoggedValue] = {}
        is_decaying = not self._capture.phase.is_stable
        if not is_decaying and (self._evaluation is None or not self._capture.is_comparable):
            return logged
        self._is_checked = is_decaying and is_last_validation(trainer)
        for metric, prediction in self._predictions.items():
            name = self._name("annealed", metric)
            ends = zip(("", *BOUNDS), (prediction.value, prediction.low, prediction.high), strict=True)
            numbers = {replace(name, end=end): value for end, value in ends}
            if self._is_checked and metric in live:
                numbers[replace(name, kind="annealed_error")] = prediction.value - float(live[metric].value)
            is_written = metric not in live or live[metric].logger
            logged |= {n: LoggedValue(torch.tensor(value), logger=is_written) for n, value in numbers.items()}
        if self._predictions and self.calibration == PRIOR:
            logged[self._name("merge", "is_prior")] = LoggedValue(torch.tensor(1.0))
        return logged

    def _predict(self, anneals: AnnealCalibration, merged: Mapping[str, LoggedValue]) -> dict[str, Prediction]:
        predictions = {}
        for metric in self._history[-1].merged:
            # The prior is about losses.
            if anneals.source == PRIOR and self._is_higher_better(metric, merged[metric]):
                continue
            if (basis := anneals.basis(self._history, metric)) is not None:
                predictions[metric] = basis.predict(self._history[-1], metric)
                self._say(f"{self._name('annealed', metric)} predicts {basis}", topic=f"annealed {metric}")
        if not predictions:
            self._say(f"uncalibrated: {self.calibration} holds too few anneals to predict one", topic="uncalibrated")
        return predictions

    def _remember(self, evaluation: _Evaluation, live: Mapping[str, LoggedValue]) -> None:
        primary, merge = evaluation.merged[self._primary], self._merge(None)
        values = {name: float(live[name].value) for name in primary if name in live}
        merged = {name: float(primary[name].value) for name in values}
        if evaluation.live is not None:
            # The merge was evaluated on fewer batches, and there it is the difference that counts.
            gains = {name: gain(float(evaluation.live[name].value), merged[name]) for name in values}
            merged = {name: values[name] - gains[name] for name in values}
        span_steps = round(evaluation.diagnostics["span_steps"])
        rule = repr(merge) if is_average(merge) else rule_label(merge)
        self._history.append(TrunkValues(self._step, span_steps, values, merged, rule))

    def _merge(self, name: str | None) -> Rule | Average:
        if name is not None and name not in self.merges:
            raise ValueError(f"there is no merge called {name!r}; there are: {', '.join(self.merges)}")
        return self.merges[name or self._primary]

    def _label(self, merge: str | None = None) -> str:
        """What is added to logged names: the callback's name unless it is the default, the merge's unless primary."""
        parts = [self.name if self.name != "merge" else None, merge if merge != self._primary else None]
        return "".join(f"_{safe_name(part)}" for part in parts if part)

    def _name(self, kind: str, metric: str, merge: str | None = None) -> LoggedName:
        return LoggedName(kind, self._label(merge or self._primary), metric)

    @contextmanager
    def _swapped_in(self, module: torch.nn.Module, row: list[Tensor], buffers: dict[str, Tensor]) -> Iterator[None]:
        assert self._capture.layout is not None
        merged = self._capture.layout.views(row)
        self._capture.finish()
        live = tensors_by_name(module, [*merged, *buffers])
        # Copies, since a forward pass may write to buffers; and Lightning takes the model off its device after a fit.
        merged |= {name: buffer.to(local(live[name]).device, copy=True) for name, buffer in buffers.items()}
        with swapped_weights(live, merged, before=partial(reshard, module)):
            if self.recalibrate_batches is not None:
                recalibrate_(module, self._inputs, self._step_context)
            yield

    def _is_higher_better(self, metric: str, merged: LoggedValue) -> bool:
        # A pattern for `acc` also means what Lightning makes of it: `acc_epoch`, `acc/dataloader_idx_0`.
        plain = metric.partition("/dataloader_idx_")[0].removesuffix("_epoch")
        names = (metric, plain)
        by_pattern = any(fits(name, self.higher_is_better) for name in names)
        return by_pattern or bool(merged.higher_is_better)

    def _say(self, text: str, topic: str, warn: bool = False) -> None:
        """Once a fit."""
        if topic not in self._said:
            self._said.add(topic)
            (rank_zero_warn if warn else rank_zero_info)(f"MergeCallback({self.name!r}): {text}")

    def _explain_phase(self, trainer: Trainer, is_end: bool = False) -> None:
        if self._capture.phase.is_stable or self.start != "stable":
            return
        if any(map(self._is_captured, self.merges)):
            window = (
                f"the window of {len(self.snapshot_steps)} snapshots up to step {max(self.snapshot_steps, default=0)}"
            )
            self._say(
                f"the learning rate moved at step {self._step}: {window if self.snapshot_steps else 'the average'}"
                " stays as it is until the rate is constant again",
                topic="frozen",
            )
        elif self._capture.phase.never_settled(0 if is_end else trainer.estimated_stepping_batches):
            self._say(
                f"the learning rate was not constant in {self._capture.phase.num_unsettled_steps} steps (a cosine"
                " schedule? a schedule-free optimizer?), so nothing was captured. MergeCallback(start=STEP) captures"
                " from a step on whatever the rate does; what its merge says about annealing then is less certain",
                topic="unsettled",
                warn=True,
            )
