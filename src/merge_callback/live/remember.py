"""Remembers what objects hold, and restores it in the same objects.

Extra validations run the user's own hooks, which keep things where they like: in the module and its submodules, in
objects and lists that these hold, and on classes. All of it is followed from the module. What belongs to installed
packages is left alone, since such objects may be tied to something that cannot be put back.
"""

import copy
import itertools
import operator
import sys
import sysconfig
import warnings
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import MetricTracker

from merge_callback.live.random_states import remember_generator

# Plain tensors and arrays up to this size (sums, counters) are restored; larger ones are assumed to be constant data.
MAX_TENSOR_BYTES = 2**20
# What is in the items of lists and dicts up to this length is restored; which items they hold, in those of any length.
MAX_ITEMS = 10_000
# Lists of what loads data, up to this length, hold again what they held; longer ones are data.
MAX_INDICES = 100_000
# Lists of what loads data, such as transforms, are followed up to this length; longer ones are data.
MAX_PARTS = 100
# How deep nested containers and objects are followed.
MAX_DEPTH = 4
# Folders of installed packages; classes that are defined there are not the user's own.
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_NOT_THE_USERS = ("torch", "torchmetrics", "lightning", "pytorch_lightning", "merge_callback")
# What every module has: its parameters, buffers, submodules and hooks.
_MODULE_MACHINERY = frozenset(vars(nn.Module()))
_CONTAINERS = (list, deque, dict, set)


class Memory:
    """Remembers the contents of objects and restores them in place when the stack closes, also after an exception.

    Args:
        undo: The stack.
        owner: The user's module. Its package is taken for the user's own, even where it is installed.
    """

    def __init__(self, undo: ExitStack, owner: nn.Module | None = None) -> None:
        self.metrics: list[Metric | MetricCollection] = []
        self._undo = undo
        self._own_package = None if owner is None else _own_package(type(owner))
        # FSDP2 exchanges the parameters that its modules hold, and knows itself which ones they are.
        self._is_exchanged = owner is not None and any(isinstance(each, FSDPModule) for each in owner.modules())
        # Keeps the objects, since a new one could have the identity of one that is gone.
        self._seen: dict[int, Any] = {}

    def remember(self, value: Any, depth: int = MAX_DEPTH) -> None:
        """Remembers a value and what it holds, ``depth`` levels deep. Submodules are always followed."""
        is_constant = value is None or isinstance(value, int | float | str | bytes | type)
        if is_constant or depth == 0 or not self._is_new(value):
            return
        if isinstance(value, nn.Module):
            self._remember_module(value, depth)
        elif isinstance(value, (*_CONTAINERS, tuple)):
            self._remember_container(value, depth)
        elif isinstance(value, Tensor):
            self._remember_tensor(value)
        elif isinstance(value, np.ndarray):
            if value.nbytes <= MAX_TENSOR_BYTES and value.flags.writeable:
                self._undo.callback(np.copyto, value, value.copy())
        elif self._is_followed(type(value)):
            attributes = _attributes(value)
            self._undo.callback(_set_attributes, value, attributes)
            _lend_counts(value, attributes)
            for attribute in attributes.values():
                self.remember(attribute, depth - 1)
            self._remember_classes(type(value))
        else:
            remember_generator(self._undo, value)

    def remember_content(self, container: Any) -> None:
        """Remembers which items a container holds, but not what is in them."""
        self._undo.callback(_refill, container, _content(container))

    def remember_numbers(self, owner: object) -> None:
        """Remembers the numbers and random generators among the attributes of an object of any class."""
        self._undo.callback(_update_attributes, owner, numbers_of(owner))
        for attribute in _attributes(owner).values():
            remember_generator(self._undo, attribute)

    def remember_loading(self, part: object, depth: int = 2 * MAX_DEPTH) -> None:
        """Remembers numbers, random generators and lists of a loader, a sampler or a dataset, and of what it holds.

        The items of lists are restored, but not what is in them: they are data, or indices of data.
        """
        if not self._is_new(part):
            return
        self.remember_numbers(part)
        for attribute in _attributes(part).values():
            if isinstance(attribute, list) and len(attribute) <= MAX_INDICES:
                self.remember_content(attribute)
            self._remember_transforms(attribute, depth - 1)

    def _remember_transforms(self, value: Any, depth: int) -> None:
        """Remembers the user's own objects among transforms, collate functions and the like."""
        if depth == 0 or isinstance(value, type):
            return
        if isinstance(value, list | tuple | dict):
            for item in (value.values() if isinstance(value, dict) else value) if len(value) <= MAX_PARTS else ():
                self._remember_transforms(item, depth - 1)
        elif self._is_followed(type(value)):
            self.remember_loading(value, depth)
        elif (transforms := _attributes(value).get("transforms")) is not None:
            # Several transforms in one, as in torchvision.
            self._remember_transforms(transforms, depth - 1)

    def _is_new(self, value: Any) -> bool:
        is_new = id(value) not in self._seen
        self._seen[id(value)] = value
        return is_new

    def _is_followed(self, owner: type) -> bool:
        return issubclass(owner, LRScheduler | SimpleNamespace) or _is_the_users(_package(owner), self._own_package)

    def _remember_module(self, module: nn.Module, depth: int) -> None:
        if isinstance(module, Metric | MetricCollection):
            self.metrics.append(module)
        own = {name: attribute for name, attribute in vars(module).items() if name not in _MODULE_MACHINERY}
        self._undo.callback(_set_attributes, module, own)
        _lend_counts(module, own)
        # Which parameters, buffers, submodules and hooks it has. `isolate` takes care of the values.
        for name in _MODULE_MACHINERY & vars(module).keys():
            machinery = vars(module)[name]
            if isinstance(machinery, dict | set) and not (name == "_parameters" and self._is_exchanged):
                self.remember_content(machinery)
        num_metrics = len(self.metrics)
        for child in module.children():
            self.remember(child)
        if isinstance(module, MetricTracker):
            # Its metrics are results of earlier epochs; it begins the next one itself.
            del self.metrics[num_metrics:]
        # Resetting a metric replaces its states without writing to them, so only its lists need to be copied.
        inner_depth = 1 if isinstance(module, Metric) else depth - 1
        for attribute in own.values():
            self.remember(attribute, inner_depth)
        self._remember_classes(type(module))

    def _remember_classes(self, owner: type) -> None:
        """Remembers the data on the user's own classes, such as a list that all objects share."""
        for each in owner.__mro__:
            if _is_the_users(_package(each), self._own_package) and self._is_new(each):
                data = _class_data(each)
                self._undo.callback(_set_class_data, each, data)
                for value in data.values():
                    self.remember(value, MAX_DEPTH - 1)

    def _remember_container(self, value: Any, depth: int) -> None:
        if not isinstance(value, tuple):
            self.remember_content(value)
        if len(value) <= MAX_ITEMS:
            for item in list(value.values()) if isinstance(value, dict) else value:
                self.remember(item, depth - 1)

    def _remember_tensor(self, tensor: Tensor) -> None:
        if is_lazy(tensor) or tensor.nbytes > MAX_TENSOR_BYTES or tensor.grad_fn is not None:
            return
        if tensor.is_inference():
            # Validations may write to what earlier ones have made. torch does not count such writes.
            with torch.inference_mode():
                self._undo.callback(_set_inference_tensor, tensor, tensor.clone())
        else:
            self._undo.callback(_set_tensor, tensor, tensor.detach().clone(), tensor._version)


