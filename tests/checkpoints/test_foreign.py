"""What someone else may have written is read without running anything, and stays in its folder."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from merge_callback.checkpoints.distributed import _METADATA_NAMES
from merge_callback.checkpoints.merge import merge_checkpoints
from merge_callback.checkpoints.read import open_checkpoint

OF_TORCH = {metadata.__name__: metadata, filesystem.__name__: filesystem}


def named(text):
    """Opcodes that put a short string on the pickle's stack."""
    return b"\x8c" + struct.pack("<B", len(text.encode())) + text.encode()


def call(module, name, *arguments):
    """A pickle that calls a function: a dotted name is looked up in the module part by part."""
    values = b"".join(map(named, arguments))
    return b"\x80\x04" + named(module) + named(name) + b"\x93(" + values + b"tR."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "FileSystem.rm_file"),
        ("torch.distributed.checkpoint.filesystem", "FileSystem"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo.__init__.__globals__"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch", "os.system"),
        ("torch", "Size.__class__"),
        ("torch.serialization", "os.system"),
        ("torch.serialization", "load"),
        ("pathlib", "os.system"),
        ("pathlib", "PosixPath.unlink"),
        ("collections", "OrderedDict.fromkeys"),
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
    ],
)
def test_the_metadata_of_a_folder_can_name_nothing_that_does_anything(tmp_path, module, name):
    folder, marker = tmp_path / "step=1", tmp_path / "was run"
    folder.mkdir()
    (folder / ".metadata").write_bytes(call(module, name, f"touch '{marker}'"))
    with pytest.raises(ValueError, match=f"its metadata asks for {module}.{name}"):
        merge_checkpoints([folder], tmp_path / "out.ckpt")
    assert not marker.exists()
    assert not (tmp_path / "out.ckpt").exists()


def test_what_metadata_may_name_are_classes_and_dtypes_of_the_modules_that_hold_them():
    for module, names in _METADATA_NAMES.items():
        for name in names:
            assert "." not in name
            if module in OF_TORCH:
                assert vars(OF_TORCH[module])[name].__module__ == module
    assert callable(torch.serialization._get_layout)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("place", ["../elsewhere.distcp", "/elsewhere.distcp", "inner/../../elsewhere.distcp"])
def test_a_folder_cannot_name_files_outside_of_it(tmp_path, place):
    folder = tmp_path / "step=1"
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=folder, no_dist=True)
    found = pickle.loads((folder / ".metadata").read_bytes())
    for info in found.storage_data.values():
        info.relative_path = place
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    (folder / "__0_0.distcp").rename(tmp_path / "elsewhere.distcp")
    with pytest.raises(ValueError, match="names a file in another folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/elsewhere.safetensors"])
def test_an_index_cannot_name_files_outside_of_its_folder(tmp_path, place):
    folder = tmp_path / "model_1"
    folder.mkdir()
    save_file({"weight": torch.ones(3)}, tmp_path / "elsewhere.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": place}}))
    for path in (folder, index):
        with pytest.raises(ValueError, match="names a file in another folder"):
            open_checkpoint(path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_where_torch_does_not_tell_the_place_of_a_tensor_nothing_is_read_from_elsewhere(tmp_path, monkeypatch):
    torch.save({"weight": torch.ones(3)}, tmp_path / "step_1.pt")
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=tmp_path / "step_2", no_dist=True)
    # As torch 2.9 leaves it.
    monkeypatch.setattr(torch.UntypedStorage, "_checkpoint_offset", property(lambda self: None, lambda self, x: None))
    for name in ("step_1.pt", "step_2"):
        with pytest.raises(ValueError, match="does not tell where a tensor lies in a file; use a newer one"):
            open_checkpoint(tmp_path / name)
