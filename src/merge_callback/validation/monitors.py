"""Tells users of callbacks and schedulers that monitor values of merges when these are not there."""

from collections.abc import Collection, Iterator
from typing import Any

from lightning.pytorch import Trainer

from merge_callback.live.learning_rates import optimizer_step
from merge_callback.utilities.messages import Messages

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
                "stopping",
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


def _strict_monitors(trainer: Trainer, labels: Collection[str]) -> Iterator[tuple[str, str]]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for each in [*callbacks, *trainer.lr_scheduler_configs]:
        monitor = getattr(each, "monitor", None)
        if _needs_merge(monitor, labels) and getattr(each, "strict", True):
            yield type(getattr(each, "scheduler", each)).__name__, str(monitor)


def _needs_merge(monitor: object, labels: Collection[str]) -> bool:
    beginnings = tuple(f"{kind}{label}/" for kind in _KINDS for label in labels)
    return isinstance(monitor, str) and monitor.startswith(beginnings)
