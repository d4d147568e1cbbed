"""Trains the model of a Hydra config to the end, or anneals a branch of its run.

The entries are those of a common Lightning template, each with a ``_target_``. Entries under ``anneal`` are arguments
of `AnnealBranch`, except ``from``, the checkpoint where the branch begins. An anneal is a decay of the learning rate
to zero.

  merge-callback train --config-dir conf --config-name train callbacks/merge=pma
  merge-callback train --config-dir conf --config-name train \\
      +anneal.from=step-9000.ckpt +anneal.span=0.1 +anneal.record=anneals.jsonl
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from merge_callback.apps.wrong_call import ConfigError
from merge_callback.callbacks.anneal_branch import AnnealBranch


@dataclass(frozen=True)
class Run:
    """All that a fit needs: trainer, model, data, and the checkpoint to continue from, if any."""

    trainer: Trainer
    model: LightningModule
    data: Any
    checkpoint: str | Path | None

    def fit(self) -> None:
        """Trains to the end."""
        self.trainer.fit(self.model, self.data, ckpt_path=self.checkpoint)


def prepare(
    config: DictConfig,
    callbacks: Sequence[Callback] = (),
    *,
    loggers: Sequence[Logger] | None = None,
    checkpoint: str | Path | None = None,
    **trainer_options: Any,
) -> Run:
    """Builds a run from the config's entries.

    Args:
        config: The config, with the entries that the command takes.
        callbacks: Callbacks in addition to the config's.
        loggers: Loggers in place of the config's; None takes the config's.
        checkpoint: Checkpoint to continue from; None takes the config's ``resume_from``.
        **trainer_options: Arguments of the trainer in place of the config's.

    Raises:
        ConfigError: If an entry is missing, a group is mistyped, or ``anneal.from`` does not exist.
    """
    if missing := [name for name in ("model", "trainer") if name not in config]:
        raise ConfigError(f"the config has no entry {missing[0]!r}; give one with --config-dir and --config-name")
    if mistyped := [name for name in config if "/" in str(name)]:
        # Hydra adds a group that it does not know (``+group=name``) as a plain key.
        raise ConfigError(f"there is no config group {mistyped[0]!r}; the one of MergeCallback is callbacks/merge")
    if config.get("seed") is not None:
        seed_everything(config.seed, verbose=False)
    source = config.get("data", config.get("datamodule"))
    data = instantiate(source) if source is not None else None
    model = instantiate(config.model)
    # Entries without a target, such as overrides of a callback that is switched off, are left out.
    listed = _instantiated(config.get("callbacks"))
    checkpoint = checkpoint or config.get("resume_from")
    anneal = dict(config.get("anneal") or {})
    if (start := anneal.pop("from", None)) is not None:
        if not Path(start).exists():
            raise ConfigError(f"anneal.from must be a checkpoint of a run, got {start!r}")
        if anneal.get("span") is None and anneal.get("span_steps") is None:
            raise ConfigError("anneal.from needs anneal.span, a share of the steps, or anneal.span_steps")
        listed.append(AnnealBranch(**anneal))
        # No limits from the config: the branch stops by itself.
        checkpoint, trainer_options = start, {"max_steps": -1, "max_epochs": -1, **trainer_options}
    elif any(anneal.get(name) is not None for name in ("span", "span_steps")):
        raise ConfigError("anneal.span and anneal.span_steps need anneal.from, the checkpoint to branch from")
    if loggers is None:
        loggers = _instantiated(config.get("logger"))
    trainer = instantiate(config.trainer, callbacks=[*listed, *callbacks], logger=list(loggers), **trainer_options)
    return Run(trainer, model, data, checkpoint)


def run(config: DictConfig) -> None:
    """Trains to the end, or to the end of the branch."""
    prepare(config).fit()


def _instantiated(entries: DictConfig | None) -> list[Any]:
    return [
        instantiate(entry) for entry in (entries or {}).values() if OmegaConf.is_dict(entry) and "_target_" in entry
    ]
