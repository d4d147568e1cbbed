"""The package is nine folders: imports point one way, Lightning stays where it belongs, and no file is long."""

import ast
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "merge_callback"
# A folder imports from those before it, and inside itself without circles.
FOLDERS = (
    "utilities",
    "merging",
    "prediction",
    "live",
    "checkpoints",
    "capture",
    "validation",
    "callbacks",
    "apps",
)
# Where a Trainer or a LightningModule is known; messages go through Lightning's rank-zero functions.
USES_LIGHTNING = ("live/", "checkpoints/write.py", "validation/", "callbacks/", "apps/", "utilities/messages.py")
# Where private names of Lightning's loops, results, connectors and loaders are used.
USES_PRIVATE_LOOPS = ("live/evaluate.py", "live/observe.py", "live/preserve.py")
# Private names elsewhere: those of `nn.Module` and the count of a tensor's writes, of which torch documents no others,
# and two of single objects.
OTHER_PRIVATE = re.compile(
    r"_buffers|_modules|_parameters|_non_persistent_buffers_set|_foreach_\w+|_checkpoint_offset|_hparams_name"
    r"|_save_topk_checkpoint|_save_last_checkpoint|_version"
)
MAX_LINES = 300


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def private_attributes(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not is_own:
                yield node.attr


def problems(package):
    """What is not as it should be, a line each; none if all is well."""
    found = []
    inside: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        place = file.relative_to(package).as_posix()
        folder = place.partition("/")[0]
        text = file.read_text()
        tree = ast.parse(text)
        if folder == place:
            found += [f"{place} lies loose"] if place != "__init__.py" else []
            continue
        for name in imported(tree):
            top, *path = name.split(".")
            if top == "merge_callback" and path:
                if path[0] == folder:
                    inside.setdefault(place, set()).add(f"{'/'.join(path)}.py")
                elif FOLDERS.index(path[0]) > FOLDERS.index(folder):
                    found.append(f"{place} imports {name}, which lies below it")
            is_lightning = top in ("lightning", "pytorch_lightning")
            if is_lightning and not place.startswith(USES_LIGHTNING):
                found.append(f"{place} imports {name}")
        if not place.startswith(USES_PRIVATE_LOOPS):
            found += [f"{place} uses {a}" for a in private_attributes(tree) if not OTHER_PRIVATE.fullmatch(a)]
        if (num_lines := len(text.splitlines())) > MAX_LINES:
            found.append(f"{place} has {num_lines} lines, more than {MAX_LINES}")
    found += [f"{place} is part of a circle of imports" for place in inside if place in reached(place, inside)]
    folders = {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    return found + [f"{name} is a folder too many or missing" for name in folders ^ set(FOLDERS)]


def reached(start, edges):
    """All that is imported from a file, directly or by what it imports."""
    seen, waiting = set(), [start]
    while waiting:
        for target in edges.get(waiting.pop(), ()):
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen


def test_imports_only_point_up_the_house_and_no_file_is_long():
    assert problems(PACKAGE) == []


@pytest.mark.parametrize(
    ("place", "line", "problem"),
    [
        ("merging/rules.py", "from merge_callback.live.weights import size_bytes", "which lies below it"),
        ("live/names.py", "from merge_callback.live.weights import size_bytes", "circle"),
        ("capture/ring.py", "from lightning.pytorch import Trainer", "capture/ring.py imports lightning.pytorch"),
        ("callbacks/merge_callback.py", "import torch; torch._C._results", "uses _results"),
        ("extra.py", "", "extra.py lies loose"),
        ("merging/rules.py", "\n" * MAX_LINES, f"more than {MAX_LINES}"),
    ],
)
@pytest.mark.sample(1)
def test_what_is_not_as_it_should_be_is_found(tmp_path, place, line, problem):
    copy = shutil.copytree(PACKAGE, tmp_path / "merge_callback", ignore=shutil.ignore_patterns("__pycache__"))
    file = copy / place
    file.write_text((file.read_text() if file.exists() else "") + f"\n{line}\n")
    assert any(problem in each for each in problems(copy))


def test_the_table_of_the_folders_is_the_house():
    rows = re.findall(r"^\| `(\w+)/` \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert tuple(rows) == FOLDERS
