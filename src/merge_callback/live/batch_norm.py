"""Statistics of batch norm layers for weights that no training step has seen: from the latest training inputs."""

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

from merge_callback.live.names import clean_name
from merge_callback.live.preserve import preserved_attributes, preserved_rng
from merge_callback.live.sharding import all_reduce_sum, is_shard, local_clones
from merge_callback.live.swap import swapped_weights
from merge_callback.live.weights import has_lazy_parameters
from merge_callback.utilities.messages import Messages


class RecentInputs:
    """Copies of the latest inputs of a model in training, on the device where they were used.

    Args:
        num_batches: How many.
    """

    def __init__(self, num_batches: int) -> None:
        self._inputs: deque[Any] = deque(maxlen=num_batches)
        # Clean names of the submodules that were in training mode for the latest of them.
        self.in_training: set[str] = set()
        self._modes: list[tuple[str, bool]] = []

    def __len__(self) -> int:
        return len(self._inputs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._inputs)

    @property
    def is_plain(self) -> bool:
        """Whether a safe load of a checkpoint would take them: tensors, numbers and strings in lists and dicts."""
        return all(map(_is_plain, self._inputs))

    def append(self, module: nn.Module, batch: Any) -> None:
        """Takes a copy of a batch's inputs, since loaders use their memory again, and note of the module's modes.

        Args:
            module: The model, which is about to be trained on the batch.
            batch: The first item of what is a list or tuple is the input, else all of it.
        """
        # To clean the names takes longer than to go through them, and modes hardly ever change.
        if (modes := [(name, each.training) for name, each in module.named_modules()]) != self._modes:
            self._modes = modes
            self.in_training = {clean_name(name) for name, is_training in modes if is_training}
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        self._inputs.append(apply_to_collection(inputs, Tensor, torch.clone))

    def clear(self) -> None:
        """Forgets them."""
        self._inputs.clear()

    def state_dict(self) -> dict[str, Any]:
        """The modes, and the inputs where they are plain."""
        inputs = list(self._inputs) if self.is_plain else []
        return {"inputs": inputs, "in_training": sorted(self.in_training)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Takes over what `state_dict` gave."""
        self.clear()
        self._inputs.extend(move_data_to_device(inputs, device) for inputs in state["inputs"])
        self.in_training, self._modes = set(state["in_training"]), []


class Recalibration:
    """Keeps the latest training inputs, and finds the statistics of a merge from them.

    Args:
        num_batches: From how many batches; None does nothing.
        messages: For the user.
    """

    def __init__(self, num_batches: int | None, messages: Messages) -> None:
        self.num_batches = num_batches
        self.inputs = RecentInputs(num_batches or 0)
        self._messages = messages
        self._step_context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._is_tried = False

    def begin(self, trainer: Trainer) -> None:
        """Another fit, in the trainer's precision."""
        self._step_context = trainer.precision_plugin.train_step_context
        self._is_tried = False

    def check(self, module: LightningModule) -> None:
        """Raises `ValueError` if the module has nothing to recalibrate, or no inputs that could be kept."""
        if self.num_batches is None:
            return
        if not batch_norms(module):
            raise ValueError(f"recalibrate_batches is for batch norm layers, of which {type(module).__name__} has none")
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise ValueError("recalibrate_batches needs a training step that takes batches, not dataloader_iter")

    def remember(self, module: nn.Module, batch: Any, *, is_saved: bool) -> None:
        """Keeps the inputs of a batch that the module is about to be trained on.

        Args:
            module: The live model.
            batch: As its training step gets it.
            is_saved: Whether checkpoints are to hold them.

        Raises:
            ValueError: If the module cannot be called with them; the first time, before hours of training.
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
                f" resume batch norm statistics are those of {self.num_batches} batches only once so many have been"
                " trained on",
                "inputs",
            )

    def apply_(self, module: nn.Module) -> None:
        """`recalibrate_`, where it is asked for."""
        if self.num_batches is not None:
            recalibrate_(module, self.inputs, self._step_context)


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch norm layers that keep running statistics."""
    return [each for each in module.modules() if _keeps_statistics(each)]


@torch.no_grad()
def recalibrate_(
    module: nn.Module, inputs: RecentInputs, step_context: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Replaces running means and variances by those of the module's present weights, averaged over inputs.

    As `torch.optim.swa_utils.update_bn` does, by forward passes as in training. Layers that are kept in evaluation mode
    there, and layers that none of the inputs reach, keep what they have. Nothing else changes: random states, other
    buffers, modes, attributes and metric objects of the module are afterwards as before, and nothing is logged.

    Args:
        module: Called with each of the inputs; those that are not finite are left out.
        inputs: None at all leave the statistics as they are.
        step_context: Made anew around each pass, for its precision.

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
    """What `recalibrate_` writes: for each layer that the inputs reach, its running mean and variance."""
    named = [(clean_name(name), each) for name, each in module.named_modules()]
    modes = [(each, each.training) for _, each in named]
    norms = [each for name, each in named if name in inputs.in_training and _keeps_statistics(each)]
    if not len(inputs) or not norms:
        return []
    device = next(module.parameters()).device
    momenta = [norm.momentum for norm in norms]
    communicates = any(map(is_shard, module.parameters())) or any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    buffers = dict(module.named_buffers())
    # A checkpoint that a signal handler saves meanwhile has all live buffers.
    with preserved_rng(), preserved_attributes(module), swapped_weights(buffers, local_clones(buffers)):
        # Attributes of the instance, which do not outlast this block.
        module.log = module.log_dict = _log_nothing  # type: ignore[assignment]
        try:
            for name, each in named:
                each.training = name in inputs.in_training
            for norm in norms:
                norm.reset_running_stats()
                # The average of all batches instead of one that forgets.
                norm.momentum = None
            for batch in inputs:
                own = apply_to_collection(move_data_to_device(batch, device), Tensor, torch.clone)
                is_bad = not _is_finite(own)
                # Where a forward pass communicates, all ranks have to make it, or none.
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
    """What a layer has found; nothing if it saw no input."""
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
