"""What a validation of the merges has found."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from merge_callback.capture.merges import Merge
from merge_callback.live.evaluate import LoggedValue
from merge_callback.prediction.river import Composition
from merge_callback.validation.routers import Choices


@dataclass(frozen=True)
class Evaluated:
    """A merge and the result of its validation.

    Args:
        merge: The merge.
        coefficients: Coefficients by snapshot step; empty for an average over every step.
        intervals: First and last step of each snapshot that is a mean; empty for points.
        composition: What matters of the coefficients for a forecast; None for an average over every step.
        description: What the merge was made of, in a few words.
        values: Metric -> value that the validation logged.
    """

    merge: Merge
    coefficients: dict[int, float]
    intervals: list[list[int]]
    composition: Composition | None
    description: str
    values: dict[str, LoggedValue]


@dataclass(frozen=True)
class Results:
    """What a validation found of the merges alone."""

    # The primary merge comes first, if it could be made.
    merges: dict[str, Evaluated] = field(default_factory=dict)
    # Of the primary merge: numbers about it, and what routers choose under it.
    diagnostics: dict[str, float] = field(default_factory=dict)
    choices: dict[str, Choices] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The results of merges before a live validation, kept until they can be compared with the live values."""

    step: int
    # The primary merge comes first, if it could be made.
    merges: dict[str, Evaluated]
    # Live values on the batches of the merges, if these are fewer and the live validation will not tell them.
    live: dict[str, LoggedValue] | None
    diagnostics: dict[str, float]
    # Whether the merges had fewer batches than the live validation has.
    is_limited: bool

    def without_sums(self) -> "Evaluation":
        """Returns the same without the running sums, which refer to the trainer's strategy."""
        merges = {name: replace(each, values=without_sums(each.values)) for name, each in self.merges.items()}
        return replace(self, merges=merges, live=None if self.live is None else without_sums(self.live))

    @property
    def values(self) -> dict[str, dict[str, LoggedValue]]:
        """Merge -> metric -> merged value."""
        return {name: each.values for name, each in self.merges.items()}


_Name = TypeVar("_Name")


def without_sums(values: Mapping[_Name, LoggedValue]) -> dict[_Name, LoggedValue]:
    """Returns logged values without their running sums, which refer to the trainer's strategy."""
    return {name: replace(value, sums=None) for name, value in values.items()}
