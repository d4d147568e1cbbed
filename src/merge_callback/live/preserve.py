"""Undoes the side effects of an extra validation: on metric objects, plain attributes of modules, what hooks set in
trainer, optimizers and schedulers, and the generators of loaders."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

from merge_callback.live.remember import Memory, numbers_of

_ABSENT = object()


@contextmanager
def preserved_attributes(module: nn.Module) -> Iterator[None]:
    """Resets the module's metric objects inside the context; afterwards restores them and its plain attributes.

    Covers which parameters, buffers, submodules and hooks the module has; and common attributes, also nested: numbers,
    lists, dicts, sets, arrays and tensors up to 1 MiB, random generators, metric objects in the module tree or in plain
    lists, and objects of the user's own classes, such as a meter, with the data on these classes. Does not cover the
    values of parameters and buffers (see `isolated_tensors`) and objects of installed packages.
    """
    with ExitStack() as undo:
        memory = Memory(undo, module)
        memory.remember(module)
        for metric in memory.metrics:
            metric.reset()
        yield


@contextmanager
def preserved_trainer(trainer: Trainer) -> Iterator[None]:
    """Restores what the module's hooks may set outside the module to act on the training.

    Covers the options of optimizers (rates) and which states they have, the state of schedulers, ``requires_grad``, new
    or replaced gradients, and numbers of the trainer (``should_stop``) and of its datamodule. Numbers that a signal
    handler sets in the trainer stay, such as one for a cluster that is about to stop the job.
    """
    with ExitStack() as undo:
        memory = Memory(undo)
        for config in trainer.lr_scheduler_configs:
            memory.remember(config.scheduler)
        for optimizer in trainer.optimizers:
            memory.remember(optimizer.param_groups)
            for container in (optimizer.state, *optimizer.state.values()):
                memory.remember_content(container)
        memory.remember_numbers(getattr(trainer, "datamodule", None))
        numbers = numbers_of(trainer)
        undo.enter_context(_noted_by_signals(trainer, numbers))
        undo.callback(vars(trainer).update, numbers)
        for parameter in trainer.lightning_module.parameters():
            undo.callback(_set_trained, parameter, parameter.requires_grad, parameter.grad, _num_writes(parameter.grad))
        yield


@contextmanager
def preserved_loading(loaders: Iterable[Any]) -> Iterator[None]:
    """Restores numbers, random generators and the order of lists of loaders, samplers, datasets and transforms.

    Only in this process. The data itself is left alone.
    """
    with ExitStack() as undo:
        memory = Memory(undo)
        for loader in loaders:
            for part in _parts(loader):
                memory.remember_loading(part)
        yield


@contextmanager
def preserved_loaders(loaders: Sequence[Any]) -> Iterator[None]:
    """Does what `preserved_loading` does for loaders that are iterated over inside the context."""
    with preserved_loading(loaders), ExitStack() as undo:
        for loader in loaders:
            if getattr(loader, "_iterator", _ABSENT) is None:
                # Persistent workers must not survive: the live validation has to start its own, with its own seed.
                undo.callback(_stop_workers, loader)
        yield


@contextmanager
def _noted_by_signals(owner: object, numbers: dict[str, Any]) -> Iterator[None]:
    """Inside the context, numbers that signal handlers set on ``owner`` are also stored in ``numbers``."""

    def noting(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
        def handle(signal_number: int, frame: FrameType | None) -> None:
            before = numbers_of(owner)
            handler(signal_number, frame)
            numbers.update({name: value for name, value in numbers_of(owner).items() if before.get(name) != value})

        return handle

    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    noted = {number: (handler, noting(handler)) for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        noted = {}
    for number, (_, handle) in noted.items():
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, (handler, handle) in noted.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)


def _set_trained(parameter: nn.Parameter, requires_grad: bool, grad: Tensor | None, version: int) -> None:
    if parameter.requires_grad != requires_grad:
        parameter.requires_grad_(requires_grad)
    if parameter.grad is not grad:
        parameter.grad = grad
    if _num_writes(grad) != version:
        warnings.warn(
            "A validation hook writes to existing gradients. They cannot be restored after the validation of a merge:"
            " if gradients are accumulated over batches, training differs from a run without the merge callback.",
            stacklevel=2,
        )


def _num_writes(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor._version


def _parts(loader: Any) -> Iterator[Any]:
    """Yields a loader, its samplers, and its dataset with all datasets inside it."""
    yield loader
    found = [getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset")]
    for part in found:
        yield part
        inner = getattr(part, "datasets", None)
        found += list(inner) if isinstance(inner, list | tuple) else []
        if (wrapped := getattr(part, "dataset", None)) is not None:
            found.append(wrapped)


def _stop_workers(loader: Any) -> None:
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None
