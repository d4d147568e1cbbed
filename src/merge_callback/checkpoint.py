"""`MergedCheckpoint`: Lightning's `ModelCheckpoint`, with the merge in its files."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from merge_callback.callback import MergeCallback


class MergedCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` whose files hold merged weights, kept by a merged metric.

    Its files are those of `MergeCallback.save_merged`: weights with provenance, no optimizer. A run's own checkpoints,
    to resume from, stay the business of a plain `ModelCheckpoint` beside it. Nothing is saved, and nothing is wrong,
    while there is no merge yet; a file that cannot be written is named in a warning, and training goes on.

    Args:
        merge_callback: Whose merge is saved.
        merge: Which of its merges; None is the primary one.
        **arguments: As `ModelCheckpoint` takes them, ``monitor="merged/val_loss"``, ``save_top_k=3`` and so on.

    >>> from merge_callback import MergeCallback, MergedCheckpoint
    >>> merging = MergeCallback()
    >>> callbacks = [merging, MergedCheckpoint(merging, monitor="merged/val_loss", filename="merged-{step}")]
    """

    def __init__(self, merge_callback: MergeCallback, merge: str | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.merge_callback = merge_callback
        self.merge = merge

    @property
    def state_key(self) -> str:
        return f"{super().state_key}[{self.merge_callback.state_key}{self.merge or ''}]"

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.monitor is None or self.monitor in monitor_candidates:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if not self.merge_callback.snapshot_steps:
            return
        if trainer.is_global_zero:
            try:
                self.merge_callback.save_merged(filepath, self.merge)
            except OSError as error:
                rank_zero_warn(f"MergedCheckpoint: {error}. Training goes on.")
                return
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
