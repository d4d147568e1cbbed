"""Records as lines of JSON, with what they were made with, and tables that stand in pages between two marks."""

import json
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def about() -> dict[str, str]:
    """Versions, processor and commit."""
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    packages = {name: version(name) for name in ("torch", "lightning", "merge-callback")}
    return {**packages, "processor": platform.processor() or platform.machine(), "commit": commit}


def write_runs(path: Path, runs: Iterable[dict[str, Any]]) -> None:
    """Runs, one a line, after a line about all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, [{"about": about()}, *runs])) + "\n")


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs that `write_runs` wrote."""
    _, *lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines]


def marks(script: str) -> tuple[str, str]:
    """What stands before and after the table of a script in a page."""
    return f"<!-- {script} table: made by benchmarks/{script}.py report -->", f"<!-- end of {script} table -->"


def put_into(page: Path, script: str, table: str) -> None:
    """Replaces the table of a script in a page."""
    begin, end = marks(script)
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}")
