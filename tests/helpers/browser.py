"""A headless browser and servers of dashboards on this machine alone, for tests and for the pictures of the docs."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Route, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
FLAGS = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync"]
# Of MLflow: it neither sends what is done with it nor starts workers for jobs that nobody gives it.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@contextmanager
def opened_page(**options: Any) -> Iterator[Page]:
    """A page of a fresh browser; fails if it asked for anything outside this machine, or if its scripts broke.

    Args:
        **options: Of the browser's context, such as ``viewport`` or ``color_scheme``.
    """
    outside, errors = [], []

    def gate(route: Route) -> None:
        if re.match(r"http://127\.0\.0\.1[:/]", route.request.url):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 1000}} | options))
        context.route(re.compile("^https?:"), gate)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        browser.close()
    assert outside == []
    assert errors == []


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """TensorBoard over a folder of logs: its address, once it knows a layout of custom scalars."""
    command = ["tensorboard.main", "--logdir", str(folder), "--load_fast", "false", "--reload_interval", "1"]
    with _served(command, folder.parent / "tensorboard.log", "/data/plugin/custom_scalars/layout", "category") as url:
        yield url


@contextmanager
def mlflow(store: str, folder: Path) -> Iterator[str]:
    """MLflow over a store of runs: its address."""
    command = ["mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    with _served(command, folder / "mlflow.log", "/health", "OK") as url:
        yield url


@contextmanager
def _served(command: list[str], log: Path, path: str, awaited: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=output,
            env=os.environ | QUIET,
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}{path}", awaited)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def _wait(process: "subprocess.Popen[bytes]", url: str, awaited: str) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, "the server ended by itself; its log says why"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if awaited in answer.read().decode():
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"{url} did not answer with {awaited!r}")
