"""Reads files of ``torch.save`` without reading the values of tensors, and without creating any object.

Such a file is a zip file: a pickle, in which tensors refer to storages by number, and one entry for each storage. Here
a tensor is where its values lie in the file. This needs nothing of torch's own reader, so it is the same in every
version of torch.
"""

import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from merge_callback.checkpoints.inert import Inert, InertFunction, InertUnpickler, inert_names
from merge_callback.checkpoints.stored import StoredTensor, in_one_piece

_OF_STORAGE = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
DTYPES = {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

# Errors that truncated, modified or foreign files may raise.
BROKEN = (
    OSError,
    LookupError,
    EOFError,
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def read_torch_file(path: Path, part: BinaryIO | None = None, start: int = 0) -> Any:
    """Returns what ``torch.save`` wrote, with a `StoredTensor` for each tensor and `Inert` for each other object.

    Args:
        path: The file.
        part: The part of the file that ``torch.save`` wrote, as a file of its own; None is the whole file.
        start: Byte of the file at which the part begins.

    Raises:
        ValueError: If the file has another format, or a tensor whose values do not lie in it as they are.
    """
    with path.open("rb") as whole:
        stream = part or whole
        begin = stream.read(2)
        if not zipfile.is_zipfile(stream):
            kind = "was cut short" if begin == b"PK" else "is no file of torch.save" if begin else "is empty"
            older = "" if begin in (b"PK", b"") else ", or one in its old format; load it and save it again"
            raise ValueError(f"{path} {kind}{older}")
        with zipfile.ZipFile(stream) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            pickled = next((name for name in entries if name.rpartition("/")[2] == "data.pkl"), None)
            if pickled is None:
                raise ValueError(f"{path} is a zip file, but none of torch.save")
            folder = pickled.removesuffix("data.pkl")
            if f"{folder}constants.pkl" in entries:
                raise ValueError(f"{path} is a TorchScript program, not a checkpoint")
            if f"{folder}byteorder" in entries and archive.read(f"{folder}byteorder") != b"little":
                raise ValueError(f"{path} was written on a machine with another order of bytes")
            content = archive.read(pickled)
        places = {
            name.removeprefix(f"{folder}data/"): _place(stream, entry, start)
            for name, entry in entries.items()
            if entry.compress_type == zipfile.ZIP_STORED
        }
    return _TorchUnpickler(content, path, places).load()


def read_entries(path: Path) -> dict[Any, Any]:
    """Returns what `read_torch_file` does for a file that holds a dictionary.

    Raises:
        ValueError: If it holds something else.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary")  # noqa: TRY004 (no argument)
    return content


def _place(stream: BinaryIO, entry: zipfile.ZipInfo, start: int) -> tuple[int, int]:
    """Returns the position in the file and the length of an entry's content."""
    stream.seek(entry.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", stream.read(4))
    return start + entry.header_offset + 30 + name_length + extra_length, entry.file_size


@dataclass(frozen=True, eq=False)
class _Storage(Inert):
    file: Path
    dtype: torch.dtype
    position: int
    size: int


class _TorchUnpickler(InertUnpickler):
    def __init__(self, pickled: bytes, file: Path, places: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(pickled, _KNOWN)
        self._file = file
        self._places = places

    def persistent_load(self, pid: Any) -> _Storage:
        """Returns the storage of which the pickle gives the number."""
        _, kind, key, *_ = pid
        if key not in self._places:
            raise ValueError(f"{self._file}: the values of storage {key} are not there, or compressed")
        return _Storage(self._file, _DTYPE_OF[kind], *self._places[key])


def _tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *more: Any
) -> StoredTensor:
    # Further arguments: whether it requires a gradient, its hooks, and possibly which kind of lazy view it is.
    lazy = more[2] if len(more) > 2 else None
    if isinstance(lazy, dict) and any(lazy.get(name) for name in ("conj", "neg")):
        raise ValueError(f"{storage.file} holds a lazily conjugated or negated view; save it resolved")
    itemsize = storage.dtype.itemsize
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
    if min((offset, *shape, *stride), default=0) < 0 or (offset + span) * itemsize > storage.size:
        what = f"a tensor of shape {list(shape)} does not lie in its storage of {storage.size} bytes"
        raise ValueError(f"{storage.file}: {what}")
    begin = storage.position + offset * itemsize
    return in_one_piece(storage.file, begin, tuple(shape), storage.dtype, tuple(stride))


def _tensor_with_dtype(storage: _Storage, *arguments: Any) -> StoredTensor:
    # The dtype comes after the hooks, and then what `_tensor` may get there.
    *as_before, dtype = arguments[:6]
    return _tensor(replace(storage, dtype=dtype), *as_before, *arguments[6:])


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_with_dtype,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    # A parameter with attributes of its own, and the class of which it is.
    ("torch._tensor", "_rebuild_from_type_v2"): lambda call, kind, arguments, state: call(*arguments),
    ("torch", "Size"): tuple,
}
_STORAGES = {
    (module, name): InertFunction(lambda *_: None) for module in ("torch", "torch.storage") for name in _OF_STORAGE
}
_DTYPE_OF = {storage: _OF_STORAGE[name] for (_, name), storage in _STORAGES.items()}
_KNOWN = DTYPES | _STORAGES | {name: InertFunction(call) for name, call in _FUNCTIONS.items()}


def plain(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns what `read_torch_file` found with the values of tensors, and without the entries that hold objects."""
    return _plain_entries(content, {})


def _plain_entries(content: Mapping[Any, Any], known: dict[int, Any]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    known[id(content)] = found
    for key, value in content.items():
        if not inert_names([key]) and (isinstance(value, dict) or not inert_names([value])):
            found[key] = _plain(value, known)
    return found


def _plain(value: Any, known: dict[int, Any]) -> Any:
    # A content may refer to one of its parts very often, and a list to itself.
    if id(value) not in known:
        if isinstance(value, dict):
            _plain_entries(value, known)
        elif isinstance(value, list):
            known[id(value)] = found = []
            found += [_plain(each, known) for each in value]
        elif isinstance(value, tuple | set | frozenset):
            known[id(value)] = type(value)(_plain(each, known) for each in value)
        else:
            known[id(value)] = value[:].view(value.shape) if isinstance(value, StoredTensor) else value
    return known[id(value)]
