"""A progress bar whose line fits 80 columns."""

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
        found = {name: metrics[key] for name, key in shown.items() if key in metrics}
        if self.forecast and (foretold := trainer.callback_metrics.get(f"forecast/{self.metric}")) is not None:
            found["forecast"] = float(foretold)
        return found
