"""Tells users of callbacks and schedulers that monitor values of merges what is wrong with that."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import Trainer

from merge_callback.live.evaluate import LoggedValue
from merge_callback.live.learning_rates import optimizer_step
from merge_callback.utilities.messages import Messages
from merge_callback.validation.logged import Names

# Kinds of logged values that need a merge.
_KINDS = ("merged", "merge_gain", "annealed", "forecast")


def warn_of_repeated_values(trainer: Trainer, messages: Messages, labels: Collection[str]) -> None:
    """Warns of early stopping on values that stay the same where merged validations are left out.

    Args:
        trainer: The Trainer.
        messages: Where it is said.
        labels: Labels of the callback's merges in logged names.
    """
    for stopping in trainer.early_stopping_callbacks:
        if _needs_merge(stopping.monitor, labels):
            messages.warn(
                f"where a merged validation is left out, EarlyStopping(monitor={stopping.monitor!r}) sees the"
                " previous value again and counts that as no improvement; choose its patience accordingly",
                f"stopping {stopping.monitor}",
            )


def warn_of_missing_values(trainer: Trainer, messages: Messages, labels: Collection[str], why: str) -> None:
    """Warns of monitors that end a run because there is no merge at its validation.

    Args:
        trainer: The Trainer, in a validation.
        messages: Where it is said.
        labels: Labels of the callback's merges in logged names.
        why: Why there is no merge.
    """
    for who, monitor in _strict_monitors(trainer, labels):
        messages.warn(
            f"{who} monitors {monitor!r}, which is not there at step {optimizer_step(trainer)}: {why}. MergedCheckpoint"
            " and EarlyStopping(strict=False) wait for it",
            f"monitor {monitor}",
        )


def warn_of_contrary_modes(
    trainer: Trainer, messages: Messages, labels: Collection[str], names: Names, live: Mapping[str, LoggedValue]
) -> None:
    """Warns of callbacks that would take the worst merge for the best.

    Args:
        trainer: The Trainer.
        messages: Where it is said.
        labels: Labels of the callback's merges in logged names.
        names: The callback's names of logged values, with what is known of the metrics.
        live: The metrics of the validation.
    """
    # What the monitors themselves tell is not asked here.
    known = replace(names, monitored={})
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for each in callbacks:
        monitor, mode = getattr(each, "monitor", None), getattr(each, "mode", None)
        if mode not in ("min", "max") or not isinstance(monitor, str):
            continue
        kind, _, metric = monitor.partition("/")
        if metric not in live:
            continue
        is_more = None
        if kind in [f"merge_gain{label}" for label in labels]:
            is_more = True
        elif kind in [f"merged{label}" for label in labels]:
            is_more = known.direction(metric, live[metric])
        if is_more is not None and is_more != (mode == "max"):
            better = "more" if is_more else "less"
            messages.warn(
                f"{type(each).__name__}(monitor={monitor!r}) has mode={mode!r}, but {better} of it is better",
                f"mode {monitor}",
            )


def _strict_monitors(trainer: Trainer, labels: Collection[str]) -> Iterator[tuple[str, str]]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for each in [*callbacks, *trainer.lr_scheduler_configs]:
        monitor = getattr(each, "monitor", None)
        if not _needs_merge(monitor, labels) or not getattr(each, "strict", True):
            continue
        # Lightning keeps a value until it is logged again.
        if monitor not in trainer.callback_metrics:
            yield type(getattr(each, "scheduler", each)).__name__, str(monitor)


def _needs_merge(monitor: object, labels: Collection[str]) -> bool:
    beginnings = tuple(f"{kind}{label}/" for kind in _KINDS for label in labels)
    return isinstance(monitor, str) and monitor.startswith(beginnings)
