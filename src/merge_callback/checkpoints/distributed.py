"""Finds the pieces of each tensor in folders of `torch.distributed.checkpoint`."""

import io
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from merge_callback.checkpoints.inert import InertFunction, InertUnpickler
from merge_callback.checkpoints.layouts import model_keys, noted_step
from merge_callback.checkpoints.stored import PROVENANCE_KEY, StoredCheckpoint, StoredTensor, file_inside
from merge_callback.checkpoints.torch_file import DTYPES, read_entries, read_torch_file

# All that the metadata of a distributed checkpoint may name. Each only holds data. Whole modules must not be allowed,
# since they hold functions that delete files, and a dotted name leads from them to `os.system`.
_METADATA_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for _, name in DTYPES)},
    "pathlib": {"PosixPath", "WindowsPath"},
    # Where Python 3.13 has them.
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): lambda *_: None,
    ("torch.serialization", "_get_layout"): lambda *_: None,
    ("torch", "Size"): tuple,
    **{
        (module, name): lambda *parts: "/".join(parts)
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    },
}
_KNOWN = DTYPES | {name: InertFunction(call) for name, call in _FUNCTIONS.items()}


class _Entry:
    """An object of the metadata, of which only the attributes matter. Each load has classes of its own."""

    def __setstate__(self, state: Any) -> None:
        # Properties of tensors are a tuple that begins with the dtype.
        vars(self).update({"dtype": state[0]} if isinstance(state, tuple) else state)


class _MetadataUnpickler(InertUnpickler):
    """Never hands out what the process uses elsewhere, since a pickle can set attributes of it."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"its metadata asks for {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)

    def stand_in(self, module: str, name: str) -> Any:
        return type(name, (_Entry,), {})


def open_distributed(path: Path) -> StoredCheckpoint:
    """Opens a folder of `torch.distributed.checkpoint` and finds its tensors, without reading their values.

    Raises:
        ValueError: If the folder holds several dictionaries, or tensors that were transformed when they were written.
    """
    with (path / ".metadata").open("rb") as stream:
        metadata = _MetadataUnpickler(stream.read(), _KNOWN).load()
    stored = {
        key: value
        for key, value in metadata.state_dict_metadata.items()
        if type(value).__name__ == "TensorStorageMetadata"
    }
    # What is no tensor has no offset.
    places = {(i.fqn, tuple(vars(i).get("offset") or ())): place for i, place in metadata.storage_data.items()}
    # The planner data maps flattened names to the keys of the nested dicts.
    keys = {tuple((metadata.planner_data or {}).get(key, (key,))): key for key in stored}
    tensors = {}
    for path_of_keys, name in model_keys(dict.fromkeys(keys, True)).items():
        key, pieces = keys[path_of_keys], []
        for chunk in stored[key].chunks:
            where = places[key, tuple(chunk.offsets)]
            if getattr(where, "transform_descriptors", None):
                raise ValueError(f"{path}: {name} was transformed when it was written")
            file = file_inside(path, where.relative_path)
            alone = _saved_alone(file, where.offset, where.length)
            (piece,) = alone.pieces
            if alone.shape != tuple(chunk.sizes) or alone.dtype != stored[key].properties.dtype:
                raise ValueError(f"{path}: a part of {name} is {alone.dtype} {list(alone.shape)}, not as it should be")
            pieces.append(replace(piece, offsets=tuple(chunk.offsets)))
        tensors[name] = tensor = StoredTensor(tuple(stored[key].size), stored[key].properties.dtype, tuple(pieces))
        if not tensor.is_whole:
            raise ValueError(f"{path}: the parts of {name} do not make up its shape {list(tensor.shape)}")
    # Lightning saves the rest of its checkpoint in this file beside the shards.
    beside = read_entries(path / "meta.pt") if (path / "meta.pt").exists() else {}
    if (path / "merge.json").exists():
        beside = {**beside, PROVENANCE_KEY: json.loads((path / "merge.json").read_text())}
    return StoredCheckpoint(path, tensors, noted_step(beside), beside)


def _saved_alone(file: Path, offset: int, length: int) -> StoredTensor:
    """Returns the tensor that ``torch.save`` wrote into a part of a file."""
    with file.open("rb") as stream:
        found = read_torch_file(file, cast(BinaryIO, io.BufferedReader(_Part(stream, offset, length))), offset)
    if not isinstance(found, StoredTensor):
        raise ValueError(f"{file} holds something else than a tensor at byte {offset}")  # noqa: TRY004 (no argument)
    return found


class _Part(io.RawIOBase):
    """A part of a file, readable as a file of its own."""

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
