"""Learning rates as optimizer steps use them, also where a decay lies over what the schedulers set."""

import math
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

_overlays: WeakKeyDictionary[Optimizer, "RateOverlay"] = WeakKeyDictionary()


class RateOverlay:
    """Multiplies the rates of some optimizers during their steps, and only then.

    Outside ``optimizer.step`` the rates are the schedulers' own, so that schedulers which go on from the current rate
    are not disturbed, and nothing is left behind in checkpoints or after `remove`.

    Args:
        optimizers: Whose rates.
        multiplier: Called at every step of each of them.
        is_decay: Whether the rates count as moved, so that what watches for constant ones sees it. A short lowering of
            them is none.

    Raises:
        ValueError: If an optimizer has no rate to multiply, or its rates are multiplied already.
    """

    def __init__(
        self, optimizers: Iterable[Optimizer], multiplier: Callable[[], float], *, is_decay: bool = True
    ) -> None:
        self.is_decay = is_decay
        self.optimizers = list(optimizers)
        self.multiplier = multiplier
        self.num_steps = 0
        self._set_aside: dict[Optimizer, list[Any]] = {}
        # The step of a subclass that calls its base's may call the hooks once for each.
        self._depth: dict[Optimizer, int] = {}
        for optimizer in self.optimizers:
            name = type(optimizer).__name__
            if not isinstance(optimizer, Optimizer) or any(group.get("lr") is None for group in optimizer.param_groups):
                raise ValueError(f"the optimizer {name} has no learning rate that could be multiplied")
            if optimizer in _overlays:
                raise ValueError(f"the rates of {name} decay already; a run takes one AnnealBranch at a time")
        self._handles = [
            handle
            for optimizer in self.optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            )
        ]
        for optimizer in self.optimizers:
            _overlays[optimizer] = self

    def remove(self) -> None:
        """From here on the rates are the schedulers' own again; after a step that failed, too."""
        for handle in self._handles:
            handle.remove()
        for optimizer in self.optimizers:
            self._restore(optimizer)
            if _overlays.get(optimizer) is self:
                del _overlays[optimizer]

    def _before_step(self, optimizer: Optimizer, *arguments: Any) -> None:
        self._depth[optimizer] = self._depth.get(optimizer, 0) + 1
        if self._depth[optimizer] > 1:
            return
        self.num_steps += 1
        multiplier = self.multiplier()
        rates = [group["lr"] for group in optimizer.param_groups]
        # A rate may be a tensor whose address is in use: it is written in place, and put back exactly.
        self._set_aside[optimizer] = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate.mul_(multiplier) if isinstance(rate, Tensor) else rate * multiplier

    def _after_step(self, optimizer: Optimizer, *arguments: Any) -> None:
        self._depth[optimizer] -= 1
        if self._depth[optimizer] == 0:
            self._restore(optimizer)

    def _restore(self, optimizer: Optimizer) -> None:
        self._depth.pop(optimizer, None)
        for group, rate in zip(optimizer.param_groups, self._set_aside.pop(optimizer, []), strict=False):
            group["lr"] = group["lr"].copy_(rate) if isinstance(rate, Tensor) else rate


def optimizer_step(trainer: Trainer) -> int:
    """Rounds of optimizer steps so far; Lightning counts the steps of all optimizers."""
    return trainer.global_step // max(1, len(trainer.optimizers))


def learning_rates(optimizers: Iterable[Optimizer]) -> list[float]:
    """The rates of all parameter groups, as a step now would use them, but for a short lowering.

    NaN for a schedule-free optimizer, which keeps its real rate to itself.
    """
    return [
        math.nan if "train_mode" in group else float(group["lr"]) * _multiplier(optimizer)
        for optimizer in optimizers
        for group in optimizer.param_groups
        if "lr" in group
    ]


def _multiplier(optimizer: Optimizer) -> float:
    overlay = _overlays.get(optimizer)
    return overlay.multiplier() if overlay is not None and overlay.is_decay else 1.0


def is_overlaid(optimizers: Iterable[Optimizer]) -> bool:
    """Whether something multiplies the rates of one of them already."""
    return any(optimizer in _overlays for optimizer in optimizers)
