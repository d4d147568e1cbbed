"""Pickles callbacks without the run that they take part in."""

import copy
from typing import Any

from lightning.pytorch import Callback
from typing_extensions import Self


class PickledWithoutItsRun(Callback):
    """A callback whose pickle has nothing of a run: no weights, no module, no optimizer.

    Modules keep callbacks among their hyper-parameters, which Lightning pickles into every checkpoint. `copy.deepcopy`
    copies all, also what belongs to a run.
    """

    def begin_anew(self) -> None:
        """Sets the attributes that belong to a run to what they are before it."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        anew = object.__new__(type(self))
        vars(anew).update(_own(self))
        anew.begin_anew()
        return vars(anew)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(_own(self), memo))
        return copied


def _own(callback: Callback) -> dict[str, Any]:
    # The Trainer lends every callback the methods of its module.
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}
