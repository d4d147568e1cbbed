"""`merge-callback-merge`: checkpoints on disk merged into one."""

import sys
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from merge_callback.checkpoints.merge import merge_checkpoints


@hydra.main(version_base="1.3", config_path="pkg://merge_callback.apps.conf", config_name="merge")
def main(config: DictConfig) -> None:
    """The command ``merge-callback-merge``."""
    if missing := OmegaConf.missing_keys(config):
        sys.exit(
            f"merge-callback-merge: {' and '.join(sorted(missing))} must be given, as in\n"
            "  merge-callback-merge checkpoints='runs/trunk/*.ckpt' output=merged.ckpt"
        )
    rule = instantiate(config.rule) if OmegaConf.is_config(config.rule) else config.rule
    try:
        origin = merge_checkpoints(
            find_checkpoints(config.checkpoints),
            config.output,
            rule,
            coefficients=config.coefficients,
            steps=config.steps,
            newest=config.newest,
            progress=True,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"merge-callback-merge: {error}")
    for step, value, name in zip(origin["steps"], origin["coefficients"], origin["checkpoints"], strict=True):
        sys.stdout.write(f"{value:10.6f}  step {step}  {name}\n")
    sys.stdout.write(f"{config.output}\n")


def find_checkpoints(asked: str | Sequence[str]) -> list[str]:
    """Paths that fit a pattern, or any of several patterns or paths."""
    found = []
    for pattern in [asked] if isinstance(asked, str) else asked:
        # A name may hold what means something in a pattern.
        is_literal = Path(pattern).exists()
        found += [pattern] if is_literal else sorted(glob(pattern)) or [pattern]  # noqa: PTH207
    return found


if __name__ == "__main__":
    main()
