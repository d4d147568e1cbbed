"""`MergeCallback`: the arguments and methods for users. Each hook is passed on to the session of the run."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from merge_callback.callbacks import arguments
from merge_callback.callbacks.base import MergesOfARun
from merge_callback.callbacks.parts import Parts
from merge_callback.callbacks.pickling import PickledWithoutItsRun
from merge_callback.callbacks.session import state_copies
from merge_callback.callbacks.trainer_session import TrainerSession
from merge_callback.capture.directory import SnapshotDirectory
from merge_callback.capture.places import SnapshotMemory
from merge_callback.capture.state import without_shards
from merge_callback.capture.window import Start
from merge_callback.live.batch_norm import Recalibration
from merge_callback.merging.averages import Average
from merge_callback.merging.rules import Rule
from merge_callback.utilities.checks import check_count, check_limit, check_optional_count, check_share
from merge_callback.utilities.messages import Messages
from merge_callback.validation.budget import Budget
from merge_callback.validation.merged_validation import MergedValidation


class MergeCallback(MergesOfARun, PickledWithoutItsRun):
    """Logs the metrics of a merge of recent weights beside the live ones: the model as if it were annealed now.

    Keeps a ring of the latest snapshots while the learning rate is constant, merges them at every validation, validates
    the merge on the same batches, and logs ``merged/m`` and ``merge_gain/m`` beside every metric ``m``. Training is
    bit-identical to training without the callback. Implements *Model Merging in Pre-training of Large Language Models*
    (arXiv 2505.12082); `merge_callback.merging.rules` explains which learning-rate decay a merge corresponds to.

    Args:
        every_n_train_steps: Optimizer steps between two snapshots; with several optimizers a step is one round of them.
            None starts at one and doubles, so that the ring always covers at least the last tenth of training.
        num_snapshots: Capacity of the ring of snapshots.
        merges: The merge to evaluate: a rule's name (``"sma"``, ``"wma"``, ``"ema"``, ``"linear"``, ``"1-sqrt"``,
            ``"cosine"``, ``"qam"``), a `Window`, an `Extrapolate`, a function of the snapshots' steps, or an `Ema` or
            `PowerEma` over every step. For several, a mapping of names to any of these; the first is the primary one.
        snapshot: ``"point"`` keeps the weights at the end of each interval, as the paper does. ``"mean"`` keeps their
            mean over the interval, so that in windows of a tenth of training four means do what ten points do.
            `merge_callback.merging.rules` says what each rule makes of means.
        mean_samples: How many steps of an interval a mean takes, evenly and with the last one; None is every step up to
            8, else 8. Each costs a pass over the weights.
        start: ``"stable"`` captures while the learning rate is constant, and begins a new window when it is constant
            again at another value. ``"any"`` captures whatever the rate does, and an int from that optimizer step on.
        storage: Where snapshots are kept: ``"device"`` (memory of the model's device), ``"cpu"`` (host memory), or the
            path of a directory, with one file per snapshot and rank. Merges are made in host memory except with
            ``"device"``. `SnapshotMemory` and `SnapshotDirectory` can also leave snapshots out of checkpoints.
        dtype: Dtype of the snapshots, such as ``"bfloat16"``; None keeps each parameter's own.
        evaluate_every_n_validations: Evaluates the merges at every n-th validation.
        limit_batches: How much of each validation loader a merged validation uses: a number of batches, a share, or
            None for as much as the live one. With a limit, the gain is that on the same batches: for means over batches
            they are taken from the live validation, for other metrics the live model is validated on them again.
        max_overhead: Largest share of the run's wall time that the callback may take, such as 0.02. Merged validations
            that would exceed it are skipped, except the first, and ``merge/num_skipped`` counts them. None: no limit.
        calibration: The file to which `AnnealBranch` appends its records, also while this run goes on; or ``"prior"``
            for the values that this project's benchmark found in runs with AdamW. From two branches on,
            ``annealed/m`` is predicted and logged with its interval. None predicts nothing.
        forecast: Logs ``forecast/m`` of every loss with its interval: its value after a linear decay that begins now
            and takes this share of all steps at its end, or this many steps if it is an int. Needs no real anneal. With
            two merges such as ``{"sma": "sma", "wma": "wma"}`` it is more exact. None logs none.
        higher_is_better: Patterns (``"*acc*"``) of metrics where more is better, for the sign of ``merge_gain/m``.
            Not needed for logged torchmetrics objects, which state it themselves.
        parts: Patterns (``"*lora*"``) of the parameters to merge, or `Parts`; the others stay live.
        recalibrate_batches: Computes batch norm statistics for the merge from the inputs of this many of the latest
            training batches, instead of copying those of the newest snapshot. The module is called with the first item
            of a batch. The inputs are kept and saved in checkpoints. None for models without such layers.
        name: Distinguishes several callbacks of one Trainer, in checkpoints and in logged names.

    Raises:
        ValueError: If an argument has an invalid value; the message names both.
        TypeError: If an argument has another type than described.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from merge_callback import MergeCallback, Window
        >>> callback = MergeCallback(every_n_train_steps=100, merges={"sma": "sma", "late": Window(span=0.05)})
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    _session: TrainerSession
    _RUN = "fit"
    _COPIES = (
        ". Some packages copy callbacks before a fit; the one that was used is in trainer.callbacks, or where the"
        " package keeps the Trainer's arguments, such as nf.models[0].trainer_kwargs['callbacks'] in neuralforecast"
    )

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        num_snapshots: int = 10,
        *,
        merges: str | Rule | Average | Mapping[str, str | Rule | Average] = "sma",
        snapshot: Literal["point", "mean"] = "point",
        mean_samples: int | None = None,
        start: Start = "stable",
        storage: str | SnapshotMemory | SnapshotDirectory | os.PathLike[str] = "device",
        dtype: torch.dtype | str | None = None,
        evaluate_every_n_validations: int = 1,
        limit_batches: int | float | None = None,
        max_overhead: float | None = None,
        calibration: str | os.PathLike[str] | None = None,
        forecast: float | int | None = None,
        higher_is_better: str | Sequence[str] = (),
        parts: str | Parts | Sequence[str] = "*",
        recalibrate_batches: int | None = None,
        name: str = "merge",
    ) -> None:
        check_optional_count("every_n_train_steps", every_n_train_steps)
        super().__init__(
            every_n_train_steps,
            num_snapshots,
            merges,
            snapshot=snapshot,
            mean_samples=mean_samples,
            start=start,
            storage=storage,
            dtype=dtype,
            calibration=calibration,
            forecast=forecast,
            higher_is_better=higher_is_better,
            parts=parts,
            name=name,
        )
        check_count("evaluate_every_n_validations", evaluate_every_n_validations)
        check_limit(limit_batches)
        check_share("max_overhead", max_overhead)
        check_optional_count("recalibrate_batches", recalibrate_batches)
        self.evaluate_every_n_validations = evaluate_every_n_validations
        self.limit_batches = limit_batches
        self.max_overhead = max_overhead
        self.recalibrate_batches = recalibrate_batches
        self.begin_anew()

    @property
    def session(self) -> TrainerSession:
        """The session of the latest run: captured weights, merges and validations. Other callbacks use it."""
        return self._session

    def merged_state_dict(self, name: str | None = None) -> dict[str, Tensor]:
        """Returns the merge as a state dict of the LightningModule, which loads it with ``strict=True``.

        Trainable parameters are merged, floating-point buffers are those of the newest snapshot, and all else is live.
        The tensors are copies, sharded like the live ones. Raises the same errors as `merged_weights`.
        """
        merges, module = self.captured_merges(), self._session.module
        assert module is not None
        with merges.merged_weights(module, name):
            return state_copies(module)

    def save_merged(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Writes the merge with its provenance to a file, atomically. All ranks must call it; rank 0 writes.

        Args:
            path: Missing folders are created. A ``.ckpt`` works with ``load_from_checkpoint``, and with
                ``Trainer.fit(ckpt_path=...)``, which starts a new run from the merge. A ``.safetensors`` holds only the
                state dict. A sharded model can also be saved to a path without a suffix, which becomes a folder.
            name: Name of the merge; None is the primary one.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If the path has another suffix, or no merge has this name.
            OSError: If the file cannot be written.
        """
        self.captured_merges()
        self._session.save_merged(path, name)

    def begin_anew(self) -> None:
        self._session = self._new_session()
        # State from a checkpoint, kept until training starts: some strategies load before the model is on its device.
        self._pending: dict[str, Any] | None = None

    # Hooks, called by Lightning.

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        arguments.refuse_strategy(trainer.strategy)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        known = {each.name: each.session.validation.labels for each in callbacks if isinstance(each, MergeCallback)}
        arguments.refuse_same_names(known)
        self._pending = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict

    def state_dict(self) -> dict[str, Any]:
        return self._session.state_dict() if self._pending is None else without_shards(self._pending)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._pending is None:
            self._session.put_shards_into(checkpoint, self.state_key)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)
        self._session.validation.begin(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._session.before_batch(trainer, pl_module, batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._session.capture.finish()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._session.after_batch(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.end(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._pending is not None:
            # The checkpoint of a finished run: nothing was trained, but its merges can be used.
            self._begin(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._session.close(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._session.close(trainer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continues the session of the previous fit, or begins a new one."""
        # A checkpoint, also one without a state of this callback, brings other weights.
        is_loaded = self._pending is not None or trainer.ckpt_path is not None
        if is_loaded or not self._session.is_continued_by(trainer, pl_module):
            self.parts.check(pl_module)
            self._session = self._new_session()
        self._session.begin(trainer, pl_module, self._pending)
        self._pending = None

    def _new_session(self) -> TrainerSession:
        """Returns a session in which nothing was captured or validated yet."""
        messages = Messages(f"MergeCallback({self.name!r})")
        recalibration = Recalibration(self.recalibrate_batches, messages)
        merges = self._new_merges(recalibration, messages)
        names = self._new_names(merges)
        validation = MergedValidation(
            merges,
            names,
            self._new_predictions(merges, names, messages),
            Budget(self.max_overhead),
            messages,
            every_n_validations=self.evaluate_every_n_validations,
            limit_batches=self.limit_batches,
            routers=self.parts.routers,
        )
        return TrainerSession(merges, recalibration, validation, messages)
