"""Values that are logged beside the live metrics of a validation, and their names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from merge_callback.live.evaluate import LoggedValue
from merge_callback.live.names import fits
from merge_callback.prediction.bias import Prediction
from merge_callback.validation.directions import is_a_quality, more_is_better, plain_name


def safe_name(name: str) -> str:
    """Returns a name that every logger accepts: all but letters, digits, ``_``, ``.`` and ``-`` becomes ``_``.

    Examples:
        >>> safe_name("ema (0.2)")
        'ema__0.2_'
    """
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


# Suffixes of names for the two ends of a prediction's interval.
BOUNDS = ("/low", "/high")


@dataclass(frozen=True)
class LoggedName:
    """The name of one value that the callback logs.

    Args:
        kind: ``"merged"``, ``"merge_gain"``, ``"merge_gain_stderr"``, ``"annealed"``, ``"annealed_error"``,
            ``"forecast"``, ``"forecast_error"``, or ``"merge"`` for a diagnostic.
        label: Distinguishes callbacks and further merges; begins with ``_``, or is empty.
        metric: The live metric, or the diagnostic.
        end: One of ``BOUNDS`` for an end of a prediction's interval; otherwise empty.

    Examples:
        >>> str(LoggedName("merge_gain", "_late", "val_loss"))
        'merge_gain_late/val_loss'
    """

    kind: str
    label: str
    metric: str
    end: str = ""

    def __str__(self) -> str:
        return f"{self.kind}{self.label}/{self.metric}{self.end}"


@dataclass(frozen=True)
class Names:
    """The names under which one callback logs its values.

    Args:
        callback: Name of the callback.
        primary: Name of its primary merge.
        higher_is_better: Patterns of metrics where more is better.
        monitored: Plain name of a metric -> whether more is better, according to callbacks that monitor it.

    Examples:
        >>> names = Names("merge", primary="sma")
        >>> str(names("merged", "val_loss")), str(names("merged", "val_loss", "late"))
        ('merged/val_loss', 'merged_late/val_loss')
    """

    callback: str
    primary: str
    higher_is_better: tuple[str, ...] = ()
    monitored: dict[str, bool] = field(default_factory=dict)

    def __call__(self, kind: str, metric: str, merge: str | None = None) -> LoggedName:
        """Returns the name of a merge's value of a metric; merge None is the primary one."""
        return LoggedName(kind, self.label(merge), metric)

    def label(self, merge: str | None = None) -> str:
        """Returns the label in logged names: the callback's name unless default, and the merge's unless primary."""
        own = self.callback if self.callback != "merge" else None
        parts = [own, merge if merge != self.primary else None]
        return "".join(f"_{safe_name(part)}" for part in parts if part)

    def is_higher_better(self, metric: str, value: LoggedValue) -> bool:
        """Returns whether more is better; what nothing tells of is taken for a loss."""
        return bool(self.direction(metric, value))

    def direction(self, metric: str, value: LoggedValue) -> bool | None:
        """Returns whether more is better; None if nothing tells.

        The first of these that tells: a pattern, the torchmetrics object that was logged, a callback that monitors the
        metric, the words in its name.
        """
        if self.fits(metric, self.higher_is_better):
            return True
        if value.higher_is_better is not None:
            return value.higher_is_better
        monitored = self.monitored.get(plain_name(metric))
        return more_is_better(metric) if monitored is None else monitored

    def unknown(self, live: Mapping[str, LoggedValue]) -> str:
        """Returns what to tell the user of metrics whose direction nothing tells; empty if there are none."""
        metrics = [name for name, value in live.items() if is_a_quality(name) and self.direction(name, value) is None]
        if not metrics:
            return ""
        which = ", ".join(metrics)
        return f"nothing tells whether more of {which} is better; taken for losses unless higher_is_better= names them"

    @staticmethod
    def fits(metric: str, patterns: str | Iterable[str]) -> bool:
        """Returns whether a metric fits a pattern, or any of several.

        A pattern for ``acc`` also fits the names that Lightning derives from it: ``acc_epoch``,
        ``acc/dataloader_idx_0``.
        """
        return any(fits(name, patterns) for name in (metric, plain_name(metric)))


def predictions_and_errors(
    names: Names,
    kind: Literal["annealed", "forecast"],
    predictions: Mapping[str, Prediction],
    live: Mapping[str, LoggedValue],
    *,
    is_end_of_decay: bool,
) -> dict[LoggedName, LoggedValue]:
    """Returns predictions with their intervals, to log.

    Args:
        names: The callback's names for them.
        kind: What is predicted: the model if it had been annealed until now, or if a decay began now.
        predictions: Metric -> prediction.
        live: Metric -> live value of the validation.
        is_end_of_decay: Whether the run's own decay ends here; then the errors of the predictions are included.
    """
    logged: dict[LoggedName, LoggedValue] = {}
    for metric, prediction in predictions.items():
        name = names(kind, metric)
        ends = zip(("", *BOUNDS), (prediction.value, prediction.low, prediction.high), strict=True)
        numbers = {replace(name, end=end): value for end, value in ends}
        if is_end_of_decay and metric in live:
            numbers[names(f"{kind}_error", metric)] = prediction.value - float(live[metric].value)
        is_written = metric not in live or live[metric].logger
        logged |= {each: LoggedValue(torch.tensor(value), logger=is_written) for each, value in numbers.items()}
    return logged
