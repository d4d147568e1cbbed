"""Counts the steps of optimizers that a loop calls by itself."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer


class OptimizerSteps:
    """Knows by hooks whether optimizers have stepped, and calls a function before they write to the weights.

    Args:
        before_step: Called before every step of the optimizers. Held weakly: optimizers may live longer.
    """

    def __init__(self, before_step: Callable[[], None]) -> None:
        self._before_step = weakref.WeakMethod(before_step)
        self._optimizers: list[Optimizer] = []
        self._has_stepped = True

    def follow(self, optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
        """Follows these optimizers from now on; returns them without the wrappers of Fabric, Accelerate and others.

        Raises:
            TypeError: If one is no optimizer.
            ValueError: If others are followed already.
        """
        given = [optimizers] if _is_optimizer(optimizers) else list(optimizers)  # type: ignore[arg-type, list-item]
        found = [_unwrapped(each) for each in given]
        if self._optimizers and found != self._optimizers:
            now, before = (", ".join(type(each).__name__ for each in some) for some in (found, self._optimizers))
            raise ValueError(
                f"optimizers must be those of the first step, {before}, got {now}: another run takes another Merger,"
                " which can load the state of this one"
            )
        for optimizer in found if not self._optimizers else []:
            optimizer.register_step_pre_hook(_calling(self._before_step))
            optimizer.register_step_post_hook(_calling(weakref.WeakMethod(self._note)))
        self._optimizers = found
        return found

    def take(self) -> bool:
        """Returns whether an optimizer has stepped since the last call. The first call counts as such."""
        has_stepped, self._has_stepped = self._has_stepped, False
        return has_stepped

    def _note(self) -> None:
        self._has_stepped = True


def _calling(method: "weakref.WeakMethod[Callable[[], None]]") -> Callable[..., None]:
    def call(*arguments: Any, **options: Any) -> None:
        if (found := method()) is not None:
            found()

    return call


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Optimizer) or isinstance(getattr(value, "optimizer", None), Optimizer)


def _unwrapped(optimizer: Any) -> Optimizer:
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizers must be torch.optim.Optimizer, one or several, got {optimizer!r:.80}")
    return optimizer
