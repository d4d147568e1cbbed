"""A project of another's, in the layout of a common Lightning and Hydra template, beside an installed merge_callback.

It is a package of its own (`template/`), installed with `merge_callback` into an environment of its own, which
sees the libraries of this one but not its `merge_callback`.
"""

import csv
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ["src", "conf", "pyproject.toml", "README.md", "LICENSE"]


def run(*command, cwd, fails=False):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def command(request, tmp_path_factory):
    """The project's command, in an environment where `merge_callback` was installed in the way the test asks for."""
    way, folder = request.param, tmp_path_factory.mktemp(request.param)
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"symlinks": True, "ignore": shutil.ignore_patterns("*.egg-info")} if copy is shutil.copytree else {}
        if (ROOT / name).is_symlink():
            (sources / name).symlink_to((ROOT / name).readlink())
        else:
            copy(ROOT / name, sources / name, **options)
    shutil.copytree(ROOT / "tests" / "promises" / "template", folder / "project")
    venv.create(folder / "venv", with_pip=False)
    bin_folder = folder / "venv" / "bin"
    (site,) = (folder / "venv" / "lib").glob("*/site-packages")
    # Folders named in a file of this kind are searched, but the files of this kind in them are not read; so the
    # editable install that this test runs in is not seen.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [bin_folder / "python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    install += ["--no-build-isolation", "--disable-pip-version-check"]
    if way == "editable":
        run(*install, "--editable", sources, cwd=folder)
    else:
        run(sys.executable, "-m", "build", "--no-isolation", f"--{way}", "--outdir", "dist", sources, cwd=folder)
        run(*install, *(folder / "dist").iterdir(), cwd=folder)
    run(*install, folder / "project", cwd=folder)
    where = run(bin_folder / "python", "-c", "import merge_callback; print(merge_callback.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(sources if way == "editable" else site)
    return bin_folder / "train_command"


@pytest.fixture
def train(command, tmp_path):
    """Calls the command from a folder that has neither sources nor configs."""

    def call(*overrides, fails=False):
        return run(command, *overrides, cwd=tmp_path, fails=fails)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("command", ["wheel", "sdist", "editable"], indirect=True)
def test_another_project_chooses_its_merge_by_one_word(train):
    output = train("callbacks/merge=decay_1sqrt", "callbacks.merge.num_snapshots=20")
    assert "up to 20 snapshots" in output
    assert "1-sqrt: up to" in output
    assert "merged/val/loss" in output
    assert "merge" not in train("callbacks/merge=none", "callbacks.model_checkpoint.monitor=val/loss").lower()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["wheel"], indirect=True)
def test_mistyped_groups_and_keys_are_answered_by_hydra_and_experiments_override_the_choice(train):
    choices = train("callbacks/merge=pmaa", fails=True).split("Available options in 'callbacks/merge':")[1]
    assert {"pma", "lawa", "wma", "ema", "decay_linear", "decay_1sqrt", "many", "none"} <= set(choices.split())
    assert "Key 'callbacks/merg' is not in struct" in train("callbacks/merg=pma", fails=True)
    assert "Key 'num_snapshot' is not in struct" in train("callbacks.merge.num_snapshot=3", fails=True)
    output = train("+callbacks.merge.num_snapshot=3", fails=True)
    assert "got an unexpected keyword argument 'num_snapshot'" in output
    output = train("experiment=wide_window")
    assert "every 4 steps" in output
    assert "1-sqrt: up to" in output


@pytest.mark.slow
@pytest.mark.parametrize("command", ["wheel"], indirect=True)
def test_a_sweep_over_number_and_interval_ends_in_one_table(train, tmp_path):
    overrides = ["callbacks.merge.num_snapshots=3,6", "callbacks.merge.every_n_train_steps=1,4", "trainer.max_epochs=1"]
    output = train("-m", *overrides, "hydra/callbacks=merge_comparison")
    (file,) = re.findall(r"Comparison: (.*)", output)
    with (tmp_path / file).open() as stream:
        rows = list(csv.DictReader(stream))
    keys = ("callbacks.merge.num_snapshots", "callbacks.merge.every_n_train_steps", "span")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("3", "1", "2.0"),
        ("3", "4", "8.0"),
        ("6", "1", "5.0"),
        ("6", "4", "20.0"),
    ]
    # The training is the same in all of them; the merges are not.
    assert len({row["live"] for row in rows}) == 1
    assert len({row["merged"] for row in rows}) == 4
    # A job that fails ends the sweep, and what there is is shown.
    failed = train("-m", "callbacks.merge.num_snapshots=3,0,5", "hydra/callbacks=merge_comparison", fails=True)
    assert re.search(r"^3 .* \* (live|merged)$", failed, re.M)
    assert "Comparison: " in failed
    best = min(float(row[which]) for row in rows for which in ("live", "merged"))
    (marked,) = re.findall(r"^.* \* (?:live|merged)$", output, re.M)
    assert f"{best:.4f}" in marked
