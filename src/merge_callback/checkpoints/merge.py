"""Merges checkpoints on disk into one: a Hydra app, and the function behind it.

    merge-callback-merge checkpoints='runs/trunk/*.ckpt' output=merged.ckpt rule=1-sqrt
    python -m merge_callback.apps.merge checkpoints='[a.ckpt,b.ckpt]' output=c.safetensors coefficients='[0.3,0.7]'

Tensors are read in parts, and summed by the kernel that merges snapshots in a run, so the result is that of the live
callback to the bit. Memory does not grow with the number of checkpoints.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from merge_callback.checkpoints.read import StoredCheckpoint, open_checkpoint
from merge_callback.checkpoints.write import check_suffix, fresh_run_entries, provenance, save
from merge_callback.live.names import fits
from merge_callback.merging.combine import combine_
from merge_callback.merging.rules import Rule, merge_coefficients, resolve_rule, rule_label
from merge_callback.utilities.checks import check_count, patterns
from merge_callback.utilities.files import SAFETENSORS_DTYPES, atomic_write, write_safetensors

# Statistics and counters of batch norm layers are those of the newest checkpoint, as in a run.
TAKEN_FROM_NEWEST = ("*running_mean", "*running_var", "*num_batches_tracked")
# Entries of a Lightning checkpoint that go into the merged one: what a module is made again from.
_KEPT = ("hparams_name", "hyper_parameters", "hparams_type", "datamodule_hparams_name", "datamodule_hyper_parameters")


def merge_checkpoints(
    paths: Sequence[str | Path],
    output: str | Path,
    rule: str | Rule = "sma",
    *,
    coefficients: Sequence[float] | None = None,
    steps: Sequence[int] | None = None,
    newest: str | Sequence[str] = TAKEN_FROM_NEWEST,
    progress: bool = False,
) -> dict[str, Any]:
    """Merges checkpoints into one file, which appears when it is complete.

    Args:
        paths: Lightning ``.ckpt`` files, files of ``torch.save``, ``.safetensors`` (alone, or an index of several),
            folders of `torch.distributed.checkpoint`. They are put into the order of their steps.
        output: Ends in ``.ckpt`` or ``.safetensors``. Of the latter, one tensor at a time is in memory; a ``.ckpt`` is
            there whole once.
        rule: Name of a rule, or a rule: of the checkpoints' steps.
        coefficients: Instead of a rule, one for each path; divided by their sum. The last path given is then the
            newest.
        steps: Of the checkpoints, in the order given; None reads them from the files or their names.
        newest: A pattern, or several, of names that are taken from the newest checkpoint instead of merged.
        progress: Whether to show a progress bar.

    Returns:
        The provenance that the file holds: version, rule, steps, coefficients and implied decay.

    Raises:
        ValueError: If checkpoints do not fit together; the message names checkpoint and tensor. Nothing is written.
        OSError: If the file cannot be written.
    """
    output = Path(output)
    check_suffix(output)
    if output.is_dir():
        raise ValueError(f"output must be a file, but {output} is a folder")
    resolve_rule(rule)
    newest = patterns("newest", newest)
    asked = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if not asked:
        raise ValueError("there are no checkpoints to merge")
    resolved = [path.resolve() for path in asked]
    if twice := [path for path, where in zip(asked, resolved, strict=True) if resolved.count(where) > 1]:
        raise ValueError(f"checkpoints must be different ones, got {' and '.join(map(str, twice))}")
    if output.resolve() in resolved:
        raise ValueError(f"output must not be one of the checkpoints, got {output}")
    opened = [open_checkpoint(path) for path in asked]
    known = steps_of(opened, steps) if coefficients is None or steps is not None else _numbered(opened)
    values = _values(known, rule, coefficients)
    order = sorted(range(len(opened)), key=known.__getitem__)
    opened, values = [opened[place] for place in order], [values[place] for place in order]
    check_alike(opened)
    _check_dtypes(opened[-1], newest, output)
    label = "coefficients" if coefficients is not None else rule_label(rule)
    told = (_told_steps(opened) if coefficients is not None and steps is None else None) or sorted(known)
    by_step = sorted(zip(told, values, [checkpoint.path.name for checkpoint in opened], strict=True))
    origin = provenance(label, {step: value for step, value, _ in by_step})
    origin["checkpoints"] = [name for *_, name in by_step]
    merged = merged_tensors(opened, values, newest, progress)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".safetensors":
        like = {name: tensor.like("meta") for name, tensor in opened[-1].tensors.items()}
        metadata = {key: json.dumps(value) for key, value in origin.items()} | {"format": "pt"}
        with atomic_write(output) as unfinished:
            write_safetensors(unfinished, like, (tensor for _, tensor in merged), metadata)
    else:
        save(output, _lightning_checkpoint(opened, dict(merged), newest, max(told)), origin)
    return origin


def steps_of(opened: Sequence[StoredCheckpoint], given: Sequence[int] | None = None) -> list[int]:
    """Steps of the checkpoints, in their order: those given, or those that the checkpoints or their names tell.

    Raises:
        ValueError: If a step is unknown, or that of two checkpoints.
    """
    if given is not None and len(given) != len(opened):
        raise ValueError(f"steps must be as many as checkpoints, {len(opened)}, got {len(given)}")
    steps = []
    for place, checkpoint in enumerate(opened):
        step = given[place] if given is not None else checkpoint.step
        if step is None:
            raise ValueError(f"neither {checkpoint.path} nor its name tells a step; give steps=[...]")
        check_count("steps", step, minimum=0)
        steps.append(step)
    if (twice := next((step for step in steps if steps.count(step) > 1), None)) is not None:
        same = [str(checkpoint.path) for checkpoint, step in zip(opened, steps, strict=True) if step == twice]
        raise ValueError(f"checkpoints must be of different steps, got {twice} of {' and '.join(same)}")
    return steps


def _numbered(opened: Sequence[StoredCheckpoint]) -> list[int]:
    """Whoever gives coefficients says what counts; the order is theirs."""
    return list(range(1, len(opened) + 1))


def _told_steps(opened: Sequence[StoredCheckpoint]) -> list[int] | None:
    """Steps that the checkpoints tell themselves; None unless all tell different ones."""
    told = [checkpoint.step for checkpoint in opened if checkpoint.step is not None]
    return told if len(set(told)) == len(opened) else None


def _values(steps: Sequence[int], rule: str | Rule, coefficients: Sequence[float] | None) -> list[float]:
    """Coefficients in the order of the steps given."""
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


def check_alike(opened: Sequence[StoredCheckpoint]) -> None:
    """Raises unless all have the same tensors, of the same shapes and dtypes.

    Raises:
        ValueError: The message names checkpoint and tensor.
    """
    first, *others = opened
    for other in others:
        if missing := sorted(first.tensors.keys() ^ other.tensors.keys()):
            has, lacks = (first, other) if missing[0] in first.tensors else (other, first)
            raise ValueError(f"{lacks.path} has no tensor {missing[0]}, which {has.path} has ({len(missing)} differ)")
        for name, tensor in first.tensors.items():
            theirs = other.tensors[name]
            if (tensor.shape, tensor.dtype) != (theirs.shape, theirs.dtype):
                described = [f"{each.dtype} {list(each.shape)}" for each in (tensor, theirs)]
                raise ValueError(f"{name} is {described[0]} in {first.path} but {described[1]} in {other.path}")


def merged_tensors(
    opened: Sequence[StoredCheckpoint],
    values: Sequence[float],
    newest: str | Sequence[str] = TAKEN_FROM_NEWEST,
    progress: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Name and merge of every tensor, one at a time.

    Args:
        opened: Checkpoints that are alike, oldest first.
        values: A coefficient for each.
        newest: A pattern, or several, of names that are taken from the newest checkpoint instead of merged.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a tensor holds NaN or inf, or is of integers that differ; the message names it.
    """
    last = opened[-1]
    num_bytes = sum(tensor.numel * tensor.dtype.itemsize for tensor in last.tensors.values())
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Merging", disable=not progress) as bar:
        for name, stored in last.tensors.items():
            out = stored.like("cpu")
            if fits(name, newest):
                out.view(-1).copy_(stored[:])
            elif stored.dtype.is_floating_point:
                combine_([out.view(-1)], [_Finite(checkpoint, name) for checkpoint in opened], [values])
            else:
                out.view(-1).copy_(_same(opened, name))
            bar.update(out.nbytes)
            yield name, out


