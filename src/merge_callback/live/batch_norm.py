"""Recalibrates batch norm statistics for merged weights from the latest training inputs."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from merge_callback.live.isolate import isolated_tensors
from merge_callback.live.names import clean_name
from merge_callback.live.preserve import preserved_attributes
from merge_callback.live.random_states import preserved_rng
from merge_callback.live.sharding import all_reduce_sum, is_shard
from merge_callback.live.weights import has_lazy_parameters
from merge_callback.utilities.messages import Messages


class RecentInputs:
    """A rolling buffer with copies of the latest training inputs, on the device where they were used.

    Args:
        num_batches: Number of batches to keep.
    """

    def __init__(self, num_batches: int) -> None:
        self._inputs: deque[Any] = deque(maxlen=num_batches)
        # Clean names of the submodules that were in training mode for the latest batch.
        self.in_training: set[str] = set()
        self._modes: list[tuple[str, bool]] = []

    def __len__(self) -> int:
        return len(self._inputs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._inputs)

    @property
    def is_plain(self) -> bool:
        """Whether ``weights_only=True`` can load all inputs: tensors, numbers and strings in lists and dicts."""
        return all(map(_is_plain, self._inputs))

    def append(self, module: nn.Module, batch: Any) -> None:
        """Copies the inputs of a batch, since loaders may reuse the memory, and records which submodules are training.

        Args:
            module: The model that is about to train on the batch.
            batch: If it is a list or tuple, its first item is the input; otherwise the whole batch is.
        """
        # Cleaning all names is slow and the modes rarely change, so names are cleaned only after a change.
        if (modes := [(name, each.training) for name, each in module.named_modules()]) != self._modes:
            self._modes = modes
            self.in_training = {clean_name(name) for name, is_training in modes if is_training}
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        self._inputs.append(apply_to_collection(inputs, Tensor, torch.clone))

    def clear(self) -> None:
        """Drops all inputs."""
        self._inputs.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns the training modes, and the inputs if they are plain (`is_plain`)."""
        inputs = list(self._inputs) if self.is_plain else []
        return {"inputs": inputs, "in_training": sorted(self.in_training)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restores the result of `state_dict`, with the inputs on ``device``."""
        self.clear()
        self._inputs.extend(move_data_to_device(inputs, device) for inputs in state["inputs"])
        self.in_training, self._modes = set(state["in_training"]), []


class Recalibration:
    """Keeps the latest training inputs and recalibrates the batch norm statistics of a merge with them.

    Args:
        num_batches: Number of batches to use. None turns recalibration off.
        messages: Where warnings go.
    """

    def __init__(self, num_batches: int | None, messages: Messages) -> None:
        self.num_batches = num_batches
        self.inputs = RecentInputs(num_batches or 0)
        self._messages = messages
        self._step_context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._is_tried = False

    def begin(self, trainer: Trainer) -> None:
        """Starts a new fit, in the trainer's precision."""
        self._step_context = trainer.precision_plugin.train_step_context
        self._is_tried = False

    def check(self, module: LightningModule) -> None:
        """Raises ValueError if the module has no batch norm layers, or its training step takes ``dataloader_iter``."""
        if self.num_batches is None:
            return
        if not batch_norms(module):
            raise ValueError(f"recalibrate_batches is for batch norm layers, of which {type(module).__name__} has none")
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise ValueError("recalibrate_batches needs a training step that takes batches, not dataloader_iter")

    def explain(self, module: nn.Module) -> None:
        """Tells the user of batch norm layers whose statistics are not recalibrated."""
        if self.num_batches is None and (num := len(batch_norms(module))):
            self._messages.say(
                f"merges take batch norm statistics, here of {num} layer{'s' if num > 1 else ''}, from the newest"
                " snapshot; recalibrate_batches=10 calculates them anew for the merged weights",
                "batch norm",
            )

    def remember(self, module: nn.Module, batch: Any, *, is_saved: bool) -> None:
        """Keeps the inputs of a batch that the module is about to train on.

        Args:
            module: The live model.
            batch: The batch that the training step gets.
            is_saved: Whether checkpoints should contain the inputs.

        Raises:
            ValueError: If the module cannot be called with the inputs. Tried only with the first batch, so that the
                error comes before hours of training.
        """
        if self.num_batches is None:
            return
        self.inputs.append(module, batch)
        if not self._is_tried and not has_lazy_parameters(module):
            self._is_tried = True
            batch_statistics(module, self.inputs, self._step_context)
        if is_saved and not self.inputs.is_plain:
            self._messages.warn(
                "inputs other than tensors, numbers and strings in lists and dicts do not go into checkpoints; after a"
                f" resume, batch norm statistics come from fewer than {self.num_batches} batches until that many have"
                " been trained on",
                "inputs",
            )

    def apply_(self, module: nn.Module) -> None:
        """Calls `recalibrate_` on the module, unless ``num_batches`` is None."""
        if self.num_batches is not None:
            recalibrate_(module, self.inputs, self._step_context)


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Returns the batch norm layers that keep running statistics."""
    return [each for each in module.modules() if _keeps_statistics(each)]


@torch.no_grad()
def recalibrate_(
    module: nn.Module, inputs: RecentInputs, step_context: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Replaces running means and variances with those of the module's present weights, averaged over the inputs.

    Makes forward passes in training mode, as `torch.optim.swa_utils.update_bn` does. Layers that training keeps in
    evaluation mode, and layers that no input reaches, keep their statistics. Nothing else changes: random states, other
    buffers, modes, attributes and metric objects of the module are restored, and nothing is logged.

    Args:
        module: The model, called once with each input.
        inputs: The inputs. Those with NaN or inf are skipped. Without inputs the statistics stay as they are.
        step_context: Called for a new context around each forward pass, which sets its precision.

    Raises:
        ValueError: If a forward pass fails.
    """
    for norm, statistics in batch_statistics(module, inputs, step_context):
        for name, values in statistics.items():
            norm.get_buffer(name).copy_(values)


@torch.no_grad()
def batch_statistics(
    module: nn.Module, inputs: RecentInputs, step_context: Callable[[], AbstractContextManager[Any]]
) -> list[tuple[_BatchNorm, dict[str, Tensor]]]:
    """Returns what `recalibrate_` writes: each batch norm layer with its new running mean and variance.

    The dict of a layer that no input reaches is empty.
    """
    named = [(clean_name(name), each) for name, each in module.named_modules()]
    modes = [(each, each.training) for _, each in named]
    norms = [each for name, each in named if name in inputs.in_training and _keeps_statistics(each)]
    if not len(inputs) or not norms:
        return []
    device = next(module.parameters()).device
    momenta = [norm.momentum for norm in norms]
    communicates = any(map(is_shard, module.parameters())) or any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    # With swapped tensors, a checkpoint that a signal handler saves meanwhile still gets the live ones.
    with preserved_rng(), preserved_attributes(module), isolated_tensors(module):
        # Set on the instance: `preserved_attributes` removes them at the end of the block.
        module.log = module.log_dict = _log_nothing  # type: ignore[assignment]
        try:
            for name, each in named:
                each.training = name in inputs.in_training
            for norm in norms:
                norm.reset_running_stats()
                # None makes torch average all batches equally, instead of exponentially.
                norm.momentum = None
            for batch in inputs:
                own = apply_to_collection(move_data_to_device(batch, device), Tensor, torch.clone)
                is_bad = not _is_finite(own)
                # If forward passes communicate, a rank that skips one alone would leave the others waiting.
                if bool(all_reduce_sum(torch.tensor(float(is_bad)))) if communicates else is_bad:
                    continue
                with step_context():
                    _call(module, own)
            return [(norm, _statistics(norm)) for norm in norms]
        finally:
            for each, mode in modes:
                each.training = mode
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _call(module: nn.Module, inputs: Any) -> None:
    try:
        module(inputs)
    except Exception as error:
        raise ValueError(
            f"recalibrate_batches calls {type(module).__name__} with the first item of a training batch that is a list"
            f" or tuple, else with the batch, which failed: {type(error).__name__}: {error}"
        ) from error


def _log_nothing(*arguments: Any, **options: Any) -> None:
    pass


def _is_finite(inputs: Any) -> bool:
    found: list[Tensor] = []
    apply_to_collection(inputs, Tensor, found.append)
    return all(bool(tensor.isfinite().all()) for tensor in found if tensor.is_floating_point())


def _keeps_statistics(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(module, _BatchNorm) and bool(module.track_running_stats)


def _statistics(norm: _BatchNorm) -> dict[str, Tensor]:
    """Returns copies of a layer's statistics; an empty dict if the layer saw no input."""
    assert norm.num_batches_tracked is not None
    if norm.num_batches_tracked == 0:
        return {}
    return {name: norm.get_buffer(name).clone() for name in ("running_mean", "running_var")}


def _is_plain(inputs: Any) -> bool:
    if type(inputs) in (list, tuple):
        return all(map(_is_plain, inputs))
    if type(inputs) is dict:
        return all(isinstance(key, str | int) for key in inputs) and all(map(_is_plain, inputs.values()))
    return inputs is None or type(inputs) in (Tensor, int, float, bool, str)
