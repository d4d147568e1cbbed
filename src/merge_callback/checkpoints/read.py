"""Checkpoints on disk, of which tensors are read in parts, whatever wrote them; nothing is loaded whole or unpickled.

Every format comes down to pieces: in which file, from which byte on, a part of a tensor lies. Pieces are read as far as
they are asked for, so that many large checkpoints can be merged with little memory. Mapping the files into memory
instead would count all of them.
"""

import io
import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from merge_callback.utilities.files import SAFETENSORS_DTYPES, read_header, read_into


@dataclass(frozen=True)
class Piece:
    """A rectangular part of a tensor, in a file."""

    file: Path
    position: int
    # Where it lies in the whole tensor, and its own shape and strides.
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Its part from one index of the first dimension to another."""
        shape = (stop - start, *self.shape[1:])
        span = 1 + sum((size - 1) * step for size, step in zip(shape, self.stride, strict=True))
        content = torch.empty(span, dtype=dtype)
        begin = self.position + start * self.stride[0] * dtype.itemsize
        read_into(self.file, begin, content.view(torch.uint8).numpy().data)
        return content.as_strided(shape, self.stride)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk; indexing it with a slice reads that part of it, flat."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def like(self, device: str) -> Tensor:
        """A tensor of its shape and dtype, without its values."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    def __getitem__(self, part: slice, /) -> Tensor:
        start, stop, _ = part.indices(self.numel)
        if start >= stop:
            return torch.empty(0, dtype=self.dtype)
        # A number of its own is a row of one.
        shape = self.shape or (1,)
        row_numel = math.prod(shape[1:])
        first, last = start // row_numel, -(-stop // row_numel)
        rows = torch.empty(last - first, *shape[1:], dtype=self.dtype)
        for piece in self.pieces:
            offset, num_rows = (piece.offsets or (0,))[0], (piece.shape or (1,))[0]
            low, high = max(first, offset), min(last, offset + num_rows)
            if low >= high or 0 in piece.shape:
                continue
            inside = zip(piece.offsets[1:], piece.shape[1:], strict=True)
            where = (slice(low - first, high - first), *(slice(begin, begin + size) for begin, size in inside))
            rows[where] = _as_rows(piece).rows(low - offset, high - offset, self.dtype)
        return rows.view(-1)[start - first * row_numel : stop - first * row_numel]


def _as_rows(piece: Piece) -> Piece:
    return piece if piece.shape else Piece(piece.file, piece.position, (0,), (1,), (1,))


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint on disk: its tensors by name, the step it was taken at, and what stands beside the tensors."""

    path: Path
    tensors: dict[str, StoredTensor]
    step: int | None = None
    # Of a Lightning checkpoint: hyperparameters and the like.
    beside: Mapping[str, Any] = field(default_factory=dict)


# What files that are cut short, changed or of other kinds lead to.
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
    """Finds the tensors of a checkpoint, without reading them.

    Args:
        path: A Lightning ``.ckpt`` or another file of ``torch.save``; a ``.safetensors`` file, or the
            ``.safetensors.index.json`` of several, or a folder with one; a folder of `torch.distributed.checkpoint`.

    Raises:
        ValueError: If it is none of these, or was cut short, repacked, or holds what only unpickling would read.
    """
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        if path.is_dir():
            opened = _open_distributed(path) if (path / ".metadata").exists() else _open_index(_index_of(path))
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
    """The step that a file's name tells: after ``step``, or its only number.

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
        raise ValueError(f"{path} is of torch's old format; load it and save it once more")
    contents = _zip_contents(path)
    tensors = {}
    for name, tensor in state.items():
        _refuse_lazy(path, name, tensor)
        storage = tensor.untyped_storage()
        position: int = getattr(storage, "_checkpoint_offset", None) or 0
        # torch calculates the position; a file that was packed again has it elsewhere.
        if storage.nbytes() and contents.get(position) != storage.nbytes():
            raise ValueError(f"{path}: {name} is not where torch would have written it; was the file packed again?")
        begin = position + tensor.storage_offset() * tensor.element_size()
        tensors[name] = _in_one_piece(path, begin, tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()))
    beside = {k: v for k, v in checkpoint.items() if k != "state_dict"} if state is not checkpoint else {}
    return StoredCheckpoint(path, tensors, beside.get("global_step"), beside)


