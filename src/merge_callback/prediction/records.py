"""Records of real anneals: one JSON line a branch, in a file that many runs may write to and read while it grows."""

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
    """What a trunk, a run at a constant rate, knew at one validation.

    Args:
        step: Optimizer steps done.
        span_steps: Steps that the primary merge's snapshots span, from first to last.
        live: Metric -> value of the live model.
        merged: Metric -> value of the primary merge. Where the merge was evaluated on fewer batches: the live value
            minus the gain on the same batches.
        rule: What the primary merge is, in words.
    """

    step: int
    span_steps: int
    live: dict[str, float]
    merged: dict[str, float]
    rule: str = ""


@dataclass(frozen=True)
class AnnealRecord:
    """A real decay from a trunk's checkpoint, and what the trunk's merges said about it.

    Args:
        run: Identity of the trunk.
        start_step: Optimizer steps of the trunk at which the decay began.
        step: Optimizer steps at its end.
        span_steps: Length of the decay.
        shape: Name of its shape, as in `merge_callback.merging.rules.DECAY_SHAPES`.
        annealed: Metric -> value at its end.
        forecast: The trunk at ``start_step``: what was known before the decay. None if it was not validated there.
        matched: The trunk at ``step``, with a window that ends with the decay. None until the trunk has been there.
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
        """What tells two branches apart; of two records of one branch the later counts."""
        return self.run, self.start_step, self.step, self.shape

    @property
    def span(self) -> float:
        """Length of the decay as a share of all steps up to its end."""
        return self.span_steps / self.step

    def outcome(self, metric: str) -> BranchOutcome | None:
        """One metric beside the trunk's values of the matched window; None if that is not known of it."""
        if self.matched is None or metric not in self.matched.merged or metric not in self.annealed:
            return None
        return BranchOutcome(self.matched.live[metric], self.matched.merged[metric], self.annealed[metric])


def append_record(path: str | os.PathLike[str], record: AnnealRecord) -> None:
    """Adds a line to the file, in one write, so that concurrent writers lose nothing. Missing folders are made.

    Raises:
        OSError: If it cannot be written; the message holds the line.
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
        raise OSError(f"the record of an anneal was not added to {path}: {error}. It says: {line.decode()}") from error


def read_records(path: str | os.PathLike[str]) -> list[AnnealRecord]:
    """The records in the file, one a branch, in the order in which the branches ended; none if there is no file yet.

    A last line that is still being written is left for the next time; half a line of a writer that died is left out.

    Raises:
        ValueError: If a line is no record; the message says which.
    """
    path = Path(path)
    if not path.exists():
        return []
    complete, _, _ = path.read_text().rpartition("\n")
    records: dict[tuple[str, int, int, str], AnnealRecord] = {}
    for number, line in enumerate(complete.splitlines(), start=1):
        if line.strip():
            try:
                record = _parse(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, json.JSONDecodeError) and line.startswith("{"):
                    continue
                raise ValueError(f"{path}, line {number}, is no record of an anneal: {error!r}") from error
            records[record.identity] = record
    return list(records.values())


def trunk_at(history: Sequence[StableValidation], step: int, max_gap_steps: int) -> StableValidation | None:
    """The trunk at a step: as it was validated there, or between the two validations around it.

    Args:
        history: Validations of one trunk, ascending in step.
        step: Optimizer steps.
        max_gap_steps: Validations further apart than this are not interpolated.

    Returns:
        None if the trunk was not validated there nor closely around it.
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
    """The record with what the trunk's validations add to it.

    The forecast takes a validation at the very start of the decay; the match one at its end, or two close around it.
    """
    return replace(
        record,
        forecast=record.forecast or trunk_at(history, record.start_step, max_gap_steps=0),
        matched=record.matched or trunk_at(history, record.step, max_gap_steps=record.span_steps),
    )


def run_identity(history: Sequence[StableValidation]) -> str | None:
    """A name for the run that was validated so: what its first validation found is as good as a fingerprint.

    None before the first validation. A run that is resumed, or repeated bit for bit, keeps its name.
    """
    if not history:
        return None
    first = {"step": history[0].step, "live": history[0].live}
    return hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()[:12]


def trunk_in_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[str | None, list[StableValidation]]:
    """Name and validations of the trunk that saved a checkpoint with a `MergeCallback`; otherwise None and nothing."""
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, Mapping) and "history" in state:
            history = [StableValidation(**values) for values in state["history"]]
            return run_identity(history), history
    return None, []


def _ends_in_half_a_line(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _parse(line: Mapping[str, Any]) -> AnnealRecord:
    trunk = {key: StableValidation(**line[key]) if line[key] else None for key in ("forecast", "matched")}
    return AnnealRecord(**{**line, **trunk})
