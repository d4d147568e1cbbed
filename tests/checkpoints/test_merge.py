"""Checkpoints on disk merged into one: as the live callback would, whatever wrote them, or refused by name."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

from merge_callback import MergeCallback, Window
from merge_callback.apps.merge import find_checkpoints
from merge_callback.checkpoints.merge import merge_checkpoints
from merge_callback.checkpoints.read import open_checkpoint
from merge_callback.checkpoints.write import read_provenance
from tests.helpers import reference
from tests.helpers.commands import merge_callback
from tests.helpers.processes import call
from tests.helpers.toys import Toy, fit, make, same


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose checkpoints are those steps that its callback keeps as snapshots."""
    folder = tmp_path_factory.mktemp("run")
    callback = MergeCallback(4, 5, merges={rule: rule for rule in ("sma", "1-sqrt", "ema")})
    checkpoints = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=4, save_top_k=-1)
    fit(make(Toy), folder, callback, checkpoints, max_steps=24, enable_checkpointing=True)
    paths = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: open_checkpoint(path).step)
    return callback, paths[-5:]


def states(paths):
    return [torch.load(path, weights_only=True)["state_dict"] for path in paths]


def load(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("rule", ["sma", "1-sqrt", "ema"])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_the_merge_is_that_of_the_live_callback_to_the_bit(run, tmp_path, rule, suffix):
    callback, paths = run
    assert callback.snapshot_steps == [8, 12, 16, 20, 24]
    output = tmp_path / f"merged{suffix}"
    origin = merge_checkpoints(paths[::-1], output, rule)
    assert same(load(output), callback.merged_state_dict(rule))
    assert origin["steps"] == callback.snapshot_steps
    assert origin["coefficients"] == list(callback.coefficients(rule).values())
    assert read_provenance(output)["checkpoints"] == [path.name for path in paths]


def test_the_checkpoint_is_one_that_lightning_takes_and_tied_weights_stay_tied(run, tmp_path):
    _, paths = run
    merge_checkpoints(paths, tmp_path / "merged.ckpt")
    merged = torch.load(tmp_path / "merged.ckpt", weights_only=True)
    state = merged["state_dict"]
    assert state["inner.weight"].data_ptr() == state["tied.weight"].data_ptr()
    assert merged["global_step"] == 24
    again = fit(make(Toy), tmp_path, max_steps=1, ckpt_path=str(tmp_path / "merged.ckpt"))
    assert again.trainer.global_step == 1


def saved(kind, folder, step, state):
    """A checkpoint of some kind of a state dict."""
    folder.mkdir(exist_ok=True)
    if kind == "state dict":
        torch.save(state, path := folder / f"model_{step}.pt")
    elif kind == "safetensors":
        save_file(state, path := folder / f"model_{step}.safetensors")
    elif kind == "sharded safetensors":
        path = folder / f"step-{step}"
        path.mkdir()
        names = sorted(state)
        halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
        for file, keys in halves.items():
            save_file({key: state[key] for key in keys}, path / file)
        weight_map = {key: file for file, keys in halves.items() for key in keys}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        path = folder / f"step-{step}"
        dcp.save({"state_dict": state} if kind == "nested" else state, checkpoint_id=path, no_dist=True)
    return path


KINDS = ["state dict", "safetensors", "sharded safetensors", "nested", "flat"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_gives_the_merge_of_the_float64_twin(tmp_path, kind):
    generator = torch.Generator().manual_seed(0)
    made = [
        {
            "a.weight": torch.randn(7, 5, generator=generator),
            "a.scale": torch.randn((), generator=generator),
            "b": torch.randn(1100, 700, generator=generator).bfloat16(),
            "empty": torch.empty(0, 3),
            "ids": torch.arange(9),
        }
        for _ in range(3)
    ]
    paths = [saved(kind, tmp_path / "saved", step, state) for step, state in zip((5, 50, 10), made, strict=True)]
    origin = merge_checkpoints(paths, tmp_path / "merged.safetensors", "wma")
    assert origin["steps"] == [5, 10, 50]
    merged = load(tmp_path / "merged.safetensors")
    ordered = [made[0], made[2], made[1]]
    for name in ("a.weight", "a.scale", "b", "empty"):
        expected = reference.merge([{name: state[name]} for state in ordered], [1 / 6, 2 / 6, 3 / 6])[name]
        precision = {"rtol": 2**-8, "atol": 1e-3} if name == "b" else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(merged[name].double(), expected, **precision)
    assert torch.equal(merged["ids"], torch.arange(9))


def test_views_and_transposed_tensors_are_read_as_what_they_show(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    state = {"t": base.t(), "row": base[2], "column": base[:, 1], "expanded": torch.ones(1, 3).expand(4, 3)}
    torch.save(state, tmp_path / "1.pt")
    stored = open_checkpoint(tmp_path / "1.pt").tensors
    for name, tensor in state.items():
        assert torch.equal(stored[name][:], tensor.reshape(-1)), name
        assert torch.equal(stored[name][1:3], tensor.reshape(-1)[1:3]), name


def test_coefficients_are_those_of_the_checkpoints_in_the_order_given(run, tmp_path):
    _, paths = run
    origin = merge_checkpoints([paths[3], paths[0]], tmp_path / "m.ckpt", coefficients=[3, 1])
    merged, (late, early) = load(tmp_path / "m.ckpt"), states([paths[3], paths[0]])
    expected = 0.75 * late["out.weight"].double() + 0.25 * early["out.weight"].double()
    torch.testing.assert_close(merged["out.weight"].double(), expected, rtol=1e-6, atol=1e-7)
    # Statistics are those of the last one given.
    assert torch.equal(merged["norm.running_mean"], early["norm.running_mean"])
    steps = sorted(torch.load(path, weights_only=True)["global_step"] for path in (paths[0], paths[3]))
    assert (origin["steps"], origin["coefficients"]) == (steps, [0.25, 0.75])
    assert origin["checkpoints"] == [paths[0].name, paths[3].name]


def test_an_output_that_is_one_of_the_checkpoints_is_refused(run, tmp_path):
    _, paths = run
    (tmp_path / "link.ckpt").symlink_to(paths[0])
    before = paths[0].read_bytes()
    for output in (paths[0], tmp_path / "link.ckpt"):
        with pytest.raises(ValueError, match="output must not be one of the checkpoints, got "):
            merge_checkpoints(paths, output)
    assert paths[0].read_bytes() == before


def test_a_window_leaves_older_checkpoints_out(run, tmp_path):
    _, paths = run
    origin = merge_checkpoints(paths, tmp_path / "m.ckpt", Window(span_steps=8))
    assert origin["coefficients"] == [0, 0, 0, 0.5, 0.5]


@pytest.fixture
def pair(tmp_path):
    """Saves two state dicts as ``1.pt`` and ``2.pt``, and merges them."""

    def merge(first, second, **options):
        for number, state in enumerate((first, second), start=1):
            torch.save(state, tmp_path / f"{number}.pt")
        return merge_checkpoints([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "m.ckpt", **options)

    return merge


GOOD = {"w": torch.ones(3), "n": torch.tensor([1, 2])}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"w": torch.ones(4), "n": GOOD["n"]}, r"w is torch.float32 \[3\] in .*1.pt but torch.float32 \[4\] in .*2.pt"),
        ({"w": torch.ones(3).half(), "n": GOOD["n"]}, r"w is torch.float32 \[3\] in .* but torch.float16 \[3\] in"),
        ({"n": GOOD["n"]}, r"2.pt has no tensor w, which .*1.pt has"),
        ({**GOOD, "more": torch.ones(1)}, r"1.pt has no tensor more, which .*2.pt has"),
        ({"w": torch.tensor([1.0, float("nan"), 1]), "n": GOOD["n"]}, r"w holds NaN or inf in .*2.pt"),
        ({"w": torch.ones(3), "n": torch.tensor([1, 3])}, r"n is torch.int64, which is not averaged, and differs"),
        ({"state_dict": {**GOOD, "s": "text"}}, r"2.pt: s is no tensor"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_by_name_and_nothing_is_written(pair, tmp_path, second, message):
    with pytest.raises(ValueError, match=message):
        pair(GOOD, second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.pt", "2.pt"]


def test_what_differs_and_is_no_float_can_be_taken_from_the_newest(pair, tmp_path):
    pair(GOOD, {"w": 3 * torch.ones(3), "n": torch.tensor([7, 8])}, newest=["n"])
    merged = load(tmp_path / "m.ckpt")
    assert merged["n"].tolist() == [7, 8]
    assert merged["w"].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paths": []}, "there are no checkpoints to merge"),
        ({"output": "m.bin"}, r"saved as .ckpt or .safetensors, got 'm.bin'"),
        ({"coefficients": [1.0]}, "coefficients must be as many as checkpoints, 2, got 1"),
        ({"steps": [1, 2, 3]}, "steps must be as many as checkpoints, 2, got 3"),
        ({"steps": [4, 4]}, "checkpoints must be of different steps, got 4 of .*1.pt and .*2.pt"),
        ({"rule": "smaa"}, "did you mean 'sma'"),
    ],
)
def test_wrong_arguments_are_named(pair, tmp_path, arguments, message):
    pair(GOOD, GOOD)
    paths = [tmp_path / "1.pt", tmp_path / "2.pt"]
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(**({"paths": paths, "output": tmp_path / "m.ckpt"} | arguments))


def test_files_that_are_cut_short_packed_again_old_or_hostile_are_refused(tmp_path):
    torch.save(GOOD, tmp_path / "1.pt")
    whole = (tmp_path / "1.pt").read_bytes()
    (tmp_path / "short_1.pt").write_bytes(whole[: len(whole) // 2])
    torch.save(GOOD, tmp_path / "old_1.pt", _use_new_zipfile_serialization=False)
    for name, method in (("again", zipfile.ZIP_STORED), ("packed", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / "1.pt") as old, zipfile.ZipFile(tmp_path / f"{name}_1.pt", "w", method) as new:
            for entry in old.namelist():
                new.writestr(entry, old.read(entry))
    # Tensors are found wherever they lie.
    assert torch.equal(open_checkpoint(tmp_path / "again_1.pt").tensors["w"][:], GOOD["w"])
    torch.save({"w": Toy}, tmp_path / "hostile_1.pt")
    (tmp_path / "empty_1.pt").touch()
    for name, message in (
        ("short", "was cut short"),
        ("old", "is no file of torch.save, or one in its old format; load it and save it again"),
        ("packed", "the values of storage 0 are not there, or compressed"),
        ("hostile", "holds no tensors of a model"),
        ("empty", "is empty"),
        ("missing", "there is no checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path / f"{name}_1.pt")


def test_an_unknown_step_is_asked_for(tmp_path):
    for name in ("one.pt", "two.pt"):
        torch.save(GOOD, tmp_path / name)
    paths = [tmp_path / "one.pt", tmp_path / "two.pt"]
    with pytest.raises(ValueError, match=r"neither .*one.pt nor its name tells a step; give steps="):
        merge_checkpoints(paths, tmp_path / "m.ckpt")
    assert merge_checkpoints(paths, tmp_path / "m.ckpt", steps=[7, 3])["steps"] == [3, 7]


@pytest.mark.slow
def test_the_command_merges_a_pattern_of_files_and_says_what_counts(run, tmp_path, monkeypatch):
    _, paths = run
    monkeypatch.chdir(tmp_path)
    arguments = [f"checkpoints='{paths[0].parent}/step=*.ckpt'", "output=m.safetensors", "steps=null"]
    done = merge_callback("merge", *arguments)
    assert done.returncode == 0, done.stderr
    assert "  0.166667  step 4  step=4.ckpt" in done.stdout
    assert (tmp_path / "m.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    done = merge_callback("merge", arguments[0], "output=m.ckpt", "rule=smaa")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("merge-callback merge: unknown merge rule 'smaa'")


def two(folder, first, second):
    """Two checkpoints of different steps."""
    torch.save(first, folder / "m_1.ckpt")
    torch.save(second, folder / "m_2.ckpt")
    return [folder / "m_1.ckpt", folder / "m_2.ckpt"]


def test_one_pattern_and_one_path_are_taken_as_such(tmp_path):
    paths = two(tmp_path, {"w": torch.zeros(2), "x": torch.zeros(2)}, {"w": torch.ones(2), "x": torch.ones(2)})
    merge_checkpoints(paths, tmp_path / "m.ckpt", newest="*x")
    merged = load(tmp_path / "m.ckpt")
    assert merged["w"].tolist() == [0.5, 0.5]
    assert merged["x"].tolist() == [1, 1]
    merge_checkpoints(str(paths[1]), tmp_path / "one.ckpt")
    assert load(tmp_path / "one.ckpt")["w"].tolist() == [1, 1]


def test_a_path_that_is_there_is_no_pattern(tmp_path):
    for name in ("run[1].ckpt", "run1.ckpt"):
        (tmp_path / name).touch()
    assert find_checkpoints([str(tmp_path / "run[1].ckpt")]) == [str(tmp_path / "run[1].ckpt")]
    assert find_checkpoints(str(tmp_path / "run?.ckpt")) == [str(tmp_path / "run1.ckpt")]


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_tied_tensor_of_which_one_name_is_taken_from_the_newest_is_two(tmp_path, suffix):
    def tied(value):
        w = torch.full((3,), value)
        return {"emb": w, "head": w}

    merge_checkpoints(two(tmp_path, tied(0.0), tied(1.0)), tmp_path / f"m{suffix}", newest=["head"])
    merged = load(tmp_path / f"m{suffix}")
    assert (merged["emb"].tolist(), merged["head"].tolist()) == ([0.5] * 3, [1.0] * 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": ["20", "100"]}, "steps must be an int, got '20'"),
        ({"steps": [1, -1]}, "steps must be >= 0, got -1"),
        (
            {"coefficients": [1, float("nan")]},
            r"coefficients must be finite numbers whose sum is not zero, got \[1, nan\]",
        ),
        ({"coefficients": [1, -1]}, r"coefficients must be finite numbers whose sum is not zero, got \[1, -1\]"),
        ({"newest": 3}, "newest must be a pattern of names or a list of them, got 3"),
    ],
)
def test_arguments_are_refused_by_name(tmp_path, arguments, message):
    paths = two(tmp_path, GOOD, GOOD)
    with pytest.raises((ValueError, TypeError), match=message):
        merge_checkpoints(paths, tmp_path / "m.ckpt", **arguments)


def test_the_same_file_twice_and_a_folder_as_output_are_refused(tmp_path):
    one, other = two(tmp_path, GOOD, GOOD)
    with pytest.raises(ValueError, match="checkpoints must be different ones, got"):
        merge_checkpoints([one, tmp_path / "." / "m_1.ckpt", other], tmp_path / "m.ckpt", steps=[1, 2, 3])
    (tmp_path / "folder.ckpt").mkdir()
    with pytest.raises(ValueError, match=r"output must be a file or a new folder, but .* is a folder already"):
        merge_checkpoints([one, other], tmp_path / "folder.ckpt")


@pytest.mark.parametrize(
    ("tensor", "suffix", "message"),
    [
        (torch.view_as_complex(torch.randn(4, 2)).conj(), ".ckpt", "lazily conjugated or negated view"),
        (torch.view_as_complex(torch.randn(4, 2)).conj().imag, ".ckpt", "lazily conjugated or negated view"),
        (
            torch.zeros(4, dtype=torch.float8_e4m3fn),
            ".ckpt",
            r"is torch.float8_e4m3fn, which is not summed; newest=\[w\]",
        ),
        (
            torch.zeros(4, dtype=torch.complex64),
            ".safetensors",
            "is torch.complex64, which is not written to .safetensors",
        ),
    ],
)
def test_tensors_that_cannot_be_merged_are_refused_by_name(tmp_path, tensor, suffix, message):
    paths = two(tmp_path, {"w": tensor}, {"w": tensor})
    with pytest.raises(ValueError, match=message):
        merge_checkpoints(paths, tmp_path / f"m{suffix}")
    assert not (tmp_path / f"m{suffix}").exists()


def test_a_header_that_contradicts_itself_is_refused_with_its_path(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}
    header["b"] = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
    content = json.dumps(header).encode()
    (tmp_path / "m_1.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + bytes(8))
    (tmp_path / "m_2.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    (tmp_path / "m_3.safetensors").write_bytes((2).to_bytes(8, "little") + b"{x")
    for number, message in (
        (1, "a takes 4 bytes, which do not fit its shape"),
        (2, "read in parts"),
        (3, "read in parts"),
    ):
        with pytest.raises(ValueError, match=rf"m_{number}.safetensors.*{message}"):
            open_checkpoint(tmp_path / f"m_{number}.safetensors")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_of_model_and_optimizer_and_names_that_are_none_are_refused(tmp_path):
    both = {"generator": {"w": torch.ones(2)}, "discriminator": {"w": torch.ones(2)}}
    dcp.save(both, checkpoint_id=tmp_path / "both_1", no_dist=True)
    with pytest.raises(ValueError, match=r"several dictionaries \(discriminator, generator\); save that of the model"):
        open_checkpoint(tmp_path / "both_1")
    torch.save({0: torch.ones(2)}, tmp_path / "numbers_1.pt")
    with pytest.raises(ValueError, match="names of tensors must be strings, got 0"):
        open_checkpoint(tmp_path / "numbers_1.pt")


def memory(kind):
    # Not `getrusage`, whose peak begins with that of the parent.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)]
    return int(line.split()[1])


def peaks(folder, num_checkpoints, outputs):
    """MiB beyond what the process had before, for each output."""
    before, found = memory("VmRSS"), []
    for output in outputs:
        Path("/proc/self/clear_refs").write_text("5")
        merge_checkpoints(sorted(folder.glob("step-*.ckpt"))[:num_checkpoints], folder / output)
        found.append((memory("VmHWM") - before) // 1024)
    # A folder is never replaced.
    shutil.rmtree(folder / "m")
    return found


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_checkpoints(tmp_path):
    # Sixteen tensors of 8 MiB.
    for step in range(6):
        torch.save({"state_dict": {str(n): torch.randn(2**21) for n in range(16)}}, tmp_path / f"step-{step}.ckpt")

    # A tensor and some chunks of it; of a .ckpt, the result once.
    most = {"m.safetensors": 64, "m": 64, "m.ckpt": 200}

    for output, few, many in zip(most, *(call(peaks, tmp_path, num, list(most)) for num in (2, 6)), strict=True):
        assert many < most[output], output
        # What the allocator keeps differs by some MiB; four more checkpoints in memory would be 512.
        assert many - few < 64, output


@pytest.mark.slow
def test_the_command_tells_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = merge_callback("merge")
    assert missing.returncode == 2
    assert "checkpoints and output must be given" in missing.stderr
    assert "Traceback" not in missing.stderr
    described = merge_callback("merge", "--help").stdout
    for key in ("checkpoints", "output", "rule", "coefficients", "steps", "newest"):
        assert f"\n  {key} " in described
    (asked,) = re.findall(r"'(rule=\{.*\})'", described)
    for step in (1000, 2000, 2500):
        torch.save({"w": torch.full((3,), float(step))}, tmp_path / f"step={step}.pt")
    assert merge_callback("merge", "checkpoints=*.pt", "output=m.safetensors", asked).returncode == 0
    assert load_file(tmp_path / "m.safetensors")["w"].tolist() == [2250.0] * 3
