"""A progress bar whose line fits 80 columns."""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from merge_callback.utilities.calls import ShownAsItsCall


class LiveAndMergedBar(ShownAsItsCall, TQDMProgressBar):
    """Shows only one metric, live and merged, under short names, so that the line fits 80 columns.

    Args:
        metric: Name of a metric that the validation shows in progress bars (``prog_bar=True``).
        refresh_rate: Batches between two updates of the bar.
        forecast: Also shows what ``MergeCallback(forecast=...)`` forecasts of the metric.
    """

    def __init__(self, metric: str, refresh_rate: int = 1, *, forecast: bool = False) -> None:
        super().__init__(refresh_rate)
        self.metric = metric
        self.forecast = forecast
        # Batches of the epoch that were done before it was resumed.
        self._num_done = 0

    @property
    def total_train_batches(self) -> int | float:
        """Number of the epoch's batches, also in a run that was resumed within it, where Lightning counts the rest."""
        trainer = self.trainer
        if trainer.max_epochs != -1 or trainer.max_steps <= 0:
            return super().total_train_batches
        num_accumulated = trainer.accumulate_grad_batches
        remaining = (trainer.max_steps - trainer.global_step) * num_accumulated - self._num_done % num_accumulated
        return min(trainer.num_training_batches, self._num_done + remaining)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        done: int = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        self._num_done = done if done < trainer.num_training_batches else 0
        # Lightning sets the bar's length when an epoch starts, which does not happen in a run resumed within an epoch.
        bar, total = self.train_progress_bar, self.total_train_batches
        bar.reset(None if math.isinf(total) else int(total))
        # What was done before the interruption took no time of this run.
        bar.initial = bar.n = self._num_done
        bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_train_epoch_start(self, trainer: Trainer, *arguments: Any) -> None:
        self._num_done = 0
        super().on_train_epoch_start(trainer, *arguments)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        # A callback that has a name shows it in the bar.
        merged = next((key for key in metrics if key == "merged" or key.startswith("merged_")), "merged")
        shown = {"live": self.metric, "merged": merged}
        found = {name: metrics[key] for name, key in shown.items() if key in metrics}
        forecast = f"forecast{merged.removeprefix('merged')}/{self.metric}"
        if self.forecast and (foretold := trainer.callback_metrics.get(forecast)) is not None:
            found["forecast"] = float(foretold)
        return found
