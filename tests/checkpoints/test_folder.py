"""Merges written as folders of torch.distributed.checkpoint: by one process, by several, and what goes wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from merge_callback.checkpoints.folder import shares
from merge_callback.checkpoints.merge import merge_checkpoints
from merge_callback.checkpoints.read import open_checkpoint
from merge_callback.checkpoints.write import read_provenance
from merge_callback.utilities.revision import git_revision
from tests.helpers.ranks import Ranks
from tests.helpers.toys import same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def weights(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "a.weight": torch.randn(40, 7, generator=generator),
        "b.weight": torch.randn(5, 3, generator=generator).bfloat16(),
        "c.weight": torch.randn(64, generator=generator, dtype=torch.complex64),
        "norm.running_mean": torch.full((4,), float(step)),
        "count": torch.tensor(3),
        "empty": torch.zeros(0),
    }


@pytest.fixture
def paths(tmp_path):
    found = [tmp_path / f"step={step}.ckpt" for step in (10, 20, 30)]
    for path, step in zip(found, (10, 20, 30), strict=True):
        torch.save({"state_dict": weights(step)}, path)
    return found


def read(folder):
    """What torch's own loader reads."""
    state = {"state_dict": {name: torch.empty_like(tensor) for name, tensor in weights(1).items()}}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state["state_dict"]


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".ckpt")


def test_a_folder_holds_the_same_merge_as_a_file_and_its_provenance(tmp_path, paths):
    merge_checkpoints(paths, tmp_path / "file.ckpt", "wma")
    origin = merge_checkpoints(paths, tmp_path / "deep" / "merged", "wma")
    expected = torch.load(tmp_path / "file.ckpt", weights_only=True)["state_dict"]
    assert same(read(tmp_path / "deep" / "merged"), expected)
    assert read_provenance(tmp_path / "deep" / "merged") == origin
    assert origin["steps"] == [10, 20, 30]
    assert left(tmp_path / "deep") == ["merged"]
    # It is known for a merge, and merges of merges are refused unless they are asked for.
    assert open_checkpoint(tmp_path / "deep" / "merged").tensors.keys() == expected.keys()
    with pytest.raises(ValueError, match="holds a merge by the rule"):
        merge_checkpoints([tmp_path / "deep" / "merged", paths[0]], tmp_path / "again")


def test_nothing_is_left_of_a_folder_that_cannot_be_written(tmp_path, paths):
    bad = weights(20)
    bad["b.weight"][0] = float("nan")
    torch.save({"state_dict": bad}, paths[1])
    with pytest.raises(ValueError, match=r"b.weight holds NaN or inf in .*step=20.ckpt"):
        merge_checkpoints(paths, tmp_path / "merged")
    assert left(tmp_path) == []


def test_an_attempt_that_was_killed_is_no_hindrance_and_a_folder_is_never_replaced(tmp_path, paths):
    (tmp_path / ".merged.unfinished").mkdir()
    (tmp_path / ".merged.unfinished" / "__7_0.distcp").write_text("of a larger run")
    merge_checkpoints(paths, tmp_path / "merged")
    assert left(tmp_path) == ["merged"]
    assert not list(tmp_path.rglob("__7_0.distcp"))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()}
    with pytest.raises(ValueError, match="is a folder already"):
        merge_checkpoints(paths, tmp_path / "merged")
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()}


def test_shares_are_even_in_bytes_and_complete():
    sizes = {f"tensor {number}": 1 + number * 37 % 101 for number in range(60)}
    parts = shares(sizes, 7)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    filled = [sum(sizes[name] for name in part) for part in parts]
    assert max(filled) - min(filled) <= max(sizes.values())
    assert max(filled) < 1.1 * sum(sizes.values()) / 7
    assert shares({"one": 8}, 3) == [["one"], [], []]


def merge(paths, output):
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    try:
        return merge_checkpoints(paths, output, "wma")["steps"]
    except (ValueError, OSError) as error:
        return str(error)


@pytest.mark.slow
def test_two_ranks_write_their_shares_of_one_folder_and_both_know_of_an_error(tmp_path, paths):
    merge_checkpoints(paths, tmp_path / "file.ckpt", "wma")
    ranks = Ranks(2)
    assert ranks.run(merge, paths, tmp_path / "merged") == [[10, 20, 30]] * 2
    assert same(read(tmp_path / "merged"), torch.load(tmp_path / "file.ckpt", weights_only=True)["state_dict"])
    files = {path.name: path.stat().st_size for path in (tmp_path / "merged").glob("*.distcp")}
    assert files.keys() == {"__0_0.distcp", "__1_0.distcp"}
    said = ranks.run(merge, paths, tmp_path / "other.safetensors")
    assert said == ["2 ranks write a folder, whose name has no suffix, got 'other.safetensors'"] * 2
    bad = weights(20)
    bad["b.weight"][0] = float("nan")
    torch.save({"state_dict": bad}, paths[1])
    for told in ranks.run(merge, paths, tmp_path / "bad"):
        assert "b.weight holds NaN or inf" in told
    ranks.stop()
    assert left(tmp_path) == ["merged"]


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_told_on_all_ranks(tmp_path, paths):
    (tmp_path / "file").write_text("in the way")
    ranks = Ranks(2)
    for told in ranks.run(merge, paths, tmp_path / "file" / "merged"):
        assert "Not a directory" in told
    ranks.stop()


@pytest.mark.slow
def test_the_command_runs_under_torchrun(tmp_path, paths):
    arguments = ["checkpoints=step=*.ckpt", "output=merged", "rule=wma"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node=2"]
    command = [str(Path(sys.executable).parent / "merge-callback"), "merge"]
    quoted = [f"{key}='{value}'" for key, value in (each.split("=", 1) for each in arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(
        [*launch, *command, *quoted], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    merge_checkpoints(paths, tmp_path / "file.ckpt", "wma")
    assert same(read(tmp_path / "merged"), torch.load(tmp_path / "file.ckpt", weights_only=True)["state_dict"])
    # One table, by the first process.
    assert done.stdout.count("step=30.ckpt") == 1


def test_the_revision_is_that_of_the_working_directory(tmp_path, monkeypatch, paths):
    def git(*words):
        named = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *named, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision() is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert git_revision() == commit
    origin = merge_checkpoints(paths, tmp_path / "merged.ckpt")
    assert origin["git_revision"] == commit
    Path("file").write_text("2")
    assert git_revision() == f"{commit}-dirty"
