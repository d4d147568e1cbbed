"""Merges checkpoints on disk in two steps: `plan_merge` checks and weights them, `write_merge` writes the file.

Tensors are read in parts and summed by the same kernel as snapshots in a run, so the result equals that of the live
callback bit for bit. Memory does not grow with the number of checkpoints.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_callback.checkpoints.alike import alike, refuse_averages, steps_of, told_steps
from merge_callback.checkpoints.folder import write_folder
from merge_callback.checkpoints.inert import inert_names
from merge_callback.checkpoints.merged_tensors import TAKEN_FROM_NEWEST, merged_tensor, merged_tensors
from merge_callback.checkpoints.read import open_checkpoint
from merge_callback.checkpoints.stored import StoredCheckpoint
from merge_callback.checkpoints.torch_file import plain
from merge_callback.checkpoints.write import (
    check_suffix,
    fresh_run_entries,
    provenance,
    safetensors_metadata,
    save,
)
from merge_callback.live.names import fits
from merge_callback.live.sharding import num_ranks
from merge_callback.merging.combine import is_narrow
from merge_callback.merging.rules import Rule, merge_coefficients, resolve_rule, rule_label
from merge_callback.utilities.checks import check_bool, patterns
from merge_callback.utilities.files import SAFETENSORS_DTYPES, atomic_write, write_safetensors
from merge_callback.utilities.locations import local_path
from merge_callback.utilities.revision import git_revision

# Entries of a Lightning checkpoint that are copied to the merged one, since modules are rebuilt from them.
_KEPT = ("hparams_name", "hyper_parameters", "hparams_type", "datamodule_hparams_name", "datamodule_hyper_parameters")


@dataclass(frozen=True)
class MergePlan:
    """Checkpoints that fit together, and their coefficients. Tensor values have not been read yet.

    Args:
        checkpoints: Checkpoints with the same tensors, oldest first.
        coefficients: One coefficient per checkpoint, summing to one.
        steps: One step per checkpoint, for the provenance.
        rule: Name of the rule, for the provenance.
        newest: Patterns of tensor names. Tensors that match are taken from the newest checkpoint instead of merged.
    """

    checkpoints: list[StoredCheckpoint]
    coefficients: list[float]
    steps: list[int]
    rule: str
    newest: tuple[str, ...]

    def provenance(self) -> dict[str, Any]:
        """Returns the provenance of the merge: version, rule, steps, coefficients, implied decay, checkpoints."""
        names = [checkpoint.path.name for checkpoint in self.checkpoints]
        by_step = sorted(zip(self.steps, self.coefficients, names, strict=True))
        origin = provenance(self.rule, {step: value for step, value, _ in by_step})
        revision = {} if (found := git_revision()) is None else {"git_revision": found}
        return origin | {"checkpoints": [name for *_, name in by_step], **revision}


def plan_merge(
    paths: Sequence[str | Path],
    rule: str | Rule = "sma",
    *,
    coefficients: Sequence[float] | None = None,
    steps: Sequence[int] | None = None,
    newest: str | Sequence[str] = TAKEN_FROM_NEWEST,
    of_averages: bool = False,
) -> MergePlan:
    """Opens checkpoints, checks that they fit together, and calculates their coefficients.

    Args:
        paths: Lightning ``.ckpt`` files, files of ``torch.save``, ``.safetensors`` files (one, an index of several, or
            the folder of either), or folders of `torch.distributed.checkpoint`. They are sorted by step.
        rule: Name of a rule, or a rule, applied to the checkpoints' steps.
        coefficients: One coefficient per path instead of a rule. They are divided by their sum. Unless ``steps`` are
            given, the paths keep their order and the last one is the newest.
        steps: One step per path. None reads the steps from the files or their names.
        newest: One or several patterns of tensor names. Tensors that match are taken from the newest checkpoint instead
            of merged.
        of_averages: Whether checkpoints may hold merges or averages already.

    Raises:
        ValueError: If the checkpoints do not fit together, or one is no checkpoint of a step's weights. The message
            names the checkpoint and the tensor.
    """
    resolve_rule(rule)
    check_bool("of_averages", of_averages)
    kept = patterns("newest", newest)
    asked = [local_path("paths", path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not asked:
        raise ValueError("there are no checkpoints to merge")
    resolved = [path.resolve() for path in asked]
    if twice := [path for path, where in zip(asked, resolved, strict=True) if resolved.count(where) > 1]:
        raise ValueError(f"checkpoints must be different ones, got {' and '.join(map(str, twice))}")
    opened = [open_checkpoint(path) for path in asked]
    if not of_averages:
        refuse_averages(opened)
    # Coefficients belong to paths, so without given steps the order of the paths counts and no step is needed.
    is_in_order = coefficients is not None and steps is None
    known = list(range(1, len(opened) + 1)) if is_in_order else steps_of(opened, steps)
    values = _values(known, rule, coefficients)
    order = sorted(range(len(opened)), key=known.__getitem__)
    ordered = alike([opened[place] for place in order])
    told = (told_steps(ordered) if is_in_order else None) or sorted(known)
    label = "coefficients" if coefficients is not None else rule_label(rule)
    return MergePlan(ordered, [values[place] for place in order], told, label, kept)


def write_merge(plan: MergePlan, output: str | Path, *, progress: bool = False) -> dict[str, Any]:
    """Merges the checkpoints of a plan into one file, which appears only when it is complete.

    Args:
        plan: The result of `plan_merge`.
        output: File that ends in ``.ckpt`` or ``.safetensors``, or a name without a suffix, which becomes a folder of
            `torch.distributed.checkpoint`. For a ``.ckpt`` the whole merge is in memory, otherwise one tensor at a
            time. Several ranks that call this together write a folder, each its share of the tensors.
        progress: Whether to show a progress bar.

    Returns:
        The provenance in the file.

    Raises:
        ValueError: If the output has another suffix, is an existing folder or one of the checkpoints, or is a file that
            several ranks would write; or if a tensor holds NaN or inf, integers that differ, or a dtype that cannot be
            merged or written. Nothing is written then.
        OSError: If the file cannot be written.
    """
    output = local_path("output", output)
    _check_output(output)
    if output.resolve() in [checkpoint.path.resolve() for checkpoint in plan.checkpoints]:
        raise ValueError(f"output must not be one of the checkpoints, got {output}")
    last = plan.checkpoints[-1]
    _check_dtypes(last, plan.newest, output)
    origin = plan.provenance()
    like = {name: tensor.like("meta") for name, tensor in last.tensors.items()}
    if not output.suffix:
        made_of = plan.checkpoints, plan.coefficients, plan.newest
        write_folder(output, like, lambda name: merged_tensor(name, *made_of), origin)
        return origin
    merged = merged_tensors(plan.checkpoints, plan.coefficients, plan.newest, progress)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".safetensors":
        with atomic_write(output) as unfinished:
            write_safetensors(unfinished, like, (tensor for _, tensor in merged), safetensors_metadata(origin))
    else:
        save(output, _lightning_checkpoint(plan, dict(merged)), origin)
    return origin


def merge_checkpoints(
    paths: Sequence[str | Path],
    output: str | Path,
    rule: str | Rule = "sma",
    *,
    coefficients: Sequence[float] | None = None,
    steps: Sequence[int] | None = None,
    newest: str | Sequence[str] = TAKEN_FROM_NEWEST,
    of_averages: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Merges checkpoints into one file. Calls `plan_merge`, then `write_merge`: see these for arguments and errors."""
    _check_output(Path(output))
    plan = plan_merge(paths, rule, coefficients=coefficients, steps=steps, newest=newest, of_averages=of_averages)
    return write_merge(plan, output, progress=progress)


