"""`MergedCheckpoint`: Lightning's `ModelCheckpoint`, with merged weights in its files."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from merge_callback.callbacks.merge_callback import MergeCallback


class MergedCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that saves merged weights, and can keep the best ones by a merged metric.

    Its files are those of `MergeCallback.save_merged`: weights with provenance, but no optimizer. To resume a run, add
    a plain `ModelCheckpoint` beside it. While there is no merge yet, nothing is saved, without a warning. If a file
    cannot be written, a warning names it and training goes on.

    List it after its `MergeCallback`. `lightning.pytorch` puts it there by itself; `pytorch_lightning` does not.

    Args:
        merge_callback: Makes the merges.
        merge: Name of the merge to save; None is the primary one.
        **arguments: Arguments of `ModelCheckpoint`, such as ``monitor="merged/val_loss"`` and ``save_top_k=3``.

    Raises:
        TypeError: If ``merge_callback`` is not a `MergeCallback`.
        ValueError: If it has no merge with this name.

    Examples:
        >>> from merge_callback import MergeCallback, MergedCheckpoint
        >>> merging = MergeCallback()
        >>> callbacks = [merging, MergedCheckpoint(merging, monitor="merged/val_loss", filename="merged-{step}")]
    """

    # Not the name that Lightning looks for: `ckpt_path="last"` must never find a merge.
    CHECKPOINT_NAME_LAST = "merged-last"

    def __init__(self, merge_callback: MergeCallback, merge: str | None = None, **arguments: Any) -> None:
        if not isinstance(merge_callback, MergeCallback):
            raise TypeError(f"merge_callback must be a MergeCallback, got {merge_callback!r}")
        if merge is not None and merge not in merge_callback.merges:
            raise ValueError(f"there is no merge called {merge!r}; there are: {', '.join(merge_callback.merges)}")
        super().__init__(**({"filename": "merged-{epoch}-{step}"} | arguments))
        self.merge_callback = merge_callback
        self.merge = merge

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

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        # A value of an earlier validation says nothing about the current merge.
        if self.monitor is None or (
            self.monitor in monitor_candidates and self.merge_callback.session.validation.is_evaluated
        ):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if not self.merge_callback.session.merges[self.merge].is_ready:
            return
        try:
            self.merge_callback.save_merged(filepath, self.merge)
        except (OSError, ValueError) as error:
            rank_zero_warn(f"MergedCheckpoint: {error}. Training goes on.")
            return
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        # Lightning resolves `ckpt_path="last"` with this, and no run can be resumed from a merge.
        return set()
