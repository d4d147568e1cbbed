"""What an extra validation would leave behind, remembered before and put back after: random states, metric objects, the
lists and numbers that modules keep as attributes, and the generators of loaders."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

# Plain tensors up to this size (sums, counters) are remembered; larger ones are taken to be data that nobody changes.
MAX_TENSOR_BYTES = 2**20
# How deep lists inside dicts inside lists are followed.
MAX_DEPTH = 4
# What every module has: parameters, buffers, submodules and hooks are not the business of this file.
_MODULE_MACHINERY = frozenset(vars(nn.Module()))


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn inside, the global generators of torch, CUDA, numpy and Python are afterwards as before."""
    # Lightning's `isolate_rng` does the same, but not when an exception passes through it.
    states = _collect_rng_states()
    try:
        yield
    finally:
        _set_rng_states(states)


@contextmanager
def preserved_attributes(module: nn.Module) -> Iterator[None]:
    """Metric objects of the module are empty inside; they and its plain attributes are afterwards as before.

    Covers what people keep on modules, also nested: numbers, lists, dicts, sets, tensors up to 1 MiB, random
    generators, metric objects in the module tree or in plain lists.
    """
    memory = _Memory()
    memory.remember(module)
    try:
        for metric in memory.metrics:
            metric.reset()
        yield
    finally:
        memory.put_back()


@contextmanager
def preserved_loaders(loaders: Iterable[Any]) -> Iterator[None]:
    """Numbers and generators of loaders, their samplers and datasets, in this process, are rewound afterwards."""
    memory = _Memory()
    for loader in loaders:
        for part in (loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset"))):
            # Lists and tensors of a dataset are its data; the iterator of a loader's persistent workers goes on.
            memory.remember_numbers(part)
    try:
        yield
    finally:
        memory.put_back()


class _Memory:
    """What some objects hold, and how to bring the same objects back to it."""

    def __init__(self) -> None:
        self.metrics: list[Metric | MetricCollection] = []
        self._undo: list[Callable[[], object]] = []
        self._seen: set[int] = set()

    def put_back(self) -> None:
        for undo in self._undo:
            undo()

    def remember(self, value: Any, depth: int = MAX_DEPTH) -> None:
        if isinstance(value, list | dict | set | deque | tuple | nn.Module | Tensor):
            if depth == 0 or id(value) in self._seen:
                return
            self._seen.add(id(value))
        if isinstance(value, nn.Module):
            self._remember_module(value, depth)
        elif isinstance(value, list | deque | dict | set | tuple):
            self._remember_container(value, depth)
        elif isinstance(value, Tensor):
            # Inference tensors and those with a graph cannot be written in place by a validation either.
            if value.nbytes <= MAX_TENSOR_BYTES and not value.is_inference() and not value.requires_grad:
                self._undo.append(partial(_set_tensor, value, value.clone(), value._version))
        else:
            self._remember_generator(value)

    def remember_numbers(self, owner: object) -> None:
        attributes = getattr(owner, "__dict__", {})
        self._undo.append(
            partial(attributes.update, {k: v for k, v in attributes.items() if isinstance(v, int | float)})
        )
        for attribute in attributes.values():
            self._remember_generator(attribute)

    def _remember_module(self, module: nn.Module, depth: int) -> None:
        if isinstance(module, Metric | MetricCollection):
            self.metrics.append(module)
        own = {name: attribute for name, attribute in vars(module).items() if name not in _MODULE_MACHINERY}
        self._undo.append(partial(_set_attributes, module, own))
        for child in module.children():
            self.remember(child)
        # A metric's states are replaced and not written to when it is reset, so only its lists need care.
        inner_depth = 1 if isinstance(module, Metric) else depth - 1
        for attribute in own.values():
            self.remember(attribute, inner_depth)

    def _remember_container(self, value: Any, depth: int) -> None:
        if isinstance(value, list | deque):
            self._undo += [value.clear, partial(value.extend, list(value))]
        elif isinstance(value, dict | set):
            self._undo += [value.clear, partial(value.update, value.copy())]
        for item in value.values() if isinstance(value, dict) else value:
            self.remember(item, depth - 1)

    def _remember_generator(self, value: Any) -> None:
        if isinstance(value, torch.Generator):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._undo.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            self._undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))


def _set_attributes(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name in vars(module).keys() - attributes.keys() - _MODULE_MACHINERY:
        del vars(module)[name]
    vars(module).update(attributes)


def _set_tensor(tensor: Tensor, content: Tensor, version: int) -> None:
    if tensor._version != version:
        with torch.no_grad():
            tensor.copy_(content)
