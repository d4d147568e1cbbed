"""Validations of merges that no run holds: stored checkpoints, combined and put into the config's model."""

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
    """A run of the config that is there for its validation alone: without callbacks, loggers and checkpoints.

    Args:
        config: As `merge_callback.apps.train` takes it; loses its callbacks.
        limit_batches: Of each validation loader; None is what the config says.
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
    """Metrics of a weighted sum of checkpoints, as if nothing had been validated before.

    Args:
        run: Its trainer validates its model, which holds the sum afterwards, on its data.
        opened: Checkpoints that are alike, oldest first.
        values: A coefficient for each, summing to one.
        newest: A pattern, or several, of tensors that are those of the last checkpoint.
        seed: The validation begins with it.

    Returns:
        Metric -> value; of several loaders all of them.

    Raises:
        ValueError: If the checkpoints do not fit the model; the message names the tensors.
    """
    merged = dict(merged_tensors(opened, values, newest))
    for name, tensor in merged.items():
        # Beyond the checkpoints a weighted sum of variances may be none.
        if fits(name, "*running_var"):
            tensor.clamp_(min=0)
    try:
        run.model.load_state_dict(merged, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the checkpoints are of another model than the config's: {error}") from error
    seed_everything(seed, verbose=False)
    # Whatever a module remembers of a validation, such as the best value so far.
    with preserved_attributes(run.model):
        found = run.trainer.validate(run.model, run.data, verbose=False)
    return {name: value for of_loader in found for name, value in of_loader.items()}


def check_mode(argument: str, mode: Any) -> None:
    """Raises `ValueError` unless it says which values are the better ones."""
    if mode not in ("min", "max"):
        raise ValueError(f"{argument} must be 'min' or 'max', got {mode!r}")


def chosen_metric(known: Sequence[str], asked: str | None, argument: str) -> str:
    """The metric that was asked for, or the first of those that a validation logs.

    Raises:
        ValueError: If the validation logs none, or not the one asked for.
    """
    if not known:
        raise ValueError("the validation logs no metric")
    if asked is not None and asked not in known:
        raise ValueError(f"the validation logs no {asked!r}, which {argument} names; it logs {', '.join(known)}")
    return asked or known[0]
