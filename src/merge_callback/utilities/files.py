"""Atomic file writes, and reading and writing of .safetensors files in parts."""

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO
from weakref import finalize

import torch
from torch import Tensor

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# Each time so many bytes of a file were read, the system is asked to read twice as many beyond them.
READ_AHEAD = 2**22


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path, which replaces ``path`` when the block ends without an error.

    After an error ``path`` is unchanged and the temporary file is deleted. If ``path`` is a symbolic link to a file,
    that file is replaced and the link stays.
    """
    if path.is_symlink() and path.is_file():
        path = path.resolve()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_safetensors(
    path: Path, state: Mapping[str, Tensor], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a .safetensors file one tensor at a time.

    The safetensors library needs all tensors at once, and copies them.

    Args:
        path: The file to write.
        state: Name -> tensor with the shape and dtype of the tensor to write under that name. Its values are not read.
        tensors: The tensors to write, in the order of ``state``.
        metadata: Strings that are stored in the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in state.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    content = json.dumps(header).encode()
    # As the safetensors library does: padding makes the tensors start at a multiple of eight bytes.
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for tensor in tensors:
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the header of a .safetensors file and the byte at which its tensors begin.

    Raises:
        ValueError: If the file has no valid header, or its length does not match the header.
    """
    with path.open("rb") as file:
        return _header(file, path.stat().st_size)


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= size - 8:
        raise ValueError("it has no header")
    try:
        header: dict[str, Any] = json.loads(file.read(length))
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is not that of a .safetensors file: {error}") from error
    if size != 8 + length + max(ends, default=0):
        raise ValueError("it is not as long as its header says")
    return header, 8 + length


def read_into(path: Path, begin: int, buffer: memoryview) -> None:
    """Fills the buffer with the bytes of a file from byte ``begin`` on.

    The system is asked to read on from there, since files are read from the front to the back, several of them by
    turns, and each of them in small parts.

    Raises:
        ValueError: If the file ends before the buffer is full.
    """
    with path.open("rb", buffering=0) as file:
        end = begin + len(buffer)
        if begin // READ_AHEAD != end // READ_AHEAD and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), end, 2 * READ_AHEAD, os.POSIX_FADV_WILLNEED)
        _read_into(file, begin, buffer)


def _read_into(file: FileIO, begin: int, buffer: memoryview) -> None:
    file.seek(begin)
    done = 0
    while done < len(buffer):
        got = file.readinto(buffer[done:])
        if not got:
            raise ValueError(f"{file.name} ends before byte {begin + len(buffer)}")
        done += got


class FlatTensor:
    """A one-dimensional tensor in a .safetensors file; indexing it with a slice reads that part.

    Args:
        path: The .safetensors file.
        name: Name of the tensor in the file.

    Raises:
        ValueError: If the file is incomplete or has no header.
        KeyError: If the file has no tensor of that name.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._file = os.open(path, os.O_RDONLY)
        # Open as long as this tensor is in use, so that it stays readable if the file is replaced or deleted meanwhile.
        finalize(self, os.close, self._file)
        with os.fdopen(os.dup(self._file), "rb") as file:
            header, begin = _header(file, os.fstat(self._file).st_size)
        self._dtype = next(dtype for dtype, label in SAFETENSORS_DTYPES.items() if label == header[name]["dtype"])
        first, end = header[name]["data_offsets"]
        self._begin, self._numel = begin + first, (end - first) // self._dtype.itemsize

    def __getitem__(self, part: slice, /) -> Tensor:
        start, stop, _ = part.indices(self._numel)
        if stop - start == self._numel > 0:
            # A whole tensor is mapped: its pages load when they are touched, and the system can drop them again.
            # Copy on write, since torch has no read-only tensors.
            mapped = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)
            return torch.frombuffer(mapped, dtype=self._dtype, count=self._numel, offset=self._begin)
        content = torch.empty(max(0, stop - start), dtype=self._dtype)
        with os.fdopen(os.dup(self._file), "rb", buffering=0) as file:
            _read_into(file, self._begin + start * self._dtype.itemsize, content.view(torch.uint8).numpy().data)
        return content
