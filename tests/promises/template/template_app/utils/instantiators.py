"""Lists of callbacks and loggers from mappings of configs; entries without a target are left out."""

from typing import Any

import hydra
from omegaconf import DictConfig


def instantiate_callbacks(config: DictConfig | None) -> list[Any]:
    return _instantiate(config)


def instantiate_loggers(config: DictConfig | None) -> list[Any]:
    return _instantiate(config)


def _instantiate(config: DictConfig | None) -> list[Any]:
    if not config:
        return []
    entries = [entry for _, entry in config.items() if isinstance(entry, DictConfig) and "_target_" in entry]
    return [hydra.utils.instantiate(entry) for entry in entries]