@dataclass(frozen=True)
class _Finite:
    """A row of the sum, refused where it holds NaN or inf."""

    checkpoint: StoredCheckpoint
    name: str

    def __getitem__(self, part: slice, /) -> Tensor:
        content = self.checkpoint.tensors[self.name][part]
        if not content.isfinite().all():
            raise ValueError(f"{self.name} holds NaN or inf in {self.checkpoint.path}")
        return content


def _same(opened: Sequence[StoredCheckpoint], name: str) -> Tensor:
    """What all of them hold, to the bit; integers are not averaged."""
    last = opened[-1].tensors[name][:]
    for checkpoint in opened[:-1]:
        if not torch.equal(checkpoint.tensors[name][:], last):
            raise ValueError(
                f"{name} is {last.dtype}, which is not averaged, and differs between {checkpoint.path} and"
                f" {opened[-1].path}; newest=[{name}] takes the newest one"
            )
    return last


def _check_dtypes(checkpoint: StoredCheckpoint, newest: Sequence[str], output: Path) -> None:
    for name, tensor in checkpoint.tensors.items():
        if output.suffix == ".safetensors" and tensor.dtype not in SAFETENSORS_DTYPES:
            raise ValueError(
                f"{name} in {checkpoint.path} is {tensor.dtype}, which is not written to .safetensors here"
            )
        is_narrow = tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1
        if is_narrow and not fits(name, newest):
            raise ValueError(
                f"{name} in {checkpoint.path} is {tensor.dtype}, which is not summed; newest=[{name}] takes it as it is"
            )


def _lightning_checkpoint(
    opened: Sequence[StoredCheckpoint], state: dict[str, Tensor], newest: Sequence[str], step: int
) -> dict[str, Any]:
    """A checkpoint of weights alone, with what a module is made again from."""
    last = opened[-1]
    by_place: dict[Any, str] = {}
    for name, stored in last.tensors.items():
        first = by_place.setdefault((stored.pieces, stored.shape, fits(name, newest)), name) if stored.numel else name
        if all(each.tensors[name].pieces == each.tensors[first].pieces for each in opened):
            state[name] = state[first]
    kept = {key: last.beside[key] for key in _KEPT if key in last.beside}
    return {"state_dict": state, **fresh_run_entries(step), **kept}
