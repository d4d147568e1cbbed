"""Opens checkpoints of several formats and finds their tensors, without reading values or unpickling objects."""

import json
import math
import pickle
import re
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from merge_callback.checkpoints.distributed import open_distributed
from merge_callback.checkpoints.stored import (
    StoredCheckpoint,
    StoredTensor,
    file_inside,
    in_one_piece,
    position_in_file,
    refuse_lazy,
)
from merge_callback.utilities.files import SAFETENSORS_DTYPES, read_header

# Errors that truncated, modified or foreign files may raise.
_BROKEN = (
    OSError,
    LookupError,
    EOFError,
    RuntimeError,
    TypeError,
    AttributeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def open_checkpoint(path: Path) -> StoredCheckpoint:
    """Opens a checkpoint and finds its tensors, without reading their values.

    Args:
        path: A Lightning ``.ckpt`` or another file of ``torch.save``; a ``.safetensors`` file; the
            ``.safetensors.index.json`` of several such files, or a folder with one; or a folder of
            `torch.distributed.checkpoint`.

    Raises:
        ValueError: If the path is none of these, or the file is truncated, was repacked, or holds objects that would
            have to be unpickled.
    """
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        if path.is_dir():
            opened = open_distributed(path) if (path / ".metadata").exists() else _open_index(_index_of(path))
        elif path.name.endswith(".index.json"):
            opened = _open_index(path)
        elif path.suffix == ".safetensors":
            opened = StoredCheckpoint(path, _safetensors(path))
        else:
            opened = _open_torch(path)
    except (*_BROKEN, ValueError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} is no checkpoint that can be read in parts: {error}") from error
    if others := [name for name in opened.tensors if not isinstance(name, str)]:
        raise ValueError(f"{path}: names of tensors must be strings, got {others[0]!r}")
    step = opened.step if opened.step is not None else step_in_name(path)
    return StoredCheckpoint(path, opened.tensors, step, opened.beside)


def step_in_name(path: Path) -> int | None:
    """Returns the step in a file's name: the number after ``step``, or the only number. None without either.

    Examples:
        >>> step_in_name(Path("epoch=3-step=1200.ckpt")), step_in_name(Path("model_500.safetensors"))
        (1200, 500)
    """
    if found := re.search(r"step[=_-]?(\d+)", path.name):
        return int(found[1])
    numbers = re.findall(r"\d+", path.name.partition(".")[0])
    return int(numbers[0]) if len(numbers) == 1 else None


def _open_torch(path: Path) -> StoredCheckpoint:
    checkpoint = torch.load(path, map_location="meta", weights_only=True)
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {"what it holds": checkpoint}
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path}: {others[0]} is no tensor")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is in torch's old format; load it and save it again")
    contents = _zip_contents(path)
    tensors = {}
    for name, tensor in state.items():
        refuse_lazy(path, name, tensor)
        storage = tensor.untyped_storage()
        begin = position_in_file(tensor)
        position = begin - tensor.storage_offset() * tensor.element_size()
        # torch calculates the position from the layout that it writes; in a repacked zip file it may differ.
        if storage.nbytes() and contents.get(position) != storage.nbytes():
            raise ValueError(f"{path}: {name} is not where torch would have written it; was the file packed again?")
        tensors[name] = in_one_piece(path, begin, tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()))
    beside = {k: v for k, v in checkpoint.items() if k != "state_dict"} if state is not checkpoint else {}
    return StoredCheckpoint(path, tensors, beside.get("global_step"), beside)


def _open_index(path: Path) -> StoredCheckpoint:
    files = json.loads(path.read_text())["weight_map"]
    known = {}
    for name in sorted(set(files.values())):
        known[name] = _safetensors(file_inside(path.parent, name))
    return StoredCheckpoint(path, {name: known[file][name] for name, file in files.items()})


def _index_of(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors.index.json"))
    if len(found) != 1:
        raise ValueError(
            f"{folder} is neither a folder of torch.distributed.checkpoint nor one with an index of safetensors"
        )
    return found[0]


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    header, begin = read_header(path)
    dtypes = {label: dtype for dtype, label in SAFETENSORS_DTYPES.items()}
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in dtypes:
            raise ValueError(f"{path}: {name} has an unsupported dtype: {entry['dtype']}")
        shape, dtype = tuple(entry["shape"]), dtypes[entry["dtype"]]
        start, end = entry["data_offsets"]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name} takes {end - start} bytes, which do not fit its shape {list(shape)}")
        tensors[name] = in_one_piece(path, begin + start, shape, dtype)
    return tensors


def _zip_contents(path: Path) -> dict[int, int]:
    """Returns position -> length in bytes of every uncompressed entry of a zip file."""
    contents = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            file.seek(entry.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            if entry.compress_type == zipfile.ZIP_STORED:
                contents[entry.header_offset + 30 + name_length + extra_length] = entry.file_size
    return contents
