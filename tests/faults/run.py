"""Would the tests notice? Puts the faults of `faults.py` in, one at a time, and runs the tests that should notice.

Statistic: for each fault, whether its test fails once it is in.
Pass rule: every fault is noticed, and without a fault the same tests pass.

    python -m tests.faults.run            # all of them, in half an hour; writes record.json
    python -m tests.faults.run average    # only faults in whose description the word occurs

Code and tests are found by their text, so that neither has to stay in its file.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from queue import Queue
from typing import Any, TypeAlias

from tests.faults.faults import FAULTS

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("record.json")
# What pytest returns if no test was selected.
NO_TESTS = 5
# Each in a copy of the repository.
NUM_AT_ONCE = 2

Fault: TypeAlias = tuple[str, str, str, str]


def file_of_code(source: Path, code: str) -> Path:
    """The only file of the source that holds the code, once.

    Raises:
        LookupError: If there is no such file, or the code stands in several places.
    """
    counts = {
        file: file.read_text().count(code) for file in sorted(source.rglob("*")) if file.suffix in (".py", ".yaml")
    }
    found = [file for file, count in counts.items() if count]
    if len(found) != 1 or counts[found[0]] != 1:
        raise LookupError(f"the code must stand in one place, but stands in {[str(file) for file in found]}: {code!r}")
    return found[0]


def test_path(tests: Path, name: str) -> str:
    """What pytest takes to run the test of that name.

    Raises:
        LookupError: If there is no such test, or there are several.
    """
    found = [file for file in tests.rglob("test_*.py") if re.search(rf"^def {name}\(", file.read_text(), re.MULTILINE)]
    if len(found) != 1:
        raise LookupError(f"there must be one test called {name}, but there are {len(found)}")
    return f"{found[0].relative_to(tests.parent)}::{name}"


def passes(folder: Path, tests: list[str]) -> bool:
    """Whether these tests pass in a copy of the repository."""
    # Of files that are slow as a whole all cases are run, of others those that are not.
    slow = [test for test in tests if "sharded" in test]
    if slow and len(slow) < len(tests):
        return passes(folder, slow) and passes(folder, [test for test in tests if test not in slow])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    which = [] if slow else ["-m", "not slow"]
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*command, *which], check=False, **options)
    if done.returncode == NO_TESTS:
        # All cases are slow.
        done = subprocess.run(command, check=False, **options)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the tests did not run: {done.stdout}{done.stderr}")
    return done.returncode == 0


def notices(folder: Path, fault: Fault) -> bool:
    """Whether its test fails once a fault is put into a copy of the repository, which is as before afterwards."""
    _, code, broken, test = fault
    path = file_of_code(folder / "src", code)
    original = path.read_text()
    path.write_text(original.replace(code, broken))
    try:
        return not passes(folder, [test_path(folder / "tests", test)])
    finally:
        path.write_text(original)


def main(words: list[str]) -> None:
    """Puts faults in, one at a time, and records which were noticed.

    Args:
        words: Only faults that one of these occurs in; the others keep what was recorded. None at all: every fault.
    """
    chosen = [fault for fault in FAULTS if not words or any(word in fault[0] for word in words)]
    known = {result["fault"]: result for result in json.loads(RECORD.read_text())["faults"]} if words else {}
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / f"copy{number}" for number in range(NUM_AT_ONCE)]
        for folder in folders:
            ignored = shutil.ignore_patterns(".git", ".venv*", "outputs", "dist", ".*cache")
            shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
        # Before an hour is spent: whether all of them can be put in.
        tests = {test_path(folders[0] / "tests", test) for *_, test in chosen}
        for _, code, _, _ in chosen:
            file_of_code(folders[0] / "src", code)
        if not passes(folders[0], sorted(tests)):
            sys.exit("the tests fail without any fault")
        free: Queue[Path] = Queue()
        for folder in folders:
            free.put(folder)

        def is_noticed(fault: Fault) -> bool:
            folder = free.get()
            try:
                return notices(folder, fault)
            finally:
                free.put(folder)

        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            for (what, _, _, test), caught in zip(chosen, pool.map(is_noticed, chosen), strict=True):
                known[what] = {"fault": what, "test": test, "caught": caught, "commit": commit}
                sys.stdout.write(f"{'caught' if caught else 'NOT CAUGHT'}: {what}\n")
                sys.stdout.flush()
    results = [known[fault[0]] for fault in FAULTS if fault[0] in known]
    versions = {name: version(name) for name in ("torch", "lightning")}
    RECORD.write_text(json.dumps({"versions": versions, "faults": results}, indent=1) + "\n")
    if not all(result["caught"] for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
