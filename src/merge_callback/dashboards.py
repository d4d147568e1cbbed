"""What loggers and the terminal are shown beyond plain metrics: logged names and values in, charts and a table out.

TensorBoard gives a run one colour, so live and merged values of one run look alike there. They are therefore written
once more as runs of their own below the log folder, ``merged`` and ``annealed``, under the live metric's name: one
chart, a colour for each, without a click. The layout of the Custom Scalars page lies there too, beside one that a user
may have written for the run itself: TensorBoard shows both, and neither replaces the other. Weights & Biases is told
which value of a metric is its best. Other loggers need nothing but the metrics, whose names all of them take.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from merge_callback.evaluate import LoggedValue
from merge_callback.tables import NOTHING, text_table

# Ends of an interval; drawn with the prediction they belong to.
_BOUNDS = ("/low", "/high")


@dataclass(frozen=True)
class _Name:
    """A logged name taken apart: ``merge_gain_late/val_loss`` is a ``merge_gain`` of ``_late`` and ``val_loss``."""

    kind: str
    label: str
    metric: str

    @classmethod
    def of(cls, name: str) -> "_Name":
        prefix, _, metric = name.partition("/")
        # The longer ones first: a gain is no diagnostic, and the error of a prediction is none itself.
        kinds = ("merge_gain", "merged", "merge", "annealed_error", "annealed")
        kind = next(kind for kind in kinds if prefix == kind or prefix.startswith(f"{kind}_"))
        return cls(kind, prefix.removeprefix(kind), metric)

    @property
    def run(self) -> str | None:
        """The run of TensorBoard's that shows it beside the live metric."""
        is_shown = self.kind in ("merged", "annealed") and not self.metric.endswith(_BOUNDS)
        return f"{self.kind}{self.label}" if is_shown else None

    @property
    def tail(self) -> str:
        """What names of other kinds have in common with this one."""
        return f"{self.label}/{self.metric}"

    @property
    def is_predicted(self) -> bool:
        return self.kind == "annealed"


