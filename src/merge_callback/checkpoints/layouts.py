"""Finds the model in checkpoints that other trainers wrote, which also hold optimizers and more."""

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, TypeAlias

from merge_callback.checkpoints.stored import StoredTensor

# The names that lead to a value through nested dictionaries.
Keys: TypeAlias = tuple[Any, ...]

# Where a model's tensors are, first match first: Lightning; many scripts; nanoGPT, DeiT and OLMo-core; DeepSpeed;
# torch's tutorial on distributed checkpoints.
_MODELS: tuple[Keys, ...] = (
    ("state_dict",),
    ("model_state_dict",),
    ("model",),
    ("module",),
    ("app", "model"),
)
# A file could refer to its own dictionaries so often that reading never ends.
_MOST_VISITS = 100_000
# Where other trainers note the step.
_STEPS = ("global_step", "step", "iter_num", "iteration")


def is_extra_state(name: str) -> bool:
    """Returns whether an entry of a state dict is what a module keeps there beside its tensors."""
    return name.endswith("_extra_state")


def flattened(content: Mapping[Any, Any]) -> dict[Keys, Any]:
    """Returns every value in nested dictionaries by the keys that lead to it. What a module keeps is one value.

    Raises:
        ValueError: If the same dictionaries are in very many places.
    """
    return dict(_values(content, (), set(), count()))


def _values(
    content: Mapping[Any, Any], keys: Keys, seen: set[int], revisits: Iterator[int]
) -> Iterator[tuple[Keys, Any]]:
    if id(content) in seen and next(revisits) >= _MOST_VISITS:
        raise ValueError("the same dictionaries are in very many places")
    seen.add(id(content))
    for key, value in content.items():
        if isinstance(value, dict) and not is_extra_state(str(key)):
            yield from _values(value, (*keys, key), seen, revisits)
        else:
            yield (*keys, key), value


def model_keys(all_keys: Mapping[Keys, bool]) -> dict[Keys, str]:
    """Returns the keys of the model's values, with the names that they have in the model.

    Beside a model's tensors, which may also lie loose, optimizers and others have dictionaries of their own.

    Args:
        all_keys: The keys of all values, and whether each is a tensor.

    Raises:
        ValueError: If several dictionaries may be the model's.
    """
    for place in _MODELS:
        inside = [keys for keys in all_keys if keys[: len(place)] == place and len(keys) > len(place)]
        if any(all_keys[keys] for keys in inside):
            return {keys: ".".join(map(str, keys[len(place) :])) for keys in inside}
    loose = {keys for keys, is_tensor in all_keys.items() if len(keys) == 1 and is_tensor}
    groups = sorted({str(keys[0]) for keys, is_tensor in all_keys.items() if len(keys) > 1 and is_tensor})
    if not loose and len(groups) > 1:
        raise ValueError(f"it holds several dictionaries ({', '.join(groups)}); save that of the model alone")
    if loose:
        return {keys: str(keys[0]) for keys in all_keys if keys in loose or is_extra_state(str(keys[-1]))}
    return {keys: ".".join(map(str, keys)) for keys in all_keys if len(keys) > 1}


def noted_step(content: Mapping[str, Any]) -> int | None:
    """Returns the step that a checkpoint notes; None if it notes none."""
    for name in _STEPS:
        value = content.get(name)
        if isinstance(value, StoredTensor) and value.numel == 1:
            return int(value[:].item())
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