def numbers_of(owner: object) -> dict[str, Any]:
    """Returns the attributes of an object that are numbers or None."""
    return {k: v for k, v in _attributes(owner).items() if v is None or isinstance(v, int | float)}


def _attributes(owner: object) -> dict[str, Any]:
    """Returns all attributes of an object by name, also those in slots."""
    found = dict(getattr(owner, "__dict__", {}))
    for each in type(owner).__mro__:
        slots = each.__dict__.get("__slots__", ())
        for slot in [slots] if isinstance(slots, str) else slots:
            is_private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{each.__name__.lstrip('_')}{slot}" if is_private else slot
            if name not in ("__dict__", "__weakref__") and hasattr(owner, name):
                found[name] = getattr(owner, name)
    return found


def _update_attributes(owner: object, attributes: Mapping[str, Any]) -> None:
    # A frozen dataclass refuses `setattr`; nor does a class of the user's have to know of this.
    now = _attributes(owner)
    for name, value in attributes.items():
        if name not in now or now[name] is not value:
            object.__setattr__(owner, name, value)


def _set_attributes(owner: object, attributes: Mapping[str, Any]) -> None:
    machinery = _MODULE_MACHINERY if isinstance(owner, nn.Module) else frozenset()
    for name in _attributes(owner).keys() - attributes.keys() - machinery:
        object.__delattr__(owner, name)
    _update_attributes(owner, attributes)


def _lend_counts(owner: object, attributes: Mapping[str, Any]) -> None:
    """Replaces counters of `itertools`, which cannot be set back, by copies."""
    with warnings.catch_warnings():
        # Python intends to make them impossible to copy.
        warnings.simplefilter("ignore", DeprecationWarning)
        counts = {name: copy.copy(each) for name, each in attributes.items() if isinstance(each, itertools.count)}
    _update_attributes(owner, counts)


def _class_data(owner: type) -> dict[str, Any]:
    """Returns what a class holds beside its functions, properties and inner classes."""
    return {
        name: value
        for name, value in vars(owner).items()
        if not name.startswith("__") and not callable(value) and not hasattr(type(value), "__get__")
    }


def _set_class_data(owner: type, data: Mapping[str, Any]) -> None:
    now = _class_data(owner)
    for name in now.keys() - data.keys():
        delattr(owner, name)
    for name, value in data.items():
        if name not in now or now[name] is not value:
            setattr(owner, name, value)


def _content(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _refill(container: Any, content: Any) -> None:
    """Restores a container's content. Writes only if it has changed, since some dicts are read-only."""
    if isinstance(container, dict):
        # By identity, since keys may be tensors.
        same = len(container) == len(content) and all(map(operator.is_, container, content))
        same = same and all(map(operator.is_, container.values(), content.values()))
    elif isinstance(container, set):
        same = container == content
    else:
        same = len(container) == len(content) and all(map(operator.is_, container, content))
    if not same:
        container.clear()
        (container.extend if isinstance(container, list | deque) else container.update)(content)


@torch.no_grad()
def _set_tensor(tensor: Tensor, content: Tensor, version: int) -> None:
    if tensor._version != version:
        tensor.copy_(content)


@torch.inference_mode()
def _set_inference_tensor(tensor: Tensor, content: Tensor) -> None:
    tensor.copy_(content)


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
