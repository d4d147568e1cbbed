"""Statistics of batch norm layers for weights that no training step has seen: from the latest training batches."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from merge_callback.preserve import preserved_attributes, preserved_rng


class RecentBatches:
    """Copies of the latest training batches, on the device where they were used.

    Args:
        num_batches: How many.
    """

    def __init__(self, num_batches: int) -> None:
        self._batches: deque[Any] = deque(maxlen=num_batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def append(self, batch: Any) -> None:
        """Takes a copy: loaders may use the memory of their batches again."""
        self._batches.append(apply_to_collection(batch, Tensor, torch.clone))

    def state_dict(self) -> list[Any] | None:
        """The batches; None where they are of classes that a safe load of a checkpoint would refuse."""
        return list(self._batches) if all(map(_is_plain, self._batches)) else None

    def load_state_dict(self, state: list[Any] | None, device: torch.device) -> None:
        """Takes over what `state_dict` gave."""
        self._batches.clear()
        self._batches.extend(move_data_to_device(batch, device) for batch in state or ())


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch norm layers that keep running statistics."""
    return [each for each in module.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]


@torch.no_grad()
def recalibrate_(module: Any, batches: RecentBatches, step_context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Replaces running means and variances by those of the module's present weights, averaged over batches.

    Runs the training step without gradients, as the layers saw their inputs in training. Nothing else changes: random
    states, other buffers, attributes and metric objects of the module are afterwards as before, and nothing is logged.

    Args:
        module: A LightningModule whose training step takes the batches.
        batches: None at all leave the statistics as they are.
        step_context: Made anew around each step, for its precision.

    Raises:
        TypeError: If the module has no training step.
    """
    if not hasattr(module, "training_step"):
        raise TypeError(f"batch norm statistics need a module with a training step, got {type(module).__name__}")
    if not len(batches):
        return
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    norms = batch_norms(module)
    modes = [(each, each.training) for each in module.modules()]
    momenta = [norm.momentum for norm in norms]
    statistics = {id(buffer) for norm in norms for buffer in (norm.running_mean, norm.running_var)}
    others = [(buffer, buffer.clone()) for buffer in module.buffers() if id(buffer) not in statistics]
    with preserved_rng(), preserved_attributes(module), _logging_nothing(module):
        try:
            module.train()
            for norm in norms:
                norm.reset_running_stats()
                # The average of all batches instead of one that forgets.
                norm.momentum = None
            for index, batch in enumerate(batches):
                batch = move_data_to_device(batch, module.device)  # noqa: PLW2901
                with step_context():
                    module.training_step(*((batch, index) if takes_index else (batch,)))
        finally:
            for each, mode in modes:
                each.training = mode
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            for buffer, content in others:
                buffer.copy_(content)


@contextmanager
def _logging_nothing(module: nn.Module) -> Iterator[None]:
    def log(*arguments: Any, **options: Any) -> None:
        pass

    names = ("log", "log_dict")
    own = {name: vars(module)[name] for name in names if name in vars(module)}
    for name in names:
        setattr(module, name, log)
    try:
        yield
    finally:
        for name in names:
            delattr(module, name)
            if name in own:
                setattr(module, name, own[name])


def _is_plain(batch: Any) -> bool:
    if type(batch) in (list, tuple):
        return all(map(_is_plain, batch))
    if type(batch) is dict:
        return all(isinstance(key, str | int) for key in batch) and all(map(_is_plain, batch.values()))
    return batch is None or type(batch) in (Tensor, int, float, bool, str)
