"""The console command ``merge-callback COMMAND``: lists the commands, explains each, and runs them.

Exit codes: 0 if all went well, 1 if a run failed, 2 if the command was called wrongly.
"""

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from merge_callback.apps.wrong_call import WRONG_CALL, ConfigError, WrongCallError

_CONFIGS = "pkg://merge_callback.apps.commands"
_GROUPS = f"{_CONFIGS}.groups"


@dataclass(frozen=True)
class Command:
    """One command: its summary, its code and its entries.

    Args:
        summary: What the command does, in one line.
        module: Module with a function ``run``; its docstring is the command's help text, with an example.
        entries: File with the command's own entries, below ``commands/``; None if the command does not use Hydra.
        group: Prefix of those entries in the user's config.
        path: Where Hydra looks for configs, in addition to the user's ``--config-dir``.
        config: Name of the config that Hydra composes; None if the user names it.
    """

    summary: str
    module: str
    entries: str | None = None
    group: str = ""
    path: str | None = None
    config: str | None = None


COMMANDS = {
    "demo": Command(
        "train a small GPT on real text, with live and merged loss",
        "demo.command",
        "demo.yaml",
        path=_CONFIGS,
        config="demo",
    ),
    "train": Command("train the model of a Hydra config, or anneal a branch of its run", "train", "train.yaml"),
    "merge": Command("merge checkpoints on disk into one", "merge", "merge.yaml", path=_CONFIGS, config="merge"),
    "sweep": Command(
        "validate a grid of merges of checkpoints", "sweep", "groups/sweep/grid.yaml", "sweep.", path=_GROUPS
    ),
    "landscape": Command(
        "show the loss between checkpoints", "landscape", "groups/landscape/line.yaml", "landscape.", path=_GROUPS
    ),
    "plan": Command("compare decays that a run could have, by where its loss would end", "plan"),
    "report": Command("write an HTML page about a run and its anneals", "report"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``merge-callback``; arguments None takes those of the program."""
    asked = list(sys.argv[1:] if arguments is None else arguments)
    if not asked or asked[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return
    name, *rest = asked
    if name not in COMMANDS:
        sys.stderr.write(f"merge-callback: there is no command {name!r}\n\n{overview()}")
        sys.exit(WRONG_CALL)
    if {"-h", "--help"} & set(rest):
        sys.stdout.write(explanation(name))
        sys.exit(0)
    run = import_module(f"merge_callback.apps.{COMMANDS[name].module}").run
    try:
        if COMMANDS[name].entries is None:
            run(rest)
        else:
            _run_with_config(name, run, rest)
    except WrongCallError as error:
        sys.stderr.write(f"merge-callback {name}: {error}\n")
        raise


def overview() -> str:
    """Returns the usage text, with all commands one per line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: merge-callback COMMAND [ARGUMENT ...]",
            "",
            *lines,
            "",
            "merge-callback COMMAND --help says what a command does and takes.",
            "",
        ]
    )


def explanation(name: str) -> str:
    """Returns the help text of a command: what it does, an example, and its entries with their defaults."""
    command = COMMANDS[name]
    text = (import_module(f"merge_callback.apps.{command.module}").__doc__ or "").replace("``", "")
    parts = [f"merge-callback {name}: {command.summary}", "", text.strip().partition("\n")[2].strip()]
    if command.entries is not None:
        parts += ["", "Entries, as ENTRY=VALUE, with their defaults:", "", *entries(command.entries, command.group)]
    return "\n".join([*parts, ""])


def entries(file: str, group: str = "") -> list[str]:
    """Returns the entries of a config file with defaults and comments, one per line.

    Args:
        file: Path of the file below ``commands/``.
        group: Prefix of the entries.
    """
    text = (files("merge_callback.apps") / "commands" / file).read_text()
    comments = dict(re.findall(r"^ *(\w+):.*?  # (.*)$", text, flags=re.MULTILINE))
    config = yaml.safe_load(text)
    own = {key: value for key, value in config.items() if key not in ("defaults", "hydra")}
    found = {f"{group}{path}": value for path, value in _leaves(own)}
    width = max(map(len, found))
    lines = []
    for path, value in found.items():
        default = "(must be given)" if value == "???" else json.dumps(value).replace('"', "") or '""'
        comment = comments.get(path.rpartition(".")[2])
        line = f"  {path:{width}}  {default}" + (f"  # {comment}" if comment else "")
        lines += textwrap.wrap(line, 110, subsequent_indent=" " * (width + 4), break_long_words=False)
    return lines


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif key != "_target_":
            yield f"{prefix}{key}", value


def _causes(error: BaseException | None) -> Iterator[str]:
    """Yields the message of an error and those of its causes."""
    while error is not None:
        yield str(error).strip()
        error = error.__cause__


def _run_with_config(name: str, run: Callable[[DictConfig], None], rest: Sequence[str]) -> None:
    """Lets Hydra compose the config, and runs the command with it."""
    has_begun = False

    def task(config: DictConfig) -> None:
        nonlocal has_begun
        has_begun = True
        try:
            run(config)
        except (ConfigError, InstantiationException) as error:
            raise WrongCallError("\n".join(dict.fromkeys(_causes(error)))) from error

    # Hydra reads its arguments from here.
    sys.argv = [f"merge-callback {name}", *rest]
    # Hydra names the job and its log after the module of the function.
    task.__module__ = f"merge_callback.apps.{name}"
    # As with `python -m`, targets of a config may lie in the current folder.
    sys.path.insert(0, str(Path.cwd()))
    command = COMMANDS[name]
    try:
        hydra.main(version_base="1.3", config_path=command.path, config_name=command.config)(task)()
    except SystemExit as ended:
        # Hydra has already printed what is wrong with the entries.
        if ended.code == 1 and not has_begun:
            sys.exit(WRONG_CALL)
        raise
    except (HydraException, OmegaConfBaseException) as error:
        # Under a debugger or a tracer Hydra raises these errors instead of printing them.
        raise WrongCallError("\n".join(dict.fromkeys(_causes(error)))) from error


if __name__ == "__main__":
    main()
