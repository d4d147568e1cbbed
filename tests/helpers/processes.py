"""Processes of a test's own, without the five seconds that importing torch and Lightning takes.

They are forked from a server that has imported these already. The server has run nothing else, so each process begins
as a new interpreter would. One that hangs says where, and ends.
"""

import faulthandler
import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from tests.helpers.commands import MERGE_CALLBACK, Done

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.preloaded"])
ROOT = Path(__file__).parents[2]
# Long enough for a busy machine, and shorter than the limit of a test in the Makefile.
TIMEOUT_SECONDS = 240


def begin(function: Callable[..., Any], *arguments: Any) -> Any:
    """Begins a function of a module in a process of its own, which ends with this one, or with its time."""
    here = Path.cwd()
    # The server imports from the folder in which it is started; where it finds nothing, it does not say so.
    os.chdir(ROOT)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)
    process = CONTEXT.Process(target=_watched, args=(function, *arguments), daemon=True)
    process.start()
    return process


def watch() -> None:
    """From now on this process has its whole time; at the end of it, it writes the stacks of its threads and ends."""
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS, exit=True)


def _watched(function: Callable[..., Any], *arguments: Any) -> None:
    watch()
    function(*arguments)


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns in a process of its own; fails if it raises, with the traceback."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = begin(_answer, sender, function, arguments)
    sender.close()
    try:
        is_done, answer = receiver.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"the process ended with exit code {process.exitcode}") from None
    process.join()
    assert is_done, answer
    return answer


def _answer(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send((True, function(*arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))


def run_program(program: str, *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None) -> Done:
    """Runs a Python file, or the command ``merge-callback``, as ``python FILE ARGUMENTS`` would.

    Args:
        program: The file, or ``"merge-callback"``.
        arguments: Of the command line.
        cwd: Where it runs.
        environment: Variables in addition to those of this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        variables = dict(os.environ) | dict(environment or {})
        process = begin(_run, program, arguments, str(cwd), variables, list(map(str, outputs)))
        process.join()
        stdout, stderr = (output.read_text() if output.exists() else "" for output in outputs)
    assert process.exitcode is not None
    return Done(process.exitcode, stdout, stderr)


def _run(
    program: str, arguments: tuple[str, ...], cwd: str, environment: dict[str, str], outputs: tuple[str, str]
) -> None:
    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    warnings.resetwarnings()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if program == "merge-callback":
        from merge_callback.apps.cli import main  # noqa: PLC0415

        sys.argv = [MERGE_CALLBACK, *arguments]
        main()
    else:
        sys.argv = [program, *arguments]
        sys.path.insert(0, str(Path(cwd, program).parent))
        runpy.run_path(program, run_name="__main__")
