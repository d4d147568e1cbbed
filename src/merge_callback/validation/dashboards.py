"""Shows logged values as charts in loggers, beyond plain metrics.

TensorBoard gives a run one colour, so live and merged values of one run look alike there. Merged, annealed and forecast
values are therefore written again as separate runs below the log folder, ``merged``, ``annealed`` and ``forecast``,
under the name of the live metric. So one chart shows all of them, each in its own colour. The layout of the Custom
Scalars page is stored in these runs too. A user may have written one for the run itself; TensorBoard shows both. For
Weights & Biases, merged values and gains are defined with their best value, and one chart shows all values of the first
loss. Other loggers need only the metrics, whose names they all accept.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from merge_callback.live.evaluate import LoggedValue
from merge_callback.utilities.checks import how_to_install
from merge_callback.validation.logged import BOUNDS, LoggedName
from merge_callback.validation.wandb_charts import WandbChart

# The diagnostics of a merge that get a chart.
DIAGNOSTICS = ("num_snapshots", "span_steps", "spread", "seconds", "num_skipped")


def scalar_layout(metrics: Iterable[str], label: str = "") -> dict[str, dict[str, list[Any]]]:
    """Returns TensorBoard's layout of custom scalars: category -> chart -> kind of chart and patterns of tags.

    Args:
        metrics: Live metrics that have merged values.
        label: The callback's label in logged names.

    Examples:
        >>> scalar_layout(["loss"])["Live, merged, annealed"]
        {'loss': ['Multiline', ['^loss$']]}
    """
    metrics = list(metrics)
    return {
        # The live, merged and annealed runs all use the live metric's name.
        f"Live, merged, annealed{label}": {metric: ["Multiline", [f"^{re.escape(metric)}$"]] for metric in metrics},
        # The pattern fits all merges, including those that are logged later.
        f"Gain of the merge{label}": {
            metric: ["Multiline", [f"^merge_gain(?!_stderr){label}(_[^/]*)?/{re.escape(metric)}$"]]
            for metric in metrics
        },
        f"Merge{label}": {name: ["Multiline", [f"^merge{label}/{name}$"]] for name in DIAGNOSTICS},
    }


def prediction_layout(metrics: Iterable[str], label: str = "") -> dict[str, dict[str, list[Any]]]:
    """Returns the layout of the charts of predictions, which list full tags: margin charts take no patterns."""
    return {f"Predicted, with interval{label}": _margins("annealed", metrics, label)}


def forecast_layout(metrics: Iterable[str], label: str = "") -> dict[str, dict[str, list[Any]]]:
    """Returns the layout of the charts of forecasts."""
    return {f"If annealed now, with interval{label}": _margins("forecast", metrics, label)}


def _margins(kind: str, metrics: Iterable[str], label: str) -> dict[str, list[Any]]:
    names = {metric: [str(LoggedName(kind, label, metric, end)) for end in ("", *BOUNDS)] for metric in metrics}
    return {metric: ["Margin", tags] for metric, tags in names.items()}


class Dashboards:
    """Shows a callback's results in the run's loggers. Used only on the rank that logs.

    Args:
        label: The callback's label in logged names.
    """

    def __init__(self, label: str = "") -> None:
        self.label = label
        self.chart = WandbChart(label)
        self._begin()

    def _begin(self) -> None:
        self._num_shown = 0
        self._runs: dict[str, Any] = {}
        # Parts of TensorBoard's layout already written, and names already defined in Weights & Biases.
        self._laid_out: set[tuple[str, str]] = set()
        self._defined: set[str] = set()
        self._wandb: list[Any] = []
        self._is_without_figures = False

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out open writers and loggers: a copy opens its own."""
        return self.__dict__ | {"_runs": {}, "_wandb": []}

    def show(
        self,
        loggers: Iterable[Any],
        live: Mapping[str, LoggedValue],
        logged: Mapping[LoggedName, LoggedValue],
        step: int,
        coefficients: Mapping[int, float],
        *,
        intervals: Sequence[Sequence[int]] = (),
    ) -> None:
        """Updates the charts after a validation.

        Args:
            loggers: The Trainer's loggers.
            live: Metric -> live value.
            logged: The values that the callback logs at this validation.
            step: The step under which Lightning logs them.
            coefficients: Coefficients of the primary merge by snapshot step; empty if it is not made of snapshots.
                They are drawn at the first, second, fourth, eighth ... call.
            intervals: First and last step of each snapshot that is a mean; empty for points.
        """
        self._num_shown += 1
        # True for powers of two.
        is_drawn = self._num_shown & (self._num_shown - 1) == 0
        written = {name: value for name, value in logged.items() if value.logger}
        self._wandb.clear()
        for logger in loggers:
            # By name: `lightning` and `pytorch_lightning` each have their own logger classes.
            kinds = {base.__name__ for base in type(logger).__mro__}
            if "TensorBoardLogger" in kinds:
                self._show_in_tensorboard(logger, written, step)
                if coefficients and is_drawn:
                    self._draw(logger, coefficients, intervals, step)
            elif "WandbLogger" in kinds:
                self._define_in_wandb(logger, written)
                self._wandb.append(logger)
        if self._wandb:
            self.chart.add(live, written, step)
            if is_drawn:
                self.chart.draw(self._wandb)

    def close(self) -> None:
        """Draws the last charts and closes all writers, at the end of a fit."""
        self.chart.draw(self._wandb)
        for run in self._runs.values():
            run.close()
        self._begin()

    def _show_in_tensorboard(self, logger: Any, logged: Mapping[LoggedName, LoggedValue], step: int) -> None:
        layouts = {"merged": scalar_layout, "annealed": prediction_layout, "forecast": forecast_layout}
        for name, value in logged.items():
            if name.kind not in layouts or name.end:
                continue
            run = self._run(logger, f"{name.kind}{name.label}")
            run.add_scalar(name.metric, float(value.value), step)
            if (part := (logger.log_dir, name.kind)) not in self._laid_out:
                self._laid_out.add(part)
                metrics = dict.fromkeys(each.metric for each in logged if each.kind == name.kind)
                run.add_custom_scalars(layouts[name.kind](metrics, self.label))
        for run in self._runs.values():
            run.flush()

    def _run(self, logger: Any, name: str) -> Any:
        folder = os.path.join(logger.log_dir, name)  # noqa: PTH118 (it may be a remote one)
        if folder not in self._runs:
            # The same class as the logger's own writer, torch's or tensorboardX's.
            self._runs[folder] = type(logger.experiment)(folder)
        return self._runs[folder]

    def _draw(
        self, logger: Any, coefficients: Mapping[int, float], intervals: Sequence[Sequence[int]], step: int
    ) -> None:
        try:
            from merge_callback.validation.figures import pixels, plot_merge
        except ModuleNotFoundError as error:
            if not self._is_without_figures:
                rank_zero_info(
                    f"no figure of the merge in TensorBoard, since {error.name} is not installed:"
                    f" {how_to_install('dashboards')}"
                )
            self._is_without_figures = True
            return
        image = pixels(plot_merge(coefficients, intervals))
        logger.experiment.add_image(f"merge{self.label}/coefficients", image, step, dataformats="HWC")

    def _define_in_wandb(self, logger: Any, logged: Mapping[LoggedName, LoggedValue]) -> None:
        for name, value in logged.items():
            if str(name) in self._defined or name.kind not in ("merged", "merge_gain"):
                continue
            self._defined.add(str(name))
            best = "max" if name.kind == "merge_gain" or value.higher_is_better else "min"
            # The full name: a pattern would compete with the one that Lightning defines for all metrics. Dots are
            # escaped: Weights & Biases reads them as paths into nested entries.
            whole = str(name).replace(".", r"\.")
            logger.experiment.define_metric(whole, step_metric="trainer/global_step", summary=f"{best},last")
