"""Where a run stands when it is validated, whatever loop trains it."""

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer

from merge_callback.live.learning_rates import optimizer_step
from merge_callback.live.observe import is_last_validation


@dataclass(frozen=True)
class Moment:
    """Where a run stands at a validation.

    Args:
        step: Optimizer steps so far.
        optimizer: Class names of the optimizers.
        num_steps: Planned steps of the run; None if unknown.
        is_last: Whether the run ends after this validation.
        may_write: Whether this process writes to files of records.
    """

    step: int
    optimizer: str
    num_steps: int | None = None
    is_last: bool = False
    may_write: bool = True


def moment_of(trainer: Trainer) -> Moment:
    """Returns where the run of a Trainer stands at the validation in progress."""
    # Lightning counts the steps of all optimizers in `max_steps`.
    planned: float = trainer.estimated_stepping_batches
    if planned == trainer.max_steps:
        planned /= max(1, len(trainer.optimizers))
    return Moment(
        step=optimizer_step(trainer),
        optimizer=", ".join(type(each).__name__ for each in trainer.optimizers),
        num_steps=int(planned) if 0 < planned < math.inf else None,
        is_last=is_last_validation(trainer),
        may_write=trainer.is_global_zero,
    )
