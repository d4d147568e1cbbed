"""Keeps the values of merges that are frozen while the learning rate decays, instead of validating them again."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import is_

import torch
from lightning.pytorch import Trainer

from merge_callback.capture.merge_set import MergeSet
from merge_callback.live.checksums import checksums_without
from merge_callback.live.evaluate import LoggedValue, validation_loaders
from merge_callback.live.names import clean_name
from merge_callback.validation.evaluation import Results


@dataclass(frozen=True)
class _Basis:
    """What the values of the merges depend on, but for random numbers and what a module keeps elsewhere."""

    # Of the snapshots, and of the averages over every step.
    steps: list[int | None]
    checksums: list[object]
    loaders: Sequence[object]

    def is_same(self, other: "_Basis") -> bool:
        loaders = len(self.loaders) == len(other.loaders) and all(map(is_, self.loaders, other.loaders))
        return loaders and (self.steps, self.checksums) == (other.steps, other.checksums)


class FrozenValues:
    """Results of merges that cannot change until the rate is constant again.

    They are repeated only if two validations in a row, with nothing changed, gave the same values to the bit. A
    validation that draws random numbers or shuffles, or whose values depend on the step, does not. So a run that is
    resumed, and validates once more, logs what the uninterrupted run repeats.

    Args:
        merges: The merges.
    """

    def __init__(self, merges: MergeSet) -> None:
        self._merges = merges
        self._known: Results | None = None
        self._is_proven = False
        self._basis: _Basis | None = None
        self._metrics: set[str] | None = None
        # Step of the validation whose results are repeated, and how often they were.
        self.step = 0
        self.num_repeated = 0

    def __getstate__(self) -> dict[str, object]:
        """Leaves out the loaders and the results for them."""
        return self.__dict__ | {"_known": None, "_basis": None, "_is_proven": False}

    def repeat(self, trainer: Trainer) -> Results | None:
        """Returns the results to log again; None if the merges have to be validated. All ranks must call it together.

        Call it once at each validation, and then `keep` if it has returned None.
        """
        window = self._merges.capture.window
        if window.start != "stable":
            return None
        before, self._basis = self._basis, self._present(trainer)
        is_same = before is not None and self._basis is not None and before.is_same(self._basis)
        if not is_same:
            self._known, self._is_proven = None, False
        if not window.is_frozen:
            return None
        is_known = is_same and self._is_proven
        if not trainer.strategy.reduce_boolean_decision(is_known, all=True):
            return None
        self.num_repeated += 1
        return self._known

    def keep(self, results: Results, step: int) -> None:
        """Keeps the results of a validation, and notes whether they are those of the one before."""
        self._is_proven = self._known is not None and _are_same(self._known, results)
        self._known, self.step, self.num_repeated = results, step, 0

    def see(self, metrics: Collection[str]) -> None:
        """Sees the live metrics of a validation. If they are others than before, the merges may have others, too."""
        before, self._metrics = self._metrics, set(metrics)
        if before is not None and self._metrics != before:
            self._known, self._is_proven = None, False

    def _present(self, trainer: Trainer) -> _Basis | None:
        capture, module = self._merges.capture, trainer.lightning_module
        if self._merges.is_recalibrated or capture.layout is None:
            return None
        taken = {*capture.layout.places, *self._merges.buffers_of_snapshots(module)}
        # A counter of batch norm layers that is used only in training.
        taken |= {clean_name(name) for name, _ in module.named_buffers() if name.endswith("num_batches_tracked")}
        averages = [capture.averages[name].step for name in capture.averages.names]
        return _Basis([*capture.steps, *averages], checksums_without(module, taken), validation_loaders(trainer))

    def describe(self) -> str:
        """Returns how often results were repeated, in words for the user; empty if never."""
        if not self.num_repeated:
            return ""
        times = "once" if self.num_repeated == 1 else f"{self.num_repeated} times"
        return f"the merge did not change in the decay: its values of step {self.step} were repeated {times}"


def _are_same(first: Results, second: Results) -> bool:
    if first.merges.keys() != second.merges.keys():
        return False
    return all(_are_equal(first.merges[name].values, second.merges[name].values) for name in first.merges)


def _are_equal(first: Mapping[str, LoggedValue], second: Mapping[str, LoggedValue]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name].value, second[name].value) for name in first)
