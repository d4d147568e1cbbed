"""Validates merges of stored checkpoints, with the model and the data of a config."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import seed_everything
from omegaconf import DictConfig, open_dict

from merge_callback.apps.train import Run, prepare
from merge_callback.checkpoints.merged_tensors import TAKEN_FROM_NEWEST, merged_tensors
from merge_callback.checkpoints.stored import StoredCheckpoint
from merge_callback.live.names import fits
from merge_callback.live.preserve import preserved_attributes


def prepare_validation(config: DictConfig, limit_batches: int | float | None = None) -> Run:
    """Returns a run of the config that only validates: without callbacks, loggers and checkpoints.

    Args:
        config: A config for `merge_callback.apps.train`; its callbacks are removed in place.
        limit_batches: Limit on each validation loader; None is that of the config.
    """
    with open_dict(config):
        config.callbacks, config.anneal = {}, None
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False}
    if limit_batches is not None:
        options["limit_val_batches"] = limit_batches
    return prepare(config, loggers=(), **options)


def validated(
    run: Run,
    opened: Sequence[StoredCheckpoint],
    values: Sequence[float],
    newest: str | Sequence[str] = TAKEN_FROM_NEWEST,
    seed: int = 0,
) -> dict[str, float]:
    """Returns the metrics of a weighted sum of checkpoints, as if nothing had been validated before.

    Args:
        run: The run whose trainer validates its model on its data. The model holds the sum afterwards.
        opened: Checkpoints with the same tensors, oldest first.
        values: One coefficient per checkpoint; they sum to one.
        newest: One or several patterns of tensors that are taken from the last checkpoint.
        seed: Random seed of the validation.

    Returns:
        Metric -> value, of all loaders.

    Raises:
        ValueError: If the checkpoints do not fit the model; the message names the tensors.
    """
    merged = dict(merged_tensors(opened, values, newest))
    for name, tensor in merged.items():
        # With coefficients below zero, a weighted sum of variances may be negative.
        if fits(name, "*running_var"):
            tensor.clamp_(min=0)
    try:
        run.model.load_state_dict(merged, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the checkpoints are of another model than the config's: {error}") from error
    seed_everything(seed, verbose=False)
    # A module may remember things of a validation, such as the best value so far.
    with preserved_attributes(run.model):
        found = run.trainer.validate(run.model, run.data, verbose=False)
    return {name: value for of_loader in found for name, value in of_loader.items()}


def check_mode(argument: str, mode: Any) -> None:
    """Raises ValueError unless ``mode`` is ``"min"`` or ``"max"``."""
    if mode not in ("min", "max"):
        raise ValueError(f"{argument} must be 'min' or 'max', got {mode!r}")


def chosen_metric(known: Sequence[str], asked: str | None, argument: str) -> str:
    """Returns the metric that the user asked for, or the first that a validation logs.

    Args:
        known: Names of the metrics that the validation logs.
        asked: Name that the user asked for; None takes the first.
        argument: Name of the user's argument, for the error.

    Raises:
        ValueError: If the validation logs no metric, or not the one asked for.
    """
    if not known:
        raise ValueError("the validation logs no metric")
    if asked is not None and asked not in known:
        raise ValueError(f"the validation logs no {asked!r}, which {argument} names; it logs {', '.join(known)}")
    return asked or known[0]
