"""Counts the validations of a run, so that every n-th one can be chosen."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from merge_callback.live.observe import batch_number


class ValidationCount:
    """The number of validations so far, including the one that runs now.

    A validation is counted at the end of the batch that it follows. Some checkpoints are saved between the two, and a
    run that resumes from them passes over that validation. Whether one follows is only foreseen there: a clock, or a
    callback that comes later, may decide otherwise.
    """

    def __init__(self) -> None:
        self.number = 0
        # Number of the batch after which the latest validation was counted, and whether that one has yet to come.
        self._counted_at: int | None = None
        self._is_foreseen = False

    def foresee(self, trainer: Trainer, is_validated: bool) -> None:
        """Call it at the end of every batch, with whether a validation seems to follow."""
        if self._is_foreseen:
            # It did not come.
            self.number -= 1
        self._is_foreseen = False
        if is_validated:
            self.begin(trainer)
            self._is_foreseen = True

    def begin(self, trainer: Trainer) -> None:
        """Call it when a validation begins. It is counted once, also if a resumed run repeats it."""
        self._is_foreseen = False
        if self._counted_at != (number := batch_number(trainer)):
            self._counted_at = number
            self.number += 1

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "counted_at": self._counted_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.number, self._counted_at, self._is_foreseen = state["number"], state["counted_at"], False
