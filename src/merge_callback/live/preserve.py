"""Undoes the side effects of an extra validation: on metric objects, plain attributes of modules, what hooks set in
trainer, optimizers and schedulers, and the generators of loaders."""

import operator
import signal
import sys
import sysconfig
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric, MetricCollection

from merge_callback.live.random_states import remember_generator

# Plain tensors up to this size (sums, counters) are restored; larger ones are assumed to be constant data.
MAX_TENSOR_BYTES = 2**20
# Lists and dicts up to this length are restored.
MAX_ITEMS = 100_000
# How deep nested containers and objects are followed.
MAX_DEPTH = 4
# Folders of installed packages; classes that are defined there are not the user's own.
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_NOT_THE_USERS = ("torch", "torchmetrics", "lightning", "pytorch_lightning", "merge_callback")
# Attributes of every module: this file does not restore parameters, submodules and hooks.
_MODULE_MACHINERY = frozenset(vars(nn.Module()))
_ABSENT = object()


@contextmanager
def preserved_attributes(module: nn.Module) -> Iterator[None]:
    """Resets the module's metric objects inside the context; afterwards restores them and its plain attributes.

    Covers common attributes, also nested: numbers, lists, dicts, sets, arrays and tensors up to 1 MiB, random
    generators, replaced buffers, metric objects in the module tree or in plain lists, and objects of the user's own
    classes, such as a meter. Does not cover objects of installed packages.
    """
    with ExitStack() as undo:
        memory = _Memory(undo, own_package=_own_package(type(module)))
        memory.remember(module)
        for metric in memory.metrics:
            metric.reset()
        yield


@contextmanager
def preserved_trainer(trainer: Trainer) -> Iterator[None]:
    """Restores what the module's hooks may set outside the module to act on the training.

    Covers the options of optimizers (rates), the state of schedulers, ``requires_grad``, new or replaced gradients, and
    numbers of the trainer (``should_stop``) and of its datamodule. Numbers that a signal handler sets in the trainer
    stay, such as one for a cluster that is about to stop the job.
    """
    with ExitStack() as undo:
        memory = _Memory(undo)
        for config in trainer.lr_scheduler_configs:
            memory.remember(config.scheduler)
        for optimizer in trainer.optimizers:
            memory.remember(optimizer.param_groups)
        memory.remember_numbers(getattr(trainer, "datamodule", None))
        numbers = _numbers(trainer)
        undo.enter_context(_noted_by_signals(trainer, numbers))
        undo.callback(vars(trainer).update, numbers)
        for parameter in trainer.lightning_module.parameters():
            undo.callback(_set_trained, parameter, parameter.requires_grad, parameter.grad, _version(parameter.grad))
        yield


@contextmanager
def preserved_loaders(loaders: Iterable[Any]) -> Iterator[None]:
    """Restores numbers and random generators of loaders, samplers and datasets in this process."""
    with ExitStack() as undo:
        memory = _Memory(undo)
        for loader in loaders:
            # Only numbers and generators: lists and tensors of a dataset are its data, and may be large.
            for part in _parts(loader):
                memory.remember_numbers(part)
            if getattr(loader, "_iterator", _ABSENT) is None:
                # Persistent workers must not survive: the live validation has to start its own, with its own seed.
                undo.callback(_stop_workers, loader)
        yield


