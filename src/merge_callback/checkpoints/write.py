"""Writes merged checkpoints with their provenance; a file appears only when it is complete."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule
from omegaconf import Container
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

from merge_callback.checkpoints.stored import PROVENANCE_KEY
from merge_callback.checkpoints.torch_file import BROKEN, read_entries
from merge_callback.live.sharding import all_gather_dict, full_tensor, rank
from merge_callback.merging.decays import decay_from_coefficients
from merge_callback.utilities.checks import how_to_install
from merge_callback.utilities.files import atomic_write, write_safetensors
from merge_callback.utilities.locations import Location, local_path, written_locally


def provenance(
    rule: str,
    coefficients: Mapping[int, float] | None = None,
    step: int | None = None,
    intervals: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """Returns the origin of a merge: package version, rule, snapshot steps, coefficients and implied decay.

    Args:
        rule: Name of the rule.
        coefficients: Snapshot step -> coefficient. None for an average over every step.
        step: Last step of an average over every step.
        intervals: First and last step of each snapshot that is a mean over steps. Empty if they are points.
    """
    origin: dict[str, Any] = {"version": version("merge-callback"), "rule": rule}
    if coefficients is None:
        return {**origin, "steps": [step]}
    values = list(coefficients.values())
    decay = decay_from_coefficients(values)
    found = {**origin, "steps": list(coefficients), "coefficients": values, "implied_decay": decay}
    return found | ({"means_over": [list(interval) for interval in intervals]} if intervals else {})


def fresh_run_entries(step: int) -> dict[str, Any]:
    """Returns the entries beside the weights that Lightning needs to start a new run from a checkpoint."""
    return {
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": step,
        # Lightning requires both keys; empty lists restore no state.
        "optimizer_states": [],
        "lr_schedulers": [],
    }


def weights_checkpoint(module: LightningModule, state: dict[str, Tensor], step: int) -> dict[str, Any]:
    """Returns a Lightning checkpoint with weights, hyperparameters and the entries of ``on_save_checkpoint``.

    It has no optimizer state, so a fit from it starts as a new run. Callbacks among the hyperparameters are left out.
    """
    checkpoint: dict[str, Any] = {"state_dict": state, **fresh_run_entries(step)}
    if module.hparams:
        # As Lightning saves them: also the name of the single argument that took them, and the class of a config.
        if hasattr(module, "_hparams_name"):
            checkpoint[module.CHECKPOINT_HYPER_PARAMS_NAME] = module._hparams_name
        if isinstance(module.hparams, Container):
            checkpoint[module.CHECKPOINT_HYPER_PARAMS_KEY] = module.hparams
            checkpoint[module.CHECKPOINT_HYPER_PARAMS_TYPE] = type(module.hparams)
        else:
            checkpoint[module.CHECKPOINT_HYPER_PARAMS_KEY] = _without_callbacks(dict(module.hparams))
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def _without_callbacks(value: Any) -> Any:
    """Returns a value without the callbacks in its dictionaries and lists: they belong to a run, not to a model."""
    if isinstance(value, dict):
        return {key: _without_callbacks(each) for key, each in value.items() if not _is_callback(each)}
    if isinstance(value, list):
        return [_without_callbacks(each) for each in value if not _is_callback(each)]
    return value


def _is_callback(value: Any) -> bool:
    # Under one of the names that Lightning has.
    return any(base.__qualname__ == "Callback" and ".callbacks." in base.__module__ for base in type(value).__mro__)


def read_provenance(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the provenance in a file or folder of a merge.

    Raises:
        ValueError: If it is none of a ``.ckpt`` file, a ``.safetensors`` file and a folder with a ``merge.json``, or
            holds no merge.
    """
    path = Path(path)
    if (told := path / "merge.json").is_file():
        found = json.loads(told.read_text())
    elif path.suffix == ".safetensors":
        with _safetensors().safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        found = {key: json.loads(value) for key, value in metadata.items() if key != "format"}
    else:
        check_suffix(path)
        try:
            found = read_entries(Path(path)).get(PROVENANCE_KEY, {})
        except FileNotFoundError:
            raise
        except BROKEN as error:
            raise ValueError(f"{path} is no checkpoint that can be read: {error}") from error
    if not isinstance(found, dict) or "rule" not in found:
        raise ValueError(f"{path} holds no merge")
    return found