def scalar_layout(names: Iterable[str], title: str = "") -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's layout of custom scalars: category -> chart -> kind of chart and patterns of tags.

    Args:
        names: Everything that the callback logs.
        title: Added to the categories, to tell two callbacks apart.

    Examples:
        >>> scalar_layout(["merged/loss", "merged_late/loss"])
        {'Live, merged, annealed': {'loss': ['Multiline', ['^loss$']]}}
    """
    by_kind: dict[str, dict[str, list[str]]] = {"merged": {}, "merge_gain": {}, "annealed": {}, "merge": {}}
    for name in names:
        of_kind = by_kind.get((parts := _Name.of(name)).kind)
        if of_kind is not None and not parts.metric.endswith(_BOUNDS):
            of_kind.setdefault(parts.metric, []).append(name)

    def lines(metrics: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        return {metric: ["Multiline", list(map(_pattern, tags))] for metric, tags in metrics.items()}

    layout = {
        # Every run has the live metric's name: the live one, the merged one, the annealed one.
        "Live, merged, annealed": {metric: ["Multiline", [_pattern(metric)]] for metric in by_kind["merged"]},
        "Predicted, with interval": {
            # Of these charts TensorBoard takes names, no patterns.
            metric: ["Margin", [tag + bound for bound in ("", *_BOUNDS)]]
            for metric, (tag, *_) in by_kind["annealed"].items()
        },
        "Gain of the merge": lines(by_kind["merge_gain"]),
        "Merge": lines(by_kind["merge"]),
    }
    return {category + title: charts for category, charts in layout.items() if charts}


class Dashboards:
    """What a callback shows in a run's loggers; used on the rank that logs.

    Args:
        title: Tells two callbacks apart.
    """

    def __init__(self, title: str = "") -> None:
        self.title = title
        self._begin()

    def _begin(self) -> None:
        self._num_shown = 0
        self._runs: dict[str, Any] = {}
        # Parts of TensorBoard's layout that are written, names that Weights & Biases was told of.
        self._laid_out: set[tuple[str, str]] = set()
        self._defined: set[str] = set()
        self._is_without_figures = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies open files of their own."""
        return self.__dict__ | {"_runs": {}}

    def show(
        self,
        loggers: Iterable[Any],
        logged: Mapping[str, LoggedValue],
        step: int,
        coefficients: Mapping[int, float] | None = None,
    ) -> None:
        """Brings the charts up to date with a validation.

        Args:
            loggers: The Trainer's.
            logged: What the callback logs there.
            step: Under which Lightning logs it.
            coefficients: Of the primary merge, by snapshot step; drawn at the first, second, fourth, eighth ... call.
        """
        self._num_shown += 1
        is_drawn = self._num_shown & (self._num_shown - 1) == 0
        written = {name: value for name, value in logged.items() if value.logger}
        for logger in loggers:
            kinds = {base.__name__ for base in type(logger).__mro__}
            if "TensorBoardLogger" in kinds:
                self._show_in_tensorboard(logger, written, step)
                if coefficients and is_drawn:
                    self._draw(logger, coefficients, step)
            elif "WandbLogger" in kinds:
                self._define_in_wandb(logger, written)

    def close(self) -> None:
        """Writes what is still to be written; for the end of a run."""
        for run in self._runs.values():
            run.close()
        self._begin()

    def _show_in_tensorboard(self, logger: Any, logged: Mapping[str, LoggedValue], step: int) -> None:
        shown = [(parts, value) for name, value in logged.items() if (parts := _Name.of(name)).run is not None]
        for parts, value in shown:
            run = self._run(logger, f"{parts.kind}{parts.label}")
            run.add_scalar(parts.metric, float(value.value), step)
            # Predictions come later, and bring their own part of the layout.
            if (part := (logger.log_dir, parts.kind)) not in self._laid_out:
                self._laid_out.add(part)
                run.add_custom_scalars(
                    scalar_layout([n for n in logged if _Name.of(n).is_predicted == parts.is_predicted], self.title)
                )
        for run in self._runs.values():
            run.flush()

    def _run(self, logger: Any, name: str) -> Any:
        folder = os.path.join(logger.log_dir, name)  # noqa: PTH118 (it may be a remote one)
        if folder not in self._runs:
            # Of the same kind as the logger's own: torch's or tensorboardX's.
            self._runs[folder] = type(logger.experiment)(folder)
        return self._runs[folder]

    def _draw(self, logger: Any, coefficients: Mapping[int, float], step: int) -> None:
        try:
            from merge_callback.figures import pixels, plot_merge
        except ModuleNotFoundError as error:
            if not self._is_without_figures:
                rank_zero_info(
                    f"no figure of the merge in TensorBoard, since {error.name} is not installed:"
                    " pip install 'merge-callback[dashboards]'"
                )
            self._is_without_figures = True
            return
        logger.experiment.add_image(
            f"merge{self.title}/coefficients", pixels(plot_merge(coefficients)), step, dataformats="HWC"
        )

    def _define_in_wandb(self, logger: Any, logged: Mapping[str, LoggedValue]) -> None:
        for name, value in logged.items():
            parts = _Name.of(name)
            if name in self._defined or parts.kind not in ("merged", "merge_gain"):
                continue
            self._defined.add(name)
            is_higher_better = parts.kind == "merge_gain" or value.higher_is_better
            best = "max" if is_higher_better else "min"
            # By its whole name: a pattern would compete with the one that Lightning defines for all metrics.
            logger.experiment.define_metric(name, step_metric="trainer/global_step", summary=f"{best},last")


@dataclass(frozen=True)
class ClosingTable:
    """Live and merged values, gains and predictions of the last validation; as a string, a table that fits 80 columns.

    Args:
        title: Stands above it.
        live: Metric -> live value.
        logged: What the callback logged there.
        merges: Label in logged names -> the merge in words.
    """

    title: str
    live: Mapping[str, float]
    logged: Mapping[str, float]
    merges: Mapping[str, str]

    def __str__(self) -> str:
        rows = []
        for name, merged in self.logged.items():
            parts = _Name.of(name)
            gain = self.logged.get(f"merge_gain{parts.tail}")
            if parts.kind == "merged" and gain is not None:
                numbers = [f"{self.live[parts.metric]:.4f}", f"{merged:.4f}", f"{gain:+.4f}"]
                rows.append([parts.metric, self.merges[parts.label], *numbers, self._predicted(parts.tail)])
        header = ["metric", "merge", "live", "merged", "gain", "predicted"]
        return text_table(header, rows, title=self.title, num_left=2)

    def _predicted(self, tail: str) -> str:
        if (value := self.logged.get(f"annealed{tail}")) is None:
            return NOTHING
        half = max(abs(self.logged[f"annealed{tail}{end}"] - value) for end in _BOUNDS)
        return f"{value:.4f} ± {half:.4f}"


def _pattern(tag: str) -> str:
    # TensorBoard anchors patterns at the start only.
    return f"^{re.escape(tag)}$"
