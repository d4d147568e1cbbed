"""The console command, in a process of its own as a user calls it, or inside this one."""

import logging
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from merge_callback.apps import cli

MERGE_CALLBACK = str(Path(sys.executable).with_name("merge-callback"))


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def merge_callback(*arguments: str) -> Done:
    """Runs the command in this process, which has imported all it needs already."""
    root, argv, path = logging.getLogger(), sys.argv, list(sys.path)
    handlers, level = list(root.handlers), root.level
    output, errors, code = StringIO(), StringIO(), 0
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            cli.main(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            errors.write(ended.code)
    except Exception as error:
        # Under a tracer, such as that of the coverage, Hydra lets errors pass.
        code = 1
        errors.write(str(error))
    finally:
        # Hydra configures logging, with files.
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:], sys.argv, sys.path[:] = handlers, argv, path
        root.setLevel(level)
    return Done(code, output.getvalue(), errors.getvalue())
