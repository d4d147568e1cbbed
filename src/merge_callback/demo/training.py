"""A run as a config describes it, and a branch of one: what every program that trains the demo's model shares."""

import warnings
from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig

from merge_callback.anneal import AnnealBranch


@dataclass(frozen=True)
class Run:
    """All that a fit needs."""

    trainer: Trainer
    model: LightningModule
    data: Any
    checkpoint: str | None

    def fit(self) -> None:
        """Trains to the end."""
        # Lightning has not followed a deprecation in torch yet; nobody who tries the demo can do anything about it.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
            self.trainer.fit(self.model, self.data, ckpt_path=self.checkpoint)


def prepare(config: DictConfig, callbacks: list[Callback] | None = None) -> Run:
    """Makes a run out of the config's entries.

    ``anneal.from`` makes it a branch: resumed from that checkpoint, with a decay to zero over ``anneal.span``.

    Args:
        config: As ``conf/demo.yaml``.
        callbacks: More callbacks than the config's.
    """
    seed_everything(config.demo.seed, verbose=False)
    data = instantiate(config.data)
    model = instantiate(config.model)
    # Entries without a target, such as overrides of a callback that is switched off, are left out.
    listed = [instantiate(entry) for entry in config.callbacks.values() if entry and "_target_" in entry]
    checkpoint, options = config.resume_from, {}
    if (start := config.anneal["from"]) is not None:
        settings = {name: value for name, value in config.anneal.items() if name != "from"}
        listed.append(AnnealBranch(**settings))
        # The branch stops by itself.
        checkpoint, options = start, {"max_steps": -1, "max_epochs": -1}
    loggers = [instantiate(entry) for entry in config.logger.values()]
    trainer = instantiate(config.trainer, callbacks=listed + (callbacks or []), logger=loggers, **options)
    return Run(trainer, model, data, checkpoint)
