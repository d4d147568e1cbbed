"""Runs of the demo's model, records as lines of JSON, and tables that stand in pages between two marks."""

import json
import platform
import subprocess
import warnings
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import Callback

from merge_callback.apps.train import Run, prepare

ROOT = Path(__file__).parents[1]


def demo_run(callbacks: Sequence[Callback], **options: Any) -> Run:
    """A run of the demo's config on one thread, with these callbacks alone, and options in the place of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    always = ["callbacks/merge=none", "demo.anneal_at=[]", "callbacks.progress_bar=null"]
    with initialize_config_module("merge_callback.apps.commands", version_base="1.3"):
        config = compose("demo", [*always, *(f"{name}={value}" for name, value in options.items())])
    return prepare(config, callbacks, loggers=(), enable_progress_bar=False)


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
    by = "report.py" if (ROOT / "benchmarks" / script / "report.py").exists() else "run.py report"
    return f"<!-- {script} table: made by benchmarks/{script}/{by} -->", f"<!-- end of {script} table -->"


def put_into(page: Path, script: str, table: str) -> None:
    """Replaces the table of a script in a page."""
    begin, end = marks(script)
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}")
