"""Every block of code in the docs and in the README runs, one after the other, as a reader would run them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import run_program
from tests.helpers.toys import Toy, batches, make

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r'^```(\S+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
# What `.ci/run` runs by itself.
BY_CI = {"make demo\n"}


def blocks(page):
    """Language, name of the file it stands for, and code."""
    for language, title, code in FENCE.findall(page.read_text()):
        yield language, title, SNIPPET.sub(lambda found: (DOCS / "examples" / found[1]).read_text(), code)


def run_blocks(page, folder, names):
    shutil.copytree(DOCS / "examples", folder, dirs_exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Programs of a reader's are not measured.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    environment |= {"PATH": path, "OMP_NUM_THREADS": "1"}
    for language, title, code in blocks(page):
        # Of a command's output not every digit is the same everywhere.
        if language == "text" or code in BY_CI:
            continue
        if title:
            (folder / title).parent.mkdir(parents=True, exist_ok=True)
            (folder / title).write_text(code)
        elif language == "python":
            exec(compile(code, f"{page.name}: {code.splitlines()[0]}", "exec"), names)
        else:
            assert language == "bash", f"a block of {language} in {page.name} needs a title, so that something uses it"
            commands = [shlex.split(line) for line in code.replace("\\\n", "").splitlines()]
            if all(command[0] in ("merge-callback", "python") for command in commands):
                # Without importing all that they need again.
                for command, *arguments in commands:
                    words = arguments if command == "python" else [command, *arguments]
                    done = run_program(*words, cwd=folder, environment=environment)
                    assert done.returncode == 0, f"{page.name}: {words}\n{done.stdout}{done.stderr}"
                continue
            shell = ["bash", "-euo", "pipefail", "-c", code]
            ended = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, f"{page.name}: {code}\n{ended.stdout}{ended.stderr}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    run_blocks(DOCS / page, tmp_path, {})


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_every_block_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"model": make(Toy), "train_loader": batches(160), "val_loader": batches(24, shuffle=False)}
    run_blocks(ROOT / "README.md", tmp_path, names)
    assert names["branch"].span == 0.1
    assert (tmp_path / "merged.ckpt").exists()


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "window" / "index.html").exists()


def test_every_titled_block_is_used_and_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert page in navigation
        text = (DOCS / page).read_text()
        codes = {title or place: code for place, (_, title, code) in enumerate(blocks(DOCS / page))}
        for title in filter(None, (title for _, title, _ in blocks(DOCS / page))):
            assert any(Path(title).stem in code for other, code in codes.items() if other != title), (page, title)
        assert "```\n" in text or "```" not in text


def test_every_choice_and_every_logged_name_is_documented():
    hydra_page, logged_page = ((DOCS / name).read_text() for name in ("hydra_cli.md", "logged.md"))
    choices = (ROOT / "src" / "merge_callback" / "apps" / "conf" / "callbacks" / "merge").glob("*.yaml")
    for choice in choices:
        assert f"`{choice.stem}`" in hydra_page
    files = ("logged.py", "comparison.py", "merged_validation.py", "predictions.py")
    source = "".join((ROOT / "src" / "merge_callback" / "validation" / name).read_text() for name in files)
    kinds = set(re.findall(r"""(?:names\(|kind=|_names, )["']([a-z_]+)["']""", source)) - {"merge"}
    kinds |= {f"{kind}_error" for kind in kinds & {"annealed", "forecast"}}
    predicted = {"annealed", "annealed_error", "forecast", "forecast_error"}
    assert kinds == {"merged", "merge_gain", "merge_gain_stderr"} | predicted
    for kind in kinds:
        assert f"`{kind}/m`" in logged_page
    for name in ("num_snapshots", "span_steps", "spread", "seconds", "num_skipped", "is_prior", "forecast_end"):
        assert f"`merge/{name}`" in logged_page
