"""A progress bar whose line fits 80 columns."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class LiveAndMergedBar(TQDMProgressBar):
    """Shows only one metric, live and merged, under short names, so that the line fits 80 columns.

    Args:
        metric: Name of a metric that the validation shows in progress bars (``prog_bar=True``).
        refresh_rate: Batches between two updates of the bar.
    """

    def __init__(self, metric: str, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate)
        self.metric = metric

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Lightning sets the bar's length when an epoch starts, which does not happen in a run resumed within an epoch.
        self.train_progress_bar.reset(int(self.total_train_batches))
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        shown = {"live": self.metric, "merged": "merged"}
        return {name: metrics[key] for name, key in shown.items() if key in metrics}
