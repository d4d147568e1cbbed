"""What the server of `processes` imports once for all processes of a test's own."""

# ruff: noqa: F401
import hydra
import lightning.pytorch
import matplotlib.figure
import tensorboard
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torchmetrics

import merge_callback.apps.cli
from tests.helpers import sharded_toys, toys
