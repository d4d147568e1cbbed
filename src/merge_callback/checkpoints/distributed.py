"""Finds the pieces of each tensor in folders of `torch.distributed.checkpoint`."""

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from merge_callback.checkpoints.layouts import model_keys, noted_step
from merge_callback.checkpoints.stored import PROVENANCE_KEY, StoredCheckpoint, StoredTensor, file_inside
from merge_callback.checkpoints.torch_file import read_entries, read_torch_file

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
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"its metadata asks for {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)


def open_distributed(path: Path) -> StoredCheckpoint:
    """Opens a folder of `torch.distributed.checkpoint` and finds its tensors, without reading their values.

    Raises:
        ValueError: If the folder holds several dictionaries, or tensors that were transformed when they were written.
    """
    with (path / ".metadata").open("rb") as stream:
        metadata = _MetadataUnpickler(stream).load()
    stored = {
        key: value for key, value in metadata.state_dict_metadata.items() if isinstance(value, TensorStorageMetadata)
    }
    # The planner data maps flattened names to the keys of the nested dicts.
    keys = {tuple((metadata.planner_data or {}).get(key, (key,))): key for key in stored}
    tensors = {}
    for path_of_keys, name in model_keys(dict.fromkeys(keys, True)).items():
        key, pieces = keys[path_of_keys], []
        for chunk in stored[key].chunks:
            where = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            if getattr(where, "transform_descriptors", None):
                raise ValueError(f"{path}: {name} was transformed when it was written")
            file = file_inside(path, where.relative_path)
            alone = _saved_alone(file, where.offset, where.length)
            (piece,) = alone.pieces
            if alone.shape != tuple(chunk.sizes):
                raise ValueError(f"{path}: {name} has a part of shape {list(alone.shape)} instead of {chunk.sizes}")
            pieces.append(replace(piece, offsets=tuple(chunk.offsets)))
        properties = stored[key].properties
        tensors[name] = StoredTensor(tuple(stored[key].size), properties.dtype, tuple(pieces))
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
