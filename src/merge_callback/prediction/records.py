"""Records of real anneals: a file with one JSON line per branch, which several runs may write and read at once."""

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from merge_callback.prediction.bias import BranchOutcome


@dataclass(frozen=True)
class StableValidation:
    """Live and merged values of a stable run, at a constant learning rate, at one validation.

    Args:
        step: Optimizer steps so far.
        span_steps: Steps between the first and the last snapshot of the primary merge.
        live: Metric -> value of the live model.
        merged: Metric -> value of the primary merge. If the merge was evaluated on fewer batches, this is the live
            value minus the gain on those batches.
        rule: Description of the primary merge. Only records with the same description are compared.
    """

    step: int
    span_steps: int
    live: dict[str, float]
    merged: dict[str, float]
    rule: str = ""


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


def validation_at(history: Sequence[StableValidation], step: int, max_gap_steps: int) -> StableValidation | None:
    """Returns a stable run's values at a step, linearly interpolated between two validations if necessary.

    Args:
        history: Validations of one stable run, ascending in step.
        step: Optimizer step.
        max_gap_steps: Largest gap in steps between two validations that are interpolated.

    Returns:
        The values; None if there is no validation at the step and no two validations close enough around it.
    """
    index = bisect_left(history, step, key=lambda values: values.step)
    if index < len(history) and history[index].step == step:
        return history[index]
    if not 0 < index < len(history) or history[index].step - history[index - 1].step > max_gap_steps:
        return None
    before, after = history[index - 1], history[index]
    share = (step - before.step) / (after.step - before.step)

    def between(earlier: Mapping[str, float], later: Mapping[str, float]) -> dict[str, float]:
        return {name: earlier[name] + share * (later[name] - earlier[name]) for name in earlier if name in later}

    span_steps = round(before.span_steps + share * (after.span_steps - before.span_steps))
    live, merged = between(before.live, after.live), between(before.merged, after.merged)
    return StableValidation(step, span_steps, live, merged, after.rule)


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


def run_identity(history: Sequence[StableValidation]) -> str | None:
    """Returns an identifier of the run: a hash of the step and live values of its first validation.

    Returns None before the first validation. A run that is resumed, or repeated bit for bit, keeps its identifier.
    """
    if not history:
        return None
    first = {"step": history[0].step, "live": history[0].live}
    return hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()[:12]


def stable_run_in_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[str | None, list[StableValidation]]:
    """Returns identifier and validations of the run in a `MergeCallback` checkpoint; ``(None, [])`` without them."""
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, Mapping) and "history" in state:
            history = [_validation(values) for values in state["history"]]
            return run_identity(history), history
    return None, []


def _ends_in_half_a_line(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _record(line: Any) -> AnnealRecord:
    _check(line, dict, "the line")
    record = AnnealRecord(
        run=_whole(_entry(line, "run", str)),
        start_step=_entry(line, "start_step", int),
        step=_entry(line, "step", int),
        span_steps=_entry(line, "span_steps", int),
        shape=_whole(_entry(line, "shape", str)),
        annealed=_values(line, "annealed"),
        forecast=_validation(_entry(line, "forecast", dict)) if line.get("forecast") is not None else None,
        matched=_validation(_entry(line, "matched", dict)) if line.get("matched") is not None else None,
    )
    if not 0 <= record.start_step < record.step or record.span_steps < 1:
        raise ValueError(
            f"a decay over span_steps={record.span_steps} steps cannot go from start_step={record.start_step} to"
            f" step={record.step}"
        )
    return record


def _validation(found: Any) -> StableValidation:
    _check(found, dict, "a validation")
    span_steps, step = _entry(found, "span_steps", int), _entry(found, "step", int)
    rule = _entry(found, "rule", str) if "rule" in found else ""
    return StableValidation(step, span_steps, _values(found, "live"), _values(found, "merged"), rule)


def _values(line: Mapping[str, Any], key: str) -> dict[str, float]:
    """Returns metric -> value; another writer may put null for a value that is no number."""
    found = _entry(line, key, dict)
    for name, value in found.items():
        if value is not None:
            _check(value, int | float, f"{key}[{name!r}]")
    return {_whole(name): float(value) for name, value in found.items() if value is not None}


def _whole(text: str) -> str:
    """Returns a text without the halves of characters that JSON allows, and that neither files nor pictures take."""
    return text.encode("utf-8", "replace").decode()


def _entry(line: Mapping[str, Any], key: str, kind: Any) -> Any:
    if key not in line:
        raise ValueError(f"it has no {key!r}")
    _check(line[key], kind, key)
    return line[key]


def _check(value: Any, kind: Any, what: str) -> None:
    if kind is int and isinstance(value, int) and abs(value) > _MOST_STEPS:
        raise ValueError(f"{what} is larger than any number of steps")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{what} must be {_NAMES[kind]}, got {value!r:.80}")  # noqa: TRY004 (no argument)


_MOST_STEPS = 10**15
_NAMES: dict[Any, str] = {dict: "an object", str: "a text", int: "a whole number", int | float: "a number"}
