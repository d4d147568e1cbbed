"""Learning rates as the optimizer steps use them, including a decay on top of the schedulers' rates."""

import math
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

_overlays: WeakKeyDictionary[Optimizer, "RateOverlay"] = WeakKeyDictionary()


class RateOverlay:
    """Multiplies the learning rates of optimizers, only while they step.

    Outside ``optimizer.step`` the rates are the schedulers' own. So schedulers that compute the next rate from the
    current one are not disturbed, and nothing is left in checkpoints, also those saved inside a step, or after
    `remove`.

    Args:
        optimizers: Optimizers whose rates are multiplied.
        multiplier: Returns the factor; called at every step of every optimizer.
        is_decay: Whether `learning_rates` includes the factor, so that the rates no longer count as constant. False for
            a short reduction, such as after a loss spike.

    Raises:
        ValueError: If an optimizer has no learning rate, or another decay already multiplies its rates. A short
            reduction ends when a decay begins.
    """

    def __init__(
        self, optimizers: Iterable[Optimizer], multiplier: Callable[[], float], *, is_decay: bool = True
    ) -> None:
        self.is_decay = is_decay
        self.optimizers = list(optimizers)
        self.multiplier = multiplier
        self.num_steps = 0
        self._set_aside: dict[Optimizer, list[Any]] = {}
        # The hooks may run twice per step if the step of a subclass calls that of its base; only the outer one counts.
        self._depth: dict[Optimizer, int] = {}
        for optimizer in self.optimizers:
            name = type(optimizer).__name__
            if not isinstance(optimizer, Optimizer) or any(group.get("lr") is None for group in optimizer.param_groups):
                raise ValueError(f"the optimizer {name} has no learning rate that could be multiplied")
            if (present := _overlays.get(optimizer)) is not None and is_decay and not present.is_decay:
                present.remove()
            if optimizer in _overlays:
                raise ValueError(f"the rates of {name} decay already; a run takes one AnnealBranch at a time")
        self._handles = [
            handle
            for optimizer in self.optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
                optimizer.register_state_dict_post_hook(self._with_own_rates),
            )
        ]
        for optimizer in self.optimizers:
            _overlays[optimizer] = self

    def remove(self) -> None:
        """Stops multiplying and restores the schedulers' rates, also after a step that failed."""
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
        # A tensor rate may be in use by address, so it is written in place and restored exactly.
        self._set_aside[optimizer] = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate.mul_(multiplier) if isinstance(rate, Tensor) else rate * multiplier

    def _after_step(self, optimizer: Optimizer, *arguments: Any) -> None:
        self._depth[optimizer] -= 1
        if self._depth[optimizer] == 0:
            self._restore(optimizer)

    def _with_own_rates(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        # Lightning runs `training_step` inside `optimizer.step`, and a cluster's signal handler may save the run there.
        for group, rate in zip(state["param_groups"], self._set_aside.get(optimizer, []), strict=False):
            group["lr"] = rate
        return state

    def _restore(self, optimizer: Optimizer) -> None:
        self._depth.pop(optimizer, None)
        for group, rate in zip(optimizer.param_groups, self._set_aside.pop(optimizer, []), strict=False):
            group["lr"] = group["lr"].copy_(rate) if isinstance(rate, Tensor) else rate


def optimizer_step(trainer: Trainer) -> int:
    """Returns the steps of one optimizer so far. Lightning's ``global_step`` counts the steps of all optimizers."""
    return trainer.global_step // max(1, len(trainer.optimizers))


def learning_rates(optimizers: Iterable[Optimizer]) -> list[float]:
    """Returns the rate that a step would use now for each parameter group, without short reductions (`is_decay` False).

    The rate of a schedule-free optimizer is NaN, since its effective rate is internal.
    """
    return [
        math.nan if "train_mode" in group else float(group["lr"]) * _multiplier(optimizer)
        for optimizer in optimizers
        for group in optimizer.param_groups
        if "lr" in group
    ]


def rate_updates(trainer: Trainer) -> list[int]:
    """Returns how often each scheduler has set the rates. Those that react to a metric are left out."""
    return [_num_updates(config, trainer) for config in _scheduled(trainer)]


def _num_updates(config: Any, trainer: Trainer) -> int:
    count = getattr(config.scheduler, "last_epoch", None)
    if isinstance(count, int):
        return count
    return (trainer.current_epoch if config.interval == "epoch" else optimizer_step(trainer)) // config.frequency


def are_updates_over(trainer: Trainer) -> bool:
    """Returns whether some scheduler, of those that react to no metric, will not set its rates again in this run."""
    return any(_is_over(config, trainer) for config in _scheduled(trainer))


def _scheduled(trainer: Trainer) -> list[Any]:
    return [config for config in trainer.lr_scheduler_configs if not config.reduce_on_plateau]


def _is_over(config: Any, trainer: Trainer) -> bool:
    every, max_epochs = config.frequency, trainer.max_epochs
    if config.interval == "epoch":
        following = (trainer.current_epoch // every + 1) * every
        if max_epochs is not None and following >= max_epochs >= 0:
            return True
        num_batches = trainer.num_training_batches
        in_epoch = math.ceil(num_batches / trainer.accumulate_grad_batches) if num_batches < math.inf else math.inf
        # An epoch of unknown length is a stream, which rarely ends before the run does.
        steps = following * in_epoch
    else:
        steps = (optimizer_step(trainer) // every + 1) * every
    return -1 < trainer.max_steps <= steps * max(1, len(trainer.optimizers))


def _multiplier(optimizer: Optimizer) -> float:
    overlay = _overlays.get(optimizer)
    return overlay.multiplier() if overlay is not None and overlay.is_decay else 1.0


def is_overlaid(optimizers: Iterable[Optimizer]) -> bool:
    """Returns True if a `RateOverlay` multiplies the rates of one of the optimizers."""
    return any(optimizer in _overlays for optimizer in optimizers)