def _open_index(path: Path) -> StoredCheckpoint:
    files = json.loads(path.read_text())["weight_map"]
    known = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise ValueError(f"{path} names a file elsewhere: {name!r}")
        known[name] = _safetensors(path.with_name(name))
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
            raise ValueError(f"{path}: {name} is of a dtype that is not known here: {entry['dtype']}")
        shape, dtype = tuple(entry["shape"]), dtypes[entry["dtype"]]
        start, end = entry["data_offsets"]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name} takes {end - start} bytes, which do not fit its shape {list(shape)}")
        tensors[name] = _in_one_piece(path, begin + start, shape, dtype)
    return tensors


def _refuse_lazy(path: Path, name: str, tensor: Tensor) -> None:
    """Values that torch calculates only when they are asked for are not those in the file."""
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{path}: {name} is a lazily conjugated or negated view; save it resolved")


def _in_one_piece(
    path: Path, position: int, shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None = None
) -> StoredTensor:
    stride = stride if stride is not None else torch.empty(shape, device="meta").stride()
    return StoredTensor(shape, dtype, (Piece(path, position, (0,) * len(shape), shape, stride),))


def _zip_contents(path: Path) -> dict[int, int]:
    """Position -> length of everything that lies in a zip file as it is, not compressed."""
    contents = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            file.seek(entry.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            if entry.compress_type == zipfile.ZIP_STORED:
                contents[entry.header_offset + 30 + name_length + extra_length] = entry.file_size
    return contents


# What the metadata of a distributed checkpoint is made of; nothing else is unpickled.
_METADATA_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_METADATA_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("collections", "OrderedDict"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not (is_dtype or module in _METADATA_MODULES or (module, name) in _METADATA_NAMES):
            raise pickle.UnpicklingError(f"its metadata asks for {module}.{name}")
        return super().find_class(module, name)


def _open_distributed(path: Path) -> StoredCheckpoint:
    with (path / ".metadata").open("rb") as stream:
        metadata = _MetadataUnpickler(stream).load()
    stored = {
        key: value for key, value in metadata.state_dict_metadata.items() if isinstance(value, TensorStorageMetadata)
    }
    # Names as they were before nested dicts were flattened.
    parts = {key: (metadata.planner_data or {}).get(key, (key,)) for key in stored}
    groups = sorted({str(names[0]) for names in parts.values() if len(names) > 1})
    if len(groups) > 1 and "state_dict" not in groups:
        raise ValueError(f"{path} holds several dictionaries ({', '.join(groups)}); save that of the model alone")
    nested = {key: ".".join(map(str, names[1:])) for key, names in parts.items() if names[0] == "state_dict"}
    names = nested or {key: ".".join(map(str, names)) for key, names in parts.items()}
    tensors = {}
    for key, name in names.items():
        pieces = []
        for chunk in stored[key].chunks:
            where = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            if getattr(where, "transform_descriptors", None):
                raise ValueError(f"{path}: {name} was transformed when it was written")
            begin, tensor = _saved_alone(path / where.relative_path, where.offset, where.length)
            _refuse_lazy(path, name, tensor)
            pieces.append(
                Piece(path / where.relative_path, begin, tuple(chunk.offsets), tuple(chunk.sizes), tensor.stride())
            )
        properties = stored[key].properties
        tensors[name] = StoredTensor(tuple(stored[key].size), properties.dtype, tuple(pieces))
    # Beside the shards Lightning keeps the rest of its checkpoint.
    beside = torch.load(path / "meta.pt", weights_only=True) if (path / "meta.pt").exists() else {}
    return StoredCheckpoint(path, tensors, beside.get("global_step"), beside)


def _saved_alone(file: Path, offset: int, length: int) -> tuple[int, Tensor]:
    """Where in a file the data of one tensor lie that ``torch.save`` wrote into a part of it, and the tensor, empty."""
    with file.open("rb") as stream:
        tensor = torch.load(io.BufferedReader(_Part(stream, offset, length)), map_location="meta", weights_only=True)
    storage = tensor.untyped_storage()
    return offset + (storage._checkpoint_offset or 0) + tensor.storage_offset() * tensor.element_size(), tensor


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, stream: Any, offset: int, length: int) -> None:
        self._stream, self._offset, self._length, self._at = stream, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._offset + self._at)
        content = self._stream.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
