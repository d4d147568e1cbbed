"""Reads from a checkpoint which stable run it belongs to, and that run's validations."""

from pathlib import Path

from merge_callback.checkpoints.torch_file import BROKEN, read_entries
from merge_callback.prediction.records import stable_run_in_checkpoint
from merge_callback.prediction.validations import StableValidation

# A sharded checkpoint is a folder. In this file of it, Lightning stores everything that is not a shard.
METADATA = "meta.pt"


def stable_run_in_file(path: Path, what: str, callback: str | None = None) -> tuple[str | None, list[StableValidation]]:
    """Returns identifier and validations of the run in a checkpoint, a file or a folder; ``(None, [])`` without them.

    Args:
        path: The checkpoint.
        what: What the message of an error begins with.
        callback: As for `stable_run_in_checkpoint`.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        entries = read_entries(path / METADATA if path.is_dir() else path)
        return stable_run_in_checkpoint(entries, callback)
    except BROKEN as error:
        raise ValueError(f"{what} is no checkpoint that can be read: {error}") from error