def _check_output(output: Path) -> None:
    """Raises ValueError unless an output can be written by as many ranks as there are."""
    if output.suffix:
        check_suffix(output)
        if num_ranks() > 1:
            raise ValueError(f"{num_ranks()} ranks write a folder, whose name has no suffix, got {output.name!r}")
    if output.is_dir():
        raise ValueError(f"output must be a file or a new folder, but {output} is a folder already")


def _values(steps: Sequence[int], rule: str | Rule, coefficients: Sequence[float] | None) -> list[float]:
    """Returns the coefficients in the order of the given steps."""
    if coefficients is None:
        ordered = sorted(steps)
        by_step = dict(zip(ordered, merge_coefficients(rule, ordered), strict=True))
        return [by_step[step] for step in steps]
    if len(coefficients) != len(steps):
        raise ValueError(f"coefficients must be as many as checkpoints, {len(steps)}, got {len(coefficients)}")
    given = list(coefficients)
    if not all(isinstance(each, int | float) and math.isfinite(each) for each in given) or sum(given) == 0:
        raise ValueError(f"coefficients must be finite numbers whose sum is not zero, got {given}")
    return merge_coefficients(lambda _: given, steps)


def _check_dtypes(checkpoint: StoredCheckpoint, newest: Sequence[str], output: Path) -> None:
    for name, tensor in checkpoint.tensors.items():
        if output.suffix == ".safetensors" and tensor.dtype not in SAFETENSORS_DTYPES:
            raise ValueError(
                f"{name} in {checkpoint.path} is {tensor.dtype}, which is not written to .safetensors here"
            )
        if is_narrow(tensor.dtype) and not fits(name, newest):
            raise ValueError(
                f"{name} in {checkpoint.path} is {tensor.dtype}, which is not summed; newest=[{name}] takes it as it is"
            )


def _lightning_checkpoint(plan: MergePlan, state: dict[str, Tensor]) -> dict[str, Any]:
    """Returns a checkpoint with weights and hyperparameters only. Tensors that were tied share memory again."""
    last = plan.checkpoints[-1]
    by_place: dict[Any, str] = {}
    for name, stored in last.tensors.items():
        place = (stored.pieces, stored.shape, fits(name, plan.newest))
        first = by_place.setdefault(place, name) if stored.numel else name
        if all(each.tensors[name].pieces == each.tensors[first].pieces for each in plan.checkpoints):
            state[name] = state[first]
    beside = {key: value for key, value in last.beside.items() if key in _KEPT}
    if objects := sorted(inert_names(beside) | inert_names(dict(last.extra))):
        warnings.warn(
            f"{last.path} holds objects, which are not read ({', '.join(objects)}). The merge goes without those"
            " hyperparameters; give them to load_from_checkpoint",
            stacklevel=3,
        )
    extra, kept = plain(last.extra), plain(beside)
    return {"state_dict": state | extra, **fresh_run_entries(max(plan.steps)), **kept}
