"""Opens checkpoints of several formats and finds their tensors, without reading values or unpickling objects."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

from merge_callback.checkpoints.distributed import open_distributed
from merge_callback.checkpoints.layouts import flattened, is_extra_state, model_keys, noted_step
from merge_callback.checkpoints.stored import (
    PROVENANCE_KEY,
    StoredCheckpoint,
    StoredTensor,
    file_inside,
    in_one_piece,
)
from merge_callback.checkpoints.torch_file import BROKEN, read_entries
from merge_callback.utilities.files import SAFETENSORS_DTYPES, read_header


def open_checkpoint(path: Path) -> StoredCheckpoint:
    """Opens a checkpoint and finds its tensors, without reading their values.

    Args:
        path: A Lightning ``.ckpt`` or another file of ``torch.save``; a ``.safetensors`` file; the
            ``.safetensors.index.json`` of several such files; a folder with one of these, as Hugging Face's trainer
            leaves it; or a folder of `torch.distributed.checkpoint`.

    Raises:
        ValueError: If the path is none of these, or the file is truncated.
    """
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        if path.is_dir():
            opened = _open_folder(path)
        elif path.name.endswith(".index.json"):
            opened = _open_index(path)
        elif path.suffix == ".safetensors":
            opened = _open_safetensors(path)
        else:
            opened = _open_torch(path)
    except BROKEN as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} is no checkpoint that can be read in parts: {error}") from error
    if not opened.tensors:
        raise ValueError(f"{path} holds no tensors of a model")
    step = opened.step if opened.step is not None else step_in_name(path)
    return replace(opened, path=path, step=step)


def step_in_name(path: Path) -> int | None:
    """Returns the step in the name of a file, or of its folder: the number after ``step``, or the only number.

    Examples:
        >>> step_in_name(Path("epoch=3-step=1200.ckpt")), step_in_name(Path("model_500.safetensors"))
        (1200, 500)
        >>> step_in_name(Path("timestep=5-step=100.pt")), step_in_name(Path("checkpoint-500/model.safetensors"))
        (100, 500)
    """
    if found := re.search(r"(?<![A-Za-z])step[=_-]?(\d+)", path.name):
        return int(found[1])
    if numbers := re.findall(r"\d+", path.name.rpartition(".")[0] or path.name):
        return int(numbers[0]) if len(numbers) == 1 else None
    found = re.fullmatch(r"(?:step|checkpoint|iter)[=_-]?(\d+)", path.parent.name)
    return int(found[1]) if found else None


def _open_torch(path: Path) -> StoredCheckpoint:
    content = read_entries(path)
    values = flattened(content)
    names = model_keys({keys: isinstance(value, StoredTensor) for keys, value in values.items()})
    if others := [keys for keys in names if not all(isinstance(key, str) for key in keys)]:
        raise ValueError(f"{path}: names of tensors must be strings, got {others[0][-1]!r}")
    tensors, extra = {}, {}
    for keys, name in names.items():
        if isinstance(values[keys], StoredTensor):
            tensors[name] = values[keys]
        elif is_extra_state(name):
            extra[name] = values[keys]
        else:
            raise ValueError(f"{path}: {name} is no tensor")
    taken = {keys[0] for keys in names}
    beside = {key: value for key, value in content.items() if key not in taken}
    return StoredCheckpoint(path, tensors, noted_step(beside), beside, extra)


def _open_index(path: Path) -> StoredCheckpoint:
    files = json.loads(path.read_text())["weight_map"]
    known = {}
    for name in sorted(set(files.values())):
        known[name] = _open_safetensors(file_inside(path.parent, name)).tensors
    return StoredCheckpoint(path, {name: known[file][name] for name, file in files.items()})


def _open_folder(folder: Path) -> StoredCheckpoint:
    if (folder / ".metadata").exists():
        return open_distributed(folder)
    for pattern, opened in (
        ("*.safetensors.index.json", _open_index),
        ("*.safetensors", _open_safetensors),
        ("pytorch_model.bin", _open_torch),
    ):
        if len(found := sorted(folder.glob(pattern))) == 1:
            return opened(found[0])
    raise ValueError(
        f"{folder} is neither a folder of torch.distributed.checkpoint, nor one with one file or one index of"
        " safetensors"
    )


def _open_safetensors(path: Path) -> StoredCheckpoint:
    header, begin = read_header(path)
    told = header.pop("__metadata__", None)
    dtypes = {label: dtype for dtype, label in SAFETENSORS_DTYPES.items()}
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in dtypes:
            raise ValueError(f"{path}: {name} has an unsupported dtype: {entry['dtype']}")
        shape, dtype = tuple(entry["shape"]), dtypes[entry["dtype"]]
        start, end = entry["data_offsets"]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name} takes {end - start} bytes, which do not fit its shape {list(shape)}")
        tensors[name] = in_one_piece(path, begin + start, shape, dtype)
    is_merge = isinstance(told, dict) and "rule" in told
    return StoredCheckpoint(path, tensors, beside={PROVENANCE_KEY: told} if is_merge else {})
