"""Writes a merge as a folder of `torch.distributed.checkpoint`, each rank its share of the tensors, one at a time."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from merge_callback.live.sharding import all_gather_dict, num_ranks, rank

# The entry of a checkpoint that holds the tensors, as in the folders that Lightning writes.
_ENTRY = "state_dict"


def shares(sizes: Mapping[str, int], num_parts: int) -> list[list[str]]:
    """Divides tensors into parts of about the same size.

    Args:
        sizes: Name -> bytes.
        num_parts: Number of parts.

    Examples:
        >>> shares({"a": 5, "b": 3, "c": 3, "d": 1}, 2)
        [['a', 'd'], ['b', 'c']]
    """
    parts: list[list[str]] = [[] for _ in range(num_parts)]
    filled = [0] * num_parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        place = filled.index(min(filled))
        parts[place].append(name)
        filled[place] += sizes[name]
    return parts


def write_folder(
    folder: Path, like: Mapping[str, Tensor], make: Callable[[str], Tensor], origin: Mapping[str, Any]
) -> None:
    """Writes tensors to a folder, which appears only when it is complete. All ranks must call it together.

    Each rank makes and writes its share of the tensors, one at a time. `torch.distributed.checkpoint` reads the folder
    on any number of ranks.

    Args:
        folder: The folder; on every rank the same one. Missing parents are created.
        like: Name -> tensor of the shape and dtype to write; values are not read.
        make: Returns the tensor of a name.
        origin: Provenance, written to ``merge.json``.

    Raises:
        ValueError: If the folder exists, or from ``make``; on all ranks.
        OSError: If the folder cannot be written; on all ranks.
    """
    own = shares({name: each.numel() * each.element_size() for name, each in like.items()}, num_ranks())[rank()]
    with _published(folder) as unfinished, _own_errors(), warnings.catch_warnings():
        # That it is a single process is known.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(
            {_ENTRY: {name: like[name] for name in own}},
            # One tensor after the other, also where there is a GPU.
            storage_writer=dcp.FileSystemWriter(unfinished, thread_count=1, per_thread_copy_ahead=0),
            planner=_MakingPlanner(make),
            no_dist=num_ranks() == 1,
        )
        _by_first_rank(lambda: (unfinished / "merge.json").write_text(json.dumps(dict(origin))))


class _MakingPlanner(DefaultSavePlanner):
    """Makes each tensor only when it is about to be written, and empties it afterwards: torch keeps all of a file."""

    def __init__(self, make: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._make = make
        self._written = torch.empty(0)

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        self._written.untyped_storage().resize_(0)
        made = self._make(write_item.index.fqn.removeprefix(f"{_ENTRY}."))
        # Memory that numpy has seen cannot be given back.
        self._written = made if made.untyped_storage().resizable() else made.clone()
        return self._written


@contextmanager
def _published(folder: Path) -> Iterator[Path]:
    """Yields a folder that takes the given place when the block ends without an error on all ranks."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")

    def begin() -> None:
        # Of an earlier attempt that was killed.
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def publish() -> None:
        for path in (unfinished / "merge.json", unfinished):
            _sync(path)
        unfinished.rename(folder)
        _sync(folder.parent)

    _by_first_rank(begin)
    try:
        yield unfinished
        _by_first_rank(publish)
    finally:
        if rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raises an error of any rank as itself, instead of as torch's exception, which `except Exception` misses."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise cause from None


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _by_first_rank(act: Callable[[], Any]) -> None:
    """Lets rank 0 act while the others wait. An OSError of it is raised on all ranks, so that none waits for ever."""
    problem = {}
    if rank() == 0:
        try:
            act()
        except OSError as error:
            problem = {0: str(error)}
    if found := all_gather_dict(problem):
        raise OSError(found[0])
