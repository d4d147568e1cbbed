"""Contestants that take turns on one clock, alone or at the end of every batch of a real fit."""

import gc
import time
from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from models import Weights

Action = Callable[[], object]


def wait_for_device() -> None:
    """Returns when a GPU that is in use has done all its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Contest:
    """Times several actions in turns; what an action returns is freed on its clock.

    Args:
        actions: Name -> what to time.
        num_warm_up: Rounds before those that count.
        leaving_after: Name -> how many rounds that count an action takes part in; the others take part in all.
    """

    def __init__(
        self, actions: Mapping[str, Action], num_warm_up: int, leaving_after: Mapping[str, int] | None = None
    ) -> None:
        self.actions = actions
        self.num_warm_up = num_warm_up
        self.leaving_after = leaving_after or {}
        self.seconds: dict[str, list[float]] = {name: [] for name in actions}

    def round(self) -> None:
        """Every action once, in their order."""
        # A collection would count for whoever happens to allocate next.
        gc.disable()
        try:
            for name, action in self.actions.items():
                if len(self.counted[name]) == self.leaving_after.get(name):
                    continue
                wait_for_device()
                began = time.perf_counter()
                action()
                wait_for_device()
                self.seconds[name].append(time.perf_counter() - began)
        finally:
            gc.enable()

    @property
    def counted(self) -> dict[str, list[float]]:
        """Seconds of every round but the warm-up, by action."""
        return {name: seconds[self.num_warm_up :] for name, seconds in self.seconds.items()}


def take_turns(
    actions: Mapping[str, Action], num_rounds: int, num_warm_up: int, leaving_after: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """Seconds of every counted round, by action."""
    contest = Contest(actions, num_warm_up, leaving_after)
    with torch.no_grad():
        for _ in range(num_warm_up + num_rounds):
            contest.round()
    return contest.counted


class _RoundAtBatchEnd(Callback):
    def __init__(self) -> None:
        self.contest: Contest | None = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        assert self.contest is not None
        self.contest.round()


def held(callback: Callback) -> Callback:
    """The callback, whose hook at the end of a batch waits for the contest to call it."""
    callback.on_train_batch_end = lambda *arguments: None
    return callback


def batch_end(callback: Callback, trainer: Trainer, module: LightningModule) -> Action:
    """What a `held` callback does at the end of a batch."""
    hook = type(callback).on_train_batch_end
    return lambda: hook(callback, trainer, module, None, None, 0)


def quiet_trainer(num_steps: int, callbacks: list[Callback], accelerator: str) -> Trainer:
    """A trainer that trains for so many steps and does nothing else."""
    return Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=num_steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def take_turns_in_fit(
    module: Weights,
    callbacks: list[Callback],
    actions: Callable[[Trainer], Mapping[str, Action]],
    num_rounds: int,
    num_warm_up: int,
) -> dict[str, list[float]]:
    """The same, one round at the end of each batch of a fit.

    Args:
        module: What is trained, on its device.
        callbacks: Those whose hooks compete, `held`.
        actions: The contestants, given the trainer.
        num_rounds: Rounds that count.
        num_warm_up: Rounds before them.
    """
    rounds = _RoundAtBatchEnd()
    trainer = quiet_trainer(num_warm_up + num_rounds, [*map(held, callbacks), rounds], module.device.type)
    rounds.contest = Contest(actions(trainer), num_warm_up)
    trainer.fit(module)
    return rounds.contest.counted
