"""Records of real anneals: a file with one JSON line per branch, which several runs may write and read at once."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from merge_callback.prediction.bias import BranchOutcome
from merge_callback.prediction.validations import (
    StableValidation,
    check,
    entry,
    read_validation,
    run_identity,
    validation_at,
    values,
    whole,
)


@dataclass(frozen=True)
class AnnealRecord:
    """A real decay from a checkpoint of a stable run, with the live and merged values of that run.

    Args:
        run: Identity of the stable run, as from `run_identity`.
        start_step: Optimizer step at which the decay began.
        step: Optimizer step at which the decay ended.
        span_steps: Length of the decay in optimizer steps.
        shape: Name of the decay's shape, as in `merge_callback.merging.decays.DECAY_SHAPES`.
        annealed: Metric -> value at the end of the decay.
        forecast: The stable run at ``start_step``, before the decay. None if it was not validated there.
        matched: The stable run at ``step``, with a window that ends where the decay ends. None until the run has got
            there.
    """

    run: str
    start_step: int
    step: int
    span_steps: int
    shape: str
    annealed: dict[str, float]
    forecast: StableValidation | None = None
    matched: StableValidation | None = None

    @property
    def identity(self) -> tuple[str, int, int, str]:
        """The key of a branch. If a file holds two records with the same key, the later one counts."""
        return self.run, self.start_step, self.step, self.shape

    @property
    def span(self) -> float:
        """Length of the decay as a share of all optimizer steps up to its end."""
        return self.span_steps / self.step

    def outcome(self, metric: str) -> BranchOutcome | None:
        """Returns a metric's annealed value with the matched live and merged ones; None if one of them is unknown."""
        if (matched := self.matched) is None:
            return None
        values = [found.get(metric) for found in (matched.live, matched.merged, self.annealed)]
        known = [value for value in values if value is not None]
        return BranchOutcome(*known) if len(known) == len(values) else None


def append_record(path: str | os.PathLike[str], record: AnnealRecord) -> None:
    """Appends a record to the file, in a single write so that concurrent writers lose nothing. Creates missing folders.

    Raises:
        OSError: If the record cannot be written. The message contains the line.
    """
    line = (json.dumps(asdict(record)) + "\n").encode()
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _ends_in_half_a_line(path):
            line = b"\n" + line
        descriptor = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            written = os.write(descriptor, line)
        finally:
            os.close(descriptor)
        if written < len(line):
            raise OSError(f"only {written} of {len(line)} bytes were written")
    except OSError as error:
        raise OSError(f"the record of an anneal was not added to {path}: {error}. Record: {line.decode()}") from error


def read_records(path: str | os.PathLike[str]) -> list[AnnealRecord]:
    """Returns `records_and_problems` of a file in which every line is a record.

    Raises:
        ValueError: If a line is not a record. The message has the line number.
    """
    records, problems = records_and_problems(path)
    if problems:
        raise ValueError(problems[0])
    return records


def records_and_problems(path: str | os.PathLike[str]) -> tuple[list[AnnealRecord], list[str]]:
    """Returns the records in the file, one per branch in the order in which they were first written, and what is wrong.

    There are none if the file does not exist yet. A last line that is still being written is skipped, and so are
    partial lines of writers that died. Other lines that are no records are left out; each is named among the problems.
    """
    path = Path(path)
    if not path.exists():
        return [], []
    complete, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    records: dict[tuple[str, int, int, str], AnnealRecord] = {}
    problems = []
    # Not `splitlines`, which takes rare characters inside a text for ends of lines.
    for number, line in enumerate(complete.split("\n"), start=1):
        if line.strip():
            try:
                record = _record(json.loads(line))
            except (ValueError, OverflowError, RecursionError) as error:
                is_partial = isinstance(error, json.JSONDecodeError) and line.startswith("{")
                problems += [] if is_partial else [f"{path}, line {number}, is not a record of an anneal: {error}"]
            else:
                records[record.identity] = record
    return list(records.values()), problems


class RecordsFile:
    """A file of records that is read again only when it has changed.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._state: tuple[int, int, int] | None = None
        self._found: tuple[list[AnnealRecord], list[str]] = [], []

    def read(self) -> tuple[list[AnnealRecord], list[str]]:
        """Returns `records_and_problems` of the file as it is now."""
        # As it is before it is read: what is written meanwhile is read the next time.
        state = _state_of(self.path)
        if state is None or state != self._state:
            self._found = records_and_problems(self.path)
            self._state = state
        return self._found


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def completed(record: AnnealRecord, history: Sequence[StableValidation]) -> AnnealRecord:
    """Returns the record with its missing forecast and matched values filled in from the stable run's validations.

    Forecast values need a validation exactly where the decay begins. Matched values need one where the decay ends, or
    two around that step that are no further apart than the decay is long.
    """
    return replace(
        record,
        forecast=record.forecast or validation_at(history, record.start_step, max_gap_steps=0),
        matched=record.matched or validation_at(history, record.step, max_gap_steps=record.span_steps),
    )


def stable_run_in_checkpoint(
    checkpoint: Mapping[str, Any], callback: str | None = None
) -> tuple[str | None, list[StableValidation]]:
    """Returns identifier and validations of the run in a checkpoint; ``(None, [])`` without them.

    Args:
        checkpoint: The checkpoint of a run with a `MergeCallback`.
        callback: Key of the state to prefer if there are several callbacks; else the first one counts.
    """
    states = checkpoint.get("callbacks") or {}
    for state in [states.get(callback), *states.values()]:
        if isinstance(state, Mapping) and "history" in state:
            history = [read_validation(values) for values in state["history"]]
            return run_identity(history), history
    return None, []


def _ends_in_half_a_line(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _record(line: Any) -> AnnealRecord:
    check(line, dict, "the line")
    record = AnnealRecord(
        run=whole(entry(line, "run", str)),
        start_step=entry(line, "start_step", int),
        step=entry(line, "step", int),
        span_steps=entry(line, "span_steps", int),
        shape=whole(entry(line, "shape", str)),
        annealed=values(line, "annealed"),
        forecast=read_validation(entry(line, "forecast", dict)) if line.get("forecast") is not None else None,
        matched=read_validation(entry(line, "matched", dict)) if line.get("matched") is not None else None,
    )
    if not 0 <= record.start_step < record.step or record.span_steps < 1:
        raise ValueError(
            f"a decay over span_steps={record.span_steps} steps cannot go from start_step={record.start_step} to"
            f" step={record.step}"
        )
    return record
