"""Merges checkpoints on disk into one.

The checkpoints are read in parts, so memory use does not grow with their number. Tensors of batch norm layers are taken
from the newest checkpoint. An output without a suffix becomes a folder of torch.distributed.checkpoint; under torchrun,
several ranks write one together.

  merge-callback merge 'checkpoints=runs/points/*.ckpt' output=merged.ckpt
  merge-callback merge 'checkpoints=[a.ckpt,b.ckpt]' output=c.safetensors 'coefficients=[0.3,0.7]'
  merge-callback merge 'checkpoints=runs/points/*.ckpt' output=merged.ckpt \\
      'rule={_target_: merge_callback.Window, span_steps: 1000}'
  torchrun --no-python --nproc-per-node=8 merge-callback merge 'checkpoints=runs/points/*.ckpt' output=merged
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from merge_callback.apps.wrong_call import WrongCallError, wrong_calls
from merge_callback.checkpoints.merge import merge_checkpoints
from merge_callback.live.sharding import rank


def run(config: DictConfig) -> None:
    """Merges the checkpoints of the config, and prints the coefficient of each."""
    if missing := OmegaConf.missing_keys(config):
        raise WrongCallError(
            f"{' and '.join(sorted(missing))} must be given, as in\n"
            "  merge-callback merge 'checkpoints=runs/points/*.ckpt' output=merged.ckpt"
        )
    with wrong_calls(), process_group():
        rule = instantiate(config.rule) if OmegaConf.is_config(config.rule) else config.rule
        origin = merge_checkpoints(
            find_checkpoints(config.checkpoints),
            config.output,
            rule,
            coefficients=config.coefficients,
            steps=config.steps,
            newest=config.newest,
            of_averages=config.of_averages,
            progress=rank() == 0,
        )
        if rank() != 0:
            return
    for step, value, name in zip(origin["steps"], origin["coefficients"], origin["checkpoints"], strict=True):
        sys.stdout.write(f"{value:10.6f}  step {step}  {name}\n")
    sys.stdout.write(f"{config.output}\n")


@contextmanager
def process_group() -> Iterator[None]:
    """Connects the processes that ``torchrun`` has started, if there are several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def find_checkpoints(asked: str | Sequence[str]) -> list[str]:
    """Returns the paths that fit a pattern, or any of several patterns or paths."""
    found = []
    for pattern in [asked] if isinstance(asked, str) else asked:
        # The name of a file may contain characters that have a meaning in patterns.
        is_literal = Path(pattern).exists()
        found += [pattern] if is_literal else sorted(glob(pattern)) or [pattern]  # noqa: PTH207
    return found
