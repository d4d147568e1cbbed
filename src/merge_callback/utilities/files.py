"""Files that appear whole or not at all, and tensors written one after the other."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a path to write to; what was written takes the place of ``path`` when the block ends without an error.

    Of a symbolic link to a file, that of the file, as whoever writes to a link expects.
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
    """Writes a .safetensors file tensor by tensor; the library wants them all at once, and copies them.

    Args:
        path: Where to.
        state: Name -> tensor that has the shape and dtype of what is written under that name.
        tensors: What is written, in the same order, one at a time.
        metadata: Kept in the header.
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
    # The tensors start at a multiple of eight bytes.
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for tensor in tensors:
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a .safetensors file, and where its tensors begin.

    Raises:
        ValueError: If it is none, or was cut short.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= path.stat().st_size - 8:
            raise ValueError("it has no header")
        header: dict[str, Any] = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if path.stat().st_size != 8 + length + max(ends, default=0):
        raise ValueError("it is not as long as its header says")
    return header, 8 + length


def read_into(path: Path, begin: int, buffer: memoryview) -> None:
    """Fills the buffer with what a file holds from a byte on.

    Raises:
        ValueError: If the file ends before.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        done = 0
        while done < len(buffer):
            got = file.readinto(buffer[done:])
            if not got:
                raise ValueError(f"{path} ends before byte {begin + len(buffer)}")
            done += got


class FlatTensor:
    """A flat tensor in a .safetensors file, of which parts are read as they are asked for.

    Args:
        path: The file.
        name: Which of its tensors.

    Raises:
        ValueError: If the file is no whole one.
        KeyError: If it has no tensor of that name.
    """

    def __init__(self, path: Path, name: str) -> None:
        header, begin = read_header(path)
        self._path = path
        self._dtype = next(dtype for dtype, label in SAFETENSORS_DTYPES.items() if label == header[name]["dtype"])
        first, end = header[name]["data_offsets"]
        self._begin, self._numel = begin + first, (end - first) // self._dtype.itemsize

    def __getitem__(self, part: slice, /) -> Tensor:
        start, stop, _ = part.indices(self._numel)
        if stop - start == self._numel > 0:
            # Pages come in as they are touched, and need no memory of their own.
            storage = torch.UntypedStorage.from_file(str(self._path), False, self._path.stat().st_size)
            numel = self._numel * self._dtype.itemsize
            content = torch.empty(0, dtype=torch.uint8)
            content.set_(storage, self._begin, (numel,), (1,))  # type: ignore[arg-type]
            return content.view(self._dtype)
        content = torch.empty(max(0, stop - start), dtype=self._dtype)
        read_into(self._path, self._begin + start * self._dtype.itemsize, content.view(torch.uint8).numpy().data)
        return content
