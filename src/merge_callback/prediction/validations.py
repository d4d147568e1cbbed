"""Live and merged values of a run's validations at a constant rate: what every prediction stands on."""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_callback.prediction.river import Composition


@dataclass(frozen=True)
class FurtherMerge:
    """Another merge than the primary one, at the same validation.

    Args:
        composition: What matters of its coefficients.
        merged: Metric -> value.
    """

    composition: Composition
    merged: dict[str, float]


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
        composition: What matters of the coefficients of the primary merge; None if it is not made of snapshots.
        further: Other merges of the same snapshots.
        phase: Which of the run's constant rates it was.
        optimizer: Class names of the optimizers; empty if unknown.
    """

    step: int
    span_steps: int
    live: dict[str, float]
    merged: dict[str, float]
    rule: str = ""
    composition: Composition | None = None
    further: tuple[FurtherMerge, ...] = ()
    phase: int = 0
    optimizer: str = ""

    @property
    def is_like_adam(self) -> bool:
        """Whether all optimizers are of Adam's kind, as those of the project's benchmarks, or unknown."""
        return all("adam" in name.lower() for name in self.optimizer.split(", ") if name)

    @property
    def share(self) -> float:
        """Length of the primary merge's window as a share of all optimizer steps so far."""
        return max(self.span_steps, 1) / self.step


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
    return StableValidation(step, span_steps, live, merged, after.rule, phase=after.phase, optimizer=after.optimizer)


def run_identity(history: Sequence[StableValidation]) -> str | None:
    """Returns an identifier of the run: a hash of the step and live values of its first validation.

    Returns None before the first validation. A run that is resumed, or repeated bit for bit, keeps its identifier.
    """
    if not history:
        return None
    first = {"step": history[0].step, "live": history[0].live}
    return hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()[:12]


def read_validation(found: Any) -> StableValidation:
    """Returns a validation from plain objects, as `dataclasses.asdict` makes them.

    Raises:
        ValueError: If it is none; the message says what is wrong.
    """
    check(found, dict, "a validation")
    if (step := entry(found, "step", int)) < 0:
        raise ValueError(f"step must be a number of steps, got {step}")
    further = found.get("further") or []
    check(further, list | tuple, "further")
    return StableValidation(
        step=step,
        span_steps=entry(found, "span_steps", int),
        live=values(found, "live"),
        merged=values(found, "merged"),
        rule=entry(found, "rule", str) if "rule" in found else "",
        composition=_composition(found),
        further=tuple(map(_further, further)),
        phase=entry(found, "phase", int) if "phase" in found else 0,
        optimizer=entry(found, "optimizer", str) if "optimizer" in found else "",
    )


def _composition(found: Mapping[str, Any]) -> Composition | None:
    if found.get("composition") is None:
        return None
    numbers = entry(found, "composition", dict)
    return Composition(*(float(entry(numbers, name, int | float)) for name in ("age", "squares")))


def _further(found: Any) -> FurtherMerge:
    check(found, dict, "a further merge")
    if (composition := _composition(found)) is None:
        raise ValueError("a further merge has no 'composition'")
    return FurtherMerge(composition, values(found, "merged"))


def values(line: Mapping[str, Any], key: str) -> dict[str, float]:
    """Returns metric -> value; another writer may put null for a value that is no number."""
    found = entry(line, key, dict)
    for name, value in found.items():
        if value is not None:
            check(value, int | float, f"{key}[{name!r}]")
    return {whole(name): float(value) for name, value in found.items() if value is not None}


def whole(text: str) -> str:
    """Returns a text without the halves of characters that JSON allows, and that neither files nor pictures take."""
    return text.encode("utf-8", "replace").decode()


def entry(line: Mapping[str, Any], key: str, kind: Any) -> Any:
    """Returns an entry after a check of its type.

    Raises:
        ValueError: If it is missing or of another type.
    """
    if key not in line:
        raise ValueError(f"it has no {key!r}")
    check(line[key], kind, key)
    return line[key]


def check(value: Any, kind: Any, what: str) -> None:
    """Raises ValueError if a value is of another type, or too large to be a number of steps."""
    if kind is int and isinstance(value, int) and abs(value) > _MOST_STEPS:
        raise ValueError(f"{what} is larger than any number of steps")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{what} must be {_NAMES[kind]}, got {value!r:.80}")  # noqa: TRY004 (no argument)


_MOST_STEPS = 10**15
_NAMES: dict[Any, str] = {
    list | tuple: "a list",
    dict: "an object",
    str: "a text",
    int: "a whole number",
    int | float: "a number",
}
