"""Checks that checkpoints fit together: of different steps, with the same tensors, none of them an average already."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from merge_callback.checkpoints.stored import StoredCheckpoint
from merge_callback.live.names import clean_name
from merge_callback.utilities.checks import check_count


def steps_of(opened: Sequence[StoredCheckpoint], given: Sequence[int] | None = None) -> list[int]:
    """Returns the step of each checkpoint: the given one, or the one in the checkpoint or its file name.

    Raises:
        ValueError: If a step is unknown, or two checkpoints have the same step.
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


def told_steps(opened: Sequence[StoredCheckpoint]) -> list[int] | None:
    """Returns the steps in the checkpoints or their file names; None unless all have one and all differ."""
    told = [checkpoint.step for checkpoint in opened if checkpoint.step is not None]
    return told if len(set(told)) == len(opened) else None


def refuse_averages(opened: Sequence[StoredCheckpoint]) -> None:
    """Raises ValueError if a checkpoint holds a merge or an average, which merged again stands for no known decay.

    Raises:
        ValueError: If there is one. The message names it and says what it holds.
    """
    for checkpoint in opened:
        if checkpoint.average:
            raise ValueError(
                f"{checkpoint.path} holds {checkpoint.average}, not the weights of one step; leave it out"
                " (merge_checkpoints takes it with of_averages=True)"
            )


def alike(opened: Sequence[StoredCheckpoint]) -> list[StoredCheckpoint]:
    """Returns the checkpoints with the last one's names of tensors, where wrappers such as torch.compile add to them.

    Raises:
        ValueError: If they then differ in names, shapes or dtypes. The message names the checkpoints and the tensor.
    """
    theirs = {clean_name(name): name for name in opened[-1].tensors}
    found = [_renamed(each, theirs) for each in opened]
    _check_alike(found)
    return found


def _renamed(checkpoint: StoredCheckpoint, theirs: Mapping[str, str]) -> StoredCheckpoint:
    """Returns the checkpoint with names by clean name, unless that would make two tensors one."""
    tensors = {theirs.get(clean_name(name), name): tensor for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors) if len(tensors) == len(checkpoint.tensors) else checkpoint


def _check_alike(opened: Sequence[StoredCheckpoint]) -> None:
    """Raises ValueError unless all checkpoints have the same tensor names, shapes and dtypes.

    Raises:
        ValueError: If they differ. The message names the checkpoints and the tensor.
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
