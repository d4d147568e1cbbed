"""Trains a stable run at a constant rate, with real anneals that branch off."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from merge_callback.apps.train import Run, prepare
from merge_callback.live.observe import validation_follows
from merge_callback.prediction.bias import MIN_BRANCHES
from merge_callback.prediction.records import AnnealRecord, read_records


class CheckpointAt(Callback):
    """Saves ``step-<number>.ckpt`` after certain optimizer steps, and after the validation if one is due then."""

    def __init__(self, folder: Path, steps: Iterable[int]) -> None:
        self.folder = folder
        self.steps = set(steps)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        if not validation_follows(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}.ckpt", weights_only=False)


def describe(run: Run, say: Callable[[str], None]) -> None:
    """Prints the corpus and the sizes of data and model."""
    corpus, num_parameters = run.data.corpus, sum(parameter.numel() for parameter in run.model.parameters())
    say(f"Corpus: {corpus.description}")
    say(f"{len(corpus.train):,} bytes to train on, {len(corpus.validation):,} kept back; {num_parameters:,} parameters")


def anneal_ends(config: DictConfig) -> list[int]:
    """Returns the steps within the run at which branches end; empty if too few to calibrate and check predictions."""
    ends = sorted(end for end in config.demo.anneal_at if end <= config.trainer.max_steps)
    return ends if len(ends) > MIN_BRANCHES else []


def run_with_anneals(config: DictConfig, folder: Path, say: Callable[[str], None]) -> tuple[Run, list[AnnealRecord]]:
    """Trains a stable run, and really anneals branches of it that end at the steps in ``demo.anneal_at``.

    The stable run stops where the last branch but one ends. Then all branches but the last are annealed, and they
    calibrate the predictions of the run when it continues. The last branch is annealed after the run, and shows how
    good the prediction was.

    Args:
        config: A config such as ``commands/demo.yaml``.
        folder: Folder for checkpoints and records.
        say: Prints a line for the user.

    Returns:
        The stable run, and the records of its branches.
    """
    ends = {end: max(1, round(end * config.demo.anneal_span)) for end in anneal_ends(config)}
    *earlier, last = ends
    record, checkpoints = folder / "anneals.jsonl", folder / "checkpoints"
    keeper = CheckpointAt(checkpoints, (end - span_steps for end, span_steps in ends.items()))

    def anneal(end: int) -> None:
        branch = config.copy()
        start = checkpoints / f"step-{end - ends[end]}.ckpt"
        settings = {"from": str(start), "span_steps": ends[end], "span": None, "record": str(record)}
        if end == last:
            # The stable run completes the records of the other branches when it continues.
            settings["trunk"] = str(checkpoints / f"step-{end}.ckpt")
        OmegaConf.update(branch, "anneal", settings, force_add=True)
        branch.callbacks.progress_bar = None
        say(f"Annealing for real: from step {end - ends[end]} to step {end}")
        with _quiet():
            prepare(branch, loggers=(), enable_progress_bar=False, val_check_interval=10**9).fit()

    keeper.steps |= {earlier[-1], last}
    run = prepare(config, [keeper], max_steps=earlier[-1])
    describe(run, say)
    run.fit()
    for end in earlier:
        anneal(end)
    say(f"The stable run continues from step {earlier[-1]}, with a calibrated prediction")
    run = prepare(config, [keeper], loggers=run.trainer.loggers, checkpoint=checkpoints / f"step-{earlier[-1]}.ckpt")
    run.fit()
    anneal(last)
    return run, read_records(record)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the callbacks' info lines about a branch, which would hide those about the stable run."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