class _Memory:
    """Remembers the contents of objects and restores them in place when the stack closes, also after an exception."""

    def __init__(self, undo: ExitStack, own_package: str | None = None) -> None:
        self.metrics: list[Metric | MetricCollection] = []
        self._undo = undo
        self._own_package = own_package
        self._seen: set[int] = set()

    def remember(self, value: Any, depth: int = MAX_DEPTH) -> None:
        if value is None or isinstance(value, int | float | str) or depth == 0 or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            self._remember_module(value, depth)
        elif isinstance(value, list | deque | dict | set | tuple):
            if len(value) <= MAX_ITEMS:
                self._remember_container(value, depth)
        elif isinstance(value, Tensor):
            # A validation cannot write in place to inference tensors and those that require gradients.
            if value.nbytes <= MAX_TENSOR_BYTES and not value.is_inference() and not value.requires_grad:
                self._undo.callback(_set_tensor, value, value.clone(), value._version)
        elif isinstance(value, np.ndarray):
            if value.nbytes <= MAX_TENSOR_BYTES and value.flags.writeable:
                self._undo.callback(np.copyto, value, value.copy())
        elif hasattr(value, "__dict__") and self._is_followed(type(value)):
            self._undo.callback(_set_attributes, value, dict(vars(value)))
            for attribute in list(vars(value).values()):
                self.remember(attribute, depth - 1)
        else:
            remember_generator(self._undo, value)

    def remember_numbers(self, owner: object) -> None:
        attributes = getattr(owner, "__dict__", {})
        self._undo.callback(attributes.update, _numbers(owner))
        for attribute in attributes.values():
            remember_generator(self._undo, attribute)

    def _is_followed(self, owner: type) -> bool:
        return issubclass(owner, LRScheduler | SimpleNamespace) or _is_the_users(_package(owner), self._own_package)

    def _remember_module(self, module: nn.Module, depth: int) -> None:
        if isinstance(module, Metric | MetricCollection):
            self.metrics.append(module)
        own = {name: attribute for name, attribute in vars(module).items() if name not in _MODULE_MACHINERY}
        self._undo.callback(_set_attributes, module, own)
        # Restores which tensors are buffers. The caller restores their values, by swapping in copies.
        self._undo.callback(_refill, module._buffers, dict(module._buffers))
        for child in module.children():
            self.remember(child)
        # Resetting a metric replaces its states without writing to them, so only its lists need to be copied.
        inner_depth = 1 if isinstance(module, Metric) else depth - 1
        for attribute in own.values():
            self.remember(attribute, inner_depth)

    def _remember_container(self, value: Any, depth: int) -> None:
        if not isinstance(value, tuple):
            self._undo.callback(_refill, value, _content(value))
        for item in list(value.values()) if isinstance(value, dict) else value:
            self.remember(item, depth - 1)


@contextmanager
def _noted_by_signals(owner: object, numbers: dict[str, Any]) -> Iterator[None]:
    """Inside the context, numbers that signal handlers set on ``owner`` are also stored in ``numbers``."""

    def noting(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
        def handle(signal_number: int, frame: FrameType | None) -> None:
            before = _numbers(owner)
            handler(signal_number, frame)
            numbers.update({name: value for name, value in _numbers(owner).items() if before.get(name) != value})

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


def _numbers(owner: object) -> dict[str, Any]:
    return {k: v for k, v in getattr(owner, "__dict__", {}).items() if v is None or isinstance(v, int | float)}


def _content(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _refill(container: Any, content: Any) -> None:
    """Restores a container's content. Writes only if it has changed, since some dicts are read-only."""
    if isinstance(container, dict):
        same = list(container) == list(content) and all(container[key] is content[key] for key in content)
    elif isinstance(container, set):
        same = container == content
    else:
        same = len(container) == len(content) and all(map(operator.is_, container, content))
    if not same:
        container.clear()
        (container.extend if isinstance(container, list | deque) else container.update)(content)


def _set_attributes(owner: Any, attributes: dict[str, Any]) -> None:
    machinery = _MODULE_MACHINERY if isinstance(owner, nn.Module) else frozenset()
    for name in vars(owner).keys() - attributes.keys() - machinery:
        del vars(owner)[name]
    vars(owner).update(attributes)


def _set_tensor(tensor: Tensor, content: Tensor, version: int) -> None:
    if tensor._version != version:
        with torch.no_grad():
            tensor.copy_(content)


def _set_trained(parameter: nn.Parameter, requires_grad: bool, grad: Tensor | None, version: int) -> None:
    if parameter.requires_grad != requires_grad:
        parameter.requires_grad_(requires_grad)
    if parameter.grad is not grad:
        parameter.grad = grad
    if _version(grad) != version:
        warnings.warn(
            "A validation hook writes to existing gradients. They cannot be restored after the validation of a merge:"
            " if gradients are accumulated over batches, training differs from a run without the merge callback.",
            stacklevel=2,
        )


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor._version


@cache
def _is_the_users(package: str, own_package: str | None) -> bool:
    """Returns True if a package is the user's: the package of the module itself, or one that is not installed."""
    if package in (own_package, "__main__"):
        return True
    file = getattr(sys.modules.get(package), "__file__", None)
    if file is None or package in _NOT_THE_USERS:
        return False
    return not any(Path(file).is_relative_to(folder) for folder in _INSTALLED)


def _package(owner: type) -> str:
    return owner.__module__.partition(".")[0]


def _own_package(owner: type) -> str | None:
    """Returns the package of the user's class. FSDP2 derives a class of torch's from it, which is then the object's."""
    packages = (_package(each) for each in owner.__mro__)
    return next((package for package in packages if package not in _NOT_THE_USERS), None)


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
