"""What an extra validation would leave behind, remembered before and put back after: random states, metric objects, the
lists and numbers that modules keep as attributes, what hooks set in trainer, optimizers and schedulers, and the
generators of loaders."""

import operator
import random
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
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric, MetricCollection

# Plain tensors up to this size (sums, counters) are remembered; larger ones are taken to be data that nobody changes.
MAX_TENSOR_BYTES = 2**20
# Likewise lists and dicts up to this length.
MAX_ITEMS = 100_000
# How deep lists inside dicts inside lists are followed.
MAX_DEPTH = 4
# Where what is not the user's own is installed.
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_NOT_THE_USERS = ("torch", "torchmetrics", "lightning", "pytorch_lightning", "merge_callback")
# What every module has: parameters, buffers, submodules and hooks are not the business of this file.
_MODULE_MACHINERY = frozenset(vars(nn.Module()))
_ABSENT = object()


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn inside, the global generators of torch, CUDA, numpy and Python are afterwards as before."""
    # Lightning's `isolate_rng` does the same, but not when an exception passes through it.
    states = _collect_rng_states()
    on_gpus = dict(enumerate(states.pop("torch.cuda")))
    try:
        yield
    finally:
        _set_rng_states(states)
        for gpu, state in on_gpus.items():
            # Setting one, even to what it is, lets the dropout of cuDNN's recurrent layers begin anew.
            if not torch.equal(torch.cuda.get_rng_state(gpu), state):
                torch.cuda.set_rng_state(state, gpu)


@contextmanager
def preserved_attributes(module: nn.Module) -> Iterator[None]:
    """Metric objects of the module are empty inside; they and its plain attributes are afterwards as before.

    Covers what people keep on modules, also nested: numbers, lists, dicts, sets, arrays and tensors up to 1 MiB, random
    generators, buffers that are replaced by others, metric objects in the module tree or in plain lists, and objects of
    the user's own classes, such as a meter. Objects of other installed packages are left alone.
    """
    with ExitStack() as undo:
        memory = _Memory(undo, own_package=_package(type(module)))
        memory.remember(module)
        for metric in memory.metrics:
            metric.reset()
        yield


@contextmanager
def preserved_trainer(trainer: Trainer) -> Iterator[None]:
    """What hooks of the module may set elsewhere to act on the training is afterwards as before.

    Covers the options of optimizers (rates), the state of schedulers, which parameters are trained, gradients that are
    made or replaced, and numbers of the trainer (``should_stop``) and of its datamodule. What a signal handler sets in
    the trainer stays, as that of a cluster which is about to stop the job.
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
    """Numbers and generators of loaders, their samplers and datasets, in this process, are rewound afterwards."""
    with ExitStack() as undo:
        memory = _Memory(undo)
        for loader in loaders:
            # Lists and tensors of a dataset are its data.
            for part in _parts(loader):
                memory.remember_numbers(part)
            if getattr(loader, "_iterator", _ABSENT) is None:
                # Workers that persist would be those of the extra pass: the live one starts its own, with its own seed.
                undo.callback(_stop_workers, loader)
        yield


class _Memory:
    """What some objects hold; leaving the stack brings the same objects back to it, all of them, whatever fails."""

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
            # Inference tensors and those with a graph cannot be written in place by a validation either.
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
            self._remember_generator(value)

    def remember_numbers(self, owner: object) -> None:
        attributes = getattr(owner, "__dict__", {})
        self._undo.callback(attributes.update, _numbers(owner))
        for attribute in attributes.values():
            self._remember_generator(attribute)

    def _is_followed(self, owner: type) -> bool:
        return issubclass(owner, LRScheduler | SimpleNamespace) or _is_the_users(_package(owner), self._own_package)

    def _remember_module(self, module: nn.Module, depth: int) -> None:
        if isinstance(module, Metric | MetricCollection):
            self.metrics.append(module)
        own = {name: attribute for name, attribute in vars(module).items() if name not in _MODULE_MACHINERY}
        self._undo.callback(_set_attributes, module, own)
        # Which tensors the buffers are; what these hold is the business of whoever swaps them.
        self._undo.callback(_refill, module._buffers, dict(module._buffers))
        for child in module.children():
            self.remember(child)
        # A metric's states are replaced and not written to when it is reset, so only its lists need care.
        inner_depth = 1 if isinstance(module, Metric) else depth - 1
        for attribute in own.values():
            self.remember(attribute, inner_depth)

    def _remember_container(self, value: Any, depth: int) -> None:
        if not isinstance(value, tuple):
            self._undo.callback(_refill, value, _content(value))
        for item in list(value.values()) if isinstance(value, dict) else value:
            self.remember(item, depth - 1)

    def _remember_generator(self, value: Any) -> None:
        if isinstance(value, torch.Generator):
            self._undo.callback(_set_generator, value, value.get_state())
        elif isinstance(value, np.random.RandomState):
            self._undo.callback(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            self._undo.callback(value.setstate, value.getstate())
        elif isinstance(value, np.random.Generator):
            self._undo.callback(setattr, value.bit_generator, "state", value.bit_generator.state)


@contextmanager
def _noted_by_signals(owner: object, numbers: dict[str, Any]) -> Iterator[None]:
    """Inside the context, numbers that signal handlers set in an owner are set among the given ones, too."""

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
    """Puts the content back, unless it is what the container holds: some dicts allow no change."""
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


def _set_generator(generator: torch.Generator, state: Tensor) -> None:
    if not torch.equal(generator.get_state(), state):
        generator.set_state(state)


def _set_trained(parameter: nn.Parameter, requires_grad: bool, grad: Tensor | None, version: int) -> None:
    if parameter.requires_grad != requires_grad:
        parameter.requires_grad_(requires_grad)
    if parameter.grad is not grad:
        parameter.grad = grad
    if _version(grad) != version:
        warnings.warn(
            "A hook of the validation writes to gradients that are there already. After the validation of a merge they"
            " cannot be put back: with gradients accumulated over batches, training is not the same as without it.",
            stacklevel=2,
        )


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor._version


@cache
def _is_the_users(package: str, own_package: str | None) -> bool:
    """Whether the classes of a package are the user's: of the module's own, or of files that are not installed."""
    if package in (own_package, "__main__"):
        return True
    file = getattr(sys.modules.get(package), "__file__", None)
    if file is None or package in _NOT_THE_USERS:
        return False
    return not any(Path(file).is_relative_to(folder) for folder in _INSTALLED)


def _package(owner: type) -> str:
    return owner.__module__.partition(".")[0]


def _parts(loader: Any) -> Iterator[Any]:
    """A loader, its samplers, and its dataset with the datasets inside it."""
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
