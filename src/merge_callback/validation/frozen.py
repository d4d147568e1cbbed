"""Keeps the values of merges that are frozen while the learning rate decays, instead of validating them again."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

from lightning.pytorch import Trainer

from merge_callback.capture.merge_set import MergeSet
from merge_callback.live.checksums import checksums_without
from merge_callback.live.evaluate import validation_loaders
from merge_callback.live.names import clean_name
from merge_callback.validation.evaluation import Results


@dataclass(frozen=True)
class _Basis:
    """What the values of the merges depend on."""

    # Of the snapshots, and of the averages over every step.
    steps: list[int | None]
    checksums: list[object]
    loaders: Sequence[object]

    def is_same(self, other: "_Basis") -> bool:
        loaders = len(self.loaders) == len(other.loaders) and all(map(is_, self.loaders, other.loaders))
        return loaders and (self.steps, self.checksums) == (other.steps, other.checksums)


class FrozenValues:
    """The results of the latest validation of merges that cannot change until the rate is constant again.

    Args:
        merges: The merges.
    """

    def __init__(self, merges: MergeSet) -> None:
        self._merges = merges
        self._known: Results | None = None
        self._basis: _Basis | None = None
        # Step of the validation whose results were repeated, and how often they were.
        self.step = 0
        self.num_repeated = 0

    def __getstate__(self) -> dict[str, object]:
        """Leaves out the loaders and the results for them."""
        return self.__dict__ | {"_known": None, "_basis": None}

    def repeated(self, trainer: Trainer) -> Results | None:
        """Returns the known results; None if the merges have to be validated. All ranks must call it together.

        They are known if the merges are frozen, and all that they take from the live model (frozen and excluded
        parameters, other buffers) and the validation loaders are as they were.
        """
        before, self._basis = self._basis, self._present(trainer)
        is_same = before is not None and self._basis is not None and before.is_same(self._basis)
        if not self._merges.capture.window.is_frozen:
            self._known = None
        if self._known is not None and not trainer.strategy.reduce_boolean_decision(is_same, all=True):
            self._known = None
        self.num_repeated += self._known is not None
        return self._known

    def keep(self, results: Results, step: int) -> None:
        """Keeps the results of a validation at a step, which `repeated` has found necessary."""
        if self._basis is not None:
            self._known, self.step, self.num_repeated = results, step, 0

    def _present(self, trainer: Trainer) -> _Basis | None:
        capture, module = self._merges.capture, trainer.lightning_module
        if self._merges.is_recalibrated or capture.layout is None:
            return None
        taken = {*capture.layout.places, *(name for merge in self._merges for name in merge.buffers)}
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
