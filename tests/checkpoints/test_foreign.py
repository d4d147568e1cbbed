"""What someone else may have written is read without running anything, and stays in its folder."""

import json
import os
import pathlib
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from merge_callback.checkpoints.distributed import _KNOWN, _METADATA_NAMES, _MetadataUnpickler
from merge_callback.checkpoints.inert import inert_names
from merge_callback.checkpoints.merge import merge_checkpoints
from merge_callback.checkpoints.read import open_checkpoint
from merge_callback.checkpoints.torch_file import read_torch_file
from merge_callback.checkpoints.write import read_provenance

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


def torch_file(path, pickled, **entries):
    """A file as of ``torch.save``, with any pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        for name, content in entries.items():
            archive.writestr(f"a/{name}", content)


def saved(path):
    """Saves four numbers as a tensor called w. Returns the pickle and the bytes of the numbers in that file."""
    torch.save({"w": torch.arange(4.0)}, path)
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
        (data,) = (archive.read(name) for name in archive.namelist() if name.endswith("data/0"))
    return pickled, data


class Planted:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def pickles_that_run_something(marker):
    touch = f"touch '{marker}'"
    yield call("os", "system", touch)
    yield call("posix", "system", touch)
    yield call("builtins", "eval", f"open({str(marker)!r}, 'w')")
    yield call("torch.serialization", "os.system", touch)
    yield call("torch._utils", "_rebuild_tensor_v2.__globals__", touch)
    yield call("torch", "load", str(marker))
    yield pickle.dumps({"state_dict": {"w": Planted(os.system, touch)}, "hyper_parameters": Planted(os.system, touch)})
    yield pickle.dumps({"state_dict": {}, "x": Planted(eval, f"open({str(marker)!r}, 'w')")}, protocol=2)
    # By way of what a pickle may use.
    yield pickle.dumps(Planted(pathlib.Path(marker).touch))
    state = {"state_dict": Planted(getattr, torch._utils._rebuild_parameter, "__globals__")}
    yield pickle.dumps(state)


def test_no_file_of_tensors_makes_anything_run(tmp_path):
    marker, path = tmp_path / "was run", tmp_path / "step=1.ckpt"
    for pickled in pickles_that_run_something(marker):
        torch_file(path, pickled)
        for attempt in (
            lambda: merge_checkpoints([path], tmp_path / "out.ckpt"),
            lambda: read_provenance(path),
        ):
            with pytest.raises(ValueError, match=r"step=1\.ckpt"):
                attempt()
        read_torch_file(path)
        assert not marker.exists()
        assert not (tmp_path / "out.ckpt").exists()


def test_a_pickle_cannot_change_what_it_may_call(tmp_path):
    path = tmp_path / "step=1.ckpt"
    # The function, and then a state for it, as for an object that was created.
    changed = b"\x80\x04" + named("torch._utils") + named("_rebuild_parameter") + b"\x93}" + named("_call") + b"Nsb."
    torch_file(path, changed)
    with pytest.raises(pickle.UnpicklingError, match="it changes a function"):
        read_torch_file(path)
    with pytest.raises(ValueError, match="it changes a function"):
        open_checkpoint(path)


def test_a_tensor_cannot_lie_outside_of_its_storage(tmp_path):
    path = tmp_path / "step=1.ckpt"
    pickled, data = saved(path)
    entries = {"data/0": data, "byteorder": "little"}
    torch_file(path, pickled, **entries)
    assert open_checkpoint(path).tensors["w"][:].tolist() == [0, 1, 2, 3]
    # Its shape is (4,), and its stride (1,).
    shape, stride = b"K\x04\x85", b"K\x01\x85"
    for better, worse in ((shape, b"K\x05\x85"), (stride, b"K\x02\x85"), (shape, b"J\xff\xff\xff\xff\x85")):
        assert pickled.count(better) == 1
        torch_file(path, pickled.replace(better, worse), **entries)
        with pytest.raises(ValueError, match="does not lie in its storage of 16 bytes"):
            open_checkpoint(path)
    for more, message in (({"byteorder": "big"}, "another order of bytes"), ({"constants.pkl": b""}, "TorchScript")):
        torch_file(path, pickled, **(entries | more))
        with pytest.raises(ValueError, match=message):
            open_checkpoint(path)


def test_a_content_that_refers_to_itself_very_often_is_read_at_once(tmp_path):
    nested: list = []
    for _ in range(60):
        nested = [nested, nested]
    content = {"state_dict": {"w": torch.ones(1)}, "global_step": 1, "hyper_parameters": {"x": nested}}
    torch.save(content, tmp_path / "1.ckpt")
    assert inert_names(read_torch_file(tmp_path / "1.ckpt")) == set()
    merge_checkpoints([tmp_path / "1.ckpt"], tmp_path / "out.ckpt")
    for _ in range(60):
        content = {"one": content, "other": content}
    torch.save(content, tmp_path / "2.ckpt")
    with pytest.raises(ValueError, match=r"the same dictionaries are in very many places"):
        open_checkpoint(tmp_path / "2.ckpt")
    (tmp_path / "3.ckpt").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "3.ckpt", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ValueError, match=r"is a zip file, but none of torch.save"):
        open_checkpoint(tmp_path / "3.ckpt")


def test_what_metadata_may_name_cannot_be_changed_by_it(tmp_path):
    folder = tmp_path / "step=1"
    folder.mkdir()
    # The class, and then a state for it: (None, {"name": "evil.txt"}) sets an attribute.
    for module, name in (("pathlib", "PosixPath"), ("torch.serialization", "_get_layout"),
                         ("torch.distributed.checkpoint.metadata", "MetadataIndex")):  # fmt: skip
        changed = b"\x80\x04" + named(module) + named(name) + b"\x93(N}" + named("name") + named("evil.txt") + b"stb."
        (folder / ".metadata").write_bytes(changed)
        with pytest.raises(ValueError, match="step=1"):
            open_checkpoint(folder)
    assert pathlib.Path("a/model.ckpt").name == "model.ckpt"
    assert not hasattr(torch.serialization._get_layout, "name")
    assert not hasattr(metadata.MetadataIndex, "name")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("wrong", ["dtype", "a gap", "an overlap"])
def test_parts_of_a_folder_that_do_not_make_up_their_tensor_are_refused(tmp_path, wrong):
    folder = tmp_path / "step=1"
    dcp.save({"weight": torch.ones(4, 2)}, checkpoint_id=folder, no_dist=True)
    found = pickle.loads((folder / ".metadata").read_bytes())
    entry = found.state_dict_metadata["weight"]
    if wrong == "dtype":
        entry.properties.dtype = torch.float16
    elif wrong == "a gap":
        entry.size = torch.Size([6, 2])
    else:
        entry.chunks.append(entry.chunks[0])
        entry.size = torch.Size([8, 2])
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(ValueError, match=r"not as it should be|do not make up its shape"):
        open_checkpoint(folder)


def test_a_small_file_takes_little_memory_and_time(tmp_path):
    # As large as a test can bear without the check: a key whose hash takes a second, and a hundred MiB of places. Both
    # grow without limit. Pickled by hand, since the hash would take as long here.
    key = b")" + b"".join(b"q" + bytes([place]) + b"h" + bytes([place]) + b"\x86" for place in range(25))
    hostile = {
        "hash": b"\x80\x02}" + key + b"K\x01s.",
        "memo": b"\x80\x02}r" + struct.pack("<I", 10**7) + b".",
        "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.",
    }
    for name, pickled in hostile.items():
        torch_file(tmp_path / f"{name}_1.ckpt", pickled)
        with pytest.raises(ValueError, match=f"{name}_1.ckpt is no checkpoint that can be read"):
            open_checkpoint(tmp_path / f"{name}_1.ckpt")
    listed: list = []
    for _ in range(60):
        listed = [listed, listed]
    content = {"state_dict": {"w": torch.ones(1)}, "merge_callback": {"rule": "sma", "steps": listed}}
    torch.save(content, tmp_path / "steps_1.ckpt")
    with pytest.raises(ValueError, match="holds a merge by the rule sma, not the weights of one step"):
        merge_checkpoints([tmp_path / "steps_1.ckpt"], tmp_path / "out.ckpt")


def test_a_pickle_cannot_change_a_tensor_that_it_has_made(tmp_path):
    path = tmp_path / "step=1.ckpt"
    pickled, data = saved(path)
    # After the call that makes the tensor, a state for it.
    place = pickled.rindex(b"R")
    changed = pickled[: place + 1] + b"}X\x05\x00\x00\x00shapeK\x64sb" + pickled[place + 1 :]
    torch_file(path, changed, **{"data/0": data})
    with pytest.raises(ValueError, match="it changes a tensor"):
        open_checkpoint(path)


def test_paths_in_metadata_that_python_3_13_wrote_are_read():
    # The names and arguments of calls, as pickles have them.
    assert _MetadataUnpickler(b"cpathlib._local\nPosixPath\n(Va\nVb\ntR.", _KNOWN).load() == "a/b"
    with pytest.raises(pickle.UnpicklingError, match=r"asks for pathlib._local.Path, which is no part"):
        _MetadataUnpickler(b"cpathlib._local\nPath\n.", _KNOWN).load()