def save(path: Location, checkpoint: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Writes merged weights to a file. All ranks must call it.

    The file appears only when it is complete; until then, and after an error, an existing file stays as it was. For an
    unsharded model rank 0 writes the file. The tensors of a sharded model are gathered one at a time: a
    ``.safetensors`` file is written as they arrive, and for a ``.ckpt`` rank 0 collects all of them in host memory. A
    sharded model can also be written to a path without suffix, which becomes a folder of
    `torch.distributed.checkpoint` with the provenance in ``merge.json``.

    Args:
        path: Ends in ``.ckpt`` (the whole checkpoint, for Lightning) or ``.safetensors`` (only its ``state_dict``).
            Missing folders are created. May be a URL that fsspec knows, such as ``s3://...``, except for a folder.
        checkpoint: A Lightning checkpoint whose ``state_dict`` holds the merge. The tensors must not share memory.
        origin: The result of `provenance`.

    Raises:
        ValueError: If the path has another suffix, or the format does not support an entry of the state dict.
        OSError: If the file cannot be written; raised on all ranks for a sharded model. The message says which merge
            was not saved.
    """
    if any(isinstance(value, DTensor) for value in checkpoint["state_dict"].values()):
        _save_sharded(path, checkpoint, origin)
    elif rank() == 0:
        _save_whole(path, checkpoint, origin)


def _save_whole(path: Location, checkpoint: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    suffix = check_suffix(path)
    others = [key for key, value in checkpoint["state_dict"].items() if not isinstance(value, Tensor)]
    if others and suffix == ".safetensors":
        raise ValueError(f"a .safetensors file takes tensors only, and {others[0]} is not one; save the merge as .ckpt")
    try:
        with written_locally("path", path) as local, atomic_write(local) as unfinished:
            if suffix == ".ckpt":
                torch.save({**checkpoint, PROVENANCE_KEY: dict(origin)}, unfinished)
            else:
                # The format needs contiguous tensors that share no memory. Merged tensors are copies already.
                tensors = {key: value.contiguous() for key, value in checkpoint["state_dict"].items()}
                _safetensors().torch.save_file(tensors, unfinished, safetensors_metadata(origin))
    # For a full disk, torch raises RuntimeError and safetensors its own error.
    except (OSError, RuntimeError, _safetensors_error()) as error:
        raise OSError(f"the merge of steps {origin['steps']} was not saved to {path}: {error}") from error


def _save_sharded(path: Location, checkpoint: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    state = checkpoint["state_dict"]
    if not Path(path).suffix:
        folder = local_path("the folder of a sharded merge", path)
        dcp.save({"state_dict": state}, checkpoint_id=folder)
        if rank() == 0:
            (folder / "merge.json").write_text(json.dumps(dict(origin)))
        return
    suffix = check_suffix(path)
    gathered = ((name, full_tensor(tensor)) for name, tensor in state.items())
    problem = None
    try:
        if suffix == ".ckpt":
            kept = {name: tensor.cpu() for name, tensor in gathered if rank() == 0}
            if rank() == 0:
                _save_whole(path, {**checkpoint, "state_dict": kept}, origin)
        elif rank() == 0:
            with written_locally("path", path) as local, atomic_write(local) as unfinished:
                write_safetensors(unfinished, state, (tensor for _, tensor in gathered), safetensors_metadata(origin))
    except OSError as error:
        problem = f"the merge of steps {origin['steps']} was not saved to {path}: {error}"
    # Gathering is collective: after an error on this rank, the others still wait for its part of each tensor.
    for _ in gathered:
        pass
    if found := all_gather_dict({} if problem is None else {rank(): problem}):
        raise OSError(next(iter(found.values())))


def safetensors_metadata(origin: Mapping[str, Any]) -> dict[str, str]:
    """Returns the provenance as .safetensors metadata, with the ``format`` that loaders of pre-trained models need."""
    return {key: json.dumps(value) for key, value in origin.items()} | {"format": "pt"}


def check_suffix(path: Location) -> str:
    """Returns the suffix of a path; raises ValueError unless it is ``.ckpt`` or ``.safetensors``."""
    if (suffix := Path(path).suffix) not in (".ckpt", ".safetensors"):
        raise ValueError(f"a merge is saved as .ckpt or .safetensors, got {Path(path).name!r}")
    return suffix


def _safetensors_error() -> type[Exception]:
    return _safetensors().SafetensorError if find_spec("safetensors") else OSError


def _safetensors() -> Any:
    try:
        import safetensors.torch  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"a .safetensors file needs: {how_to_install('export')}") from error
    return safetensors
