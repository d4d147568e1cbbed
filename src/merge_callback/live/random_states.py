"""Restores random states after an extra validation, so that the training draws as if there had been none."""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restores the global random states of torch, its accelerator, numpy and Python after the context."""
    # Lightning's `isolate_rng` does not restore the states after an exception.
    states = _collect_rng_states(include_cuda=False)
    with ExitStack() as undo:
        undo.callback(_set_rng_states, states)
        for generator in accelerator_generators():
            if generator.device.type == "cuda":
                undo.enter_context(_preserved_cuda_generator(generator))
            else:
                undo.callback(_set_generator, generator, generator.get_state())
        yield


def accelerator_generators() -> Sequence[torch.Generator]:
    """Returns the default generators of the accelerator's devices; none unless this process has used one."""
    if (accelerator := torch.accelerator.current_accelerator()) is None:
        return ()
    # MPS has a single one, which it does not list.
    listed: Sequence[torch.Generator] = getattr(torch.get_device_module(accelerator), "default_generators", ())
    return listed


@contextmanager
def _preserved_cuda_generator(generator: torch.Generator) -> Iterator[None]:
    """Lets a generator draw from a copy of its state. Setting a state would restart the dropout of recurrent layers."""
    own, state = generator.graphsafe_get_state(), generator.get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(own)
        # A CUDA graph draws from the state that it was recorded with.
        _set_generator(generator, state)


def remember_generator(undo: ExitStack, value: Any) -> None:
    """If a value is a random generator of torch, numpy or Python, restores its state when the stack closes."""
    if isinstance(value, torch.Generator):
        undo.callback(_set_generator, value, value.get_state())
    elif isinstance(value, np.random.RandomState):
        undo.callback(value.set_state, value.get_state())
    elif isinstance(value, random.Random):
        undo.callback(value.setstate, value.getstate())
    elif isinstance(value, np.random.Generator):
        undo.callback(setattr, value.bit_generator, "state", value.bit_generator.state)


def _set_generator(generator: torch.Generator, state: Tensor) -> None:
    if not torch.equal(generator.get_state(), state):
        generator.set_state(state)
