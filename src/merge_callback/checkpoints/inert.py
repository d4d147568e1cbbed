"""Unpickles containers and plain values only. Other objects, which would have to be run, become placeholders."""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

_SMALL_BYTES = 4096
# Tuples that are nested deeper than anybody's.
_MOST_NESTED = 20


class Inert:
    """Stands for an object that was not created. It takes whatever a pickle does to the object, and does nothing.

    Each class of it has the name of what it stands for, such as ``functools.partial``.
    """

    __hash__ = object.__hash__

    def __new__(cls, *arguments: Any, **named: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **named: Any) -> "Inert":
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Does nothing."""

    def extend(self, values: Any) -> None:
        """Does nothing."""

    def add(self, value: Any) -> None:
        """Does nothing."""


class InertDict(dict[Any, Any]):
    """A dictionary without the attributes that a pickle gives it, such as the ``_metadata`` of a state dict."""

    def __setstate__(self, state: Any) -> None:
        pass


class InertFunction:
    """A function that a pickle may call, and of which it can change nothing."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


class InertUnpickler(pickle.Unpickler):
    """Unpickles dictionaries, lists, tuples, sets, numbers, strings and bytes; all else is `Inert`.

    Args:
        pickled: The pickle.
        known: (Module, name) -> object that a pickle may use in addition.
    """

    def __init__(self, pickled: bytes, known: Mapping[tuple[str, str], Any]) -> None:
        (_refuse_excess_once if len(pickled) <= _SMALL_BYTES else refuse_excess)(pickled)
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self._known = _CONTAINERS | dict(known)

    def find_class(self, module: str, name: str) -> Any:
        """Returns what a pickle may use under this name; otherwise a `stand_in`."""
        if (module, name) in self._known:
            return self._known[module, name]
        return self.stand_in(module, name)

    def stand_in(self, module: str, name: str) -> Any:
        """Returns a new class in place of what has this name. A pickle can change classes, so none is shared."""
        return type(f"{module}.{name}", (Inert,), {})


# Python 2 and protocol 2 call the builtins otherwise.
_CONTAINERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): InertDict,
    # How protocol 2 writes bytes.
    ("_codecs", "encode"): InertFunction(lambda text, _: text.encode("latin1")),
    ("__builtin__", "bytes"): InertFunction(lambda *_: b""),
    **{
        (module, kind.__name__): InertFunction(kind)
        for module in ("builtins", "__builtin__")
        for kind in (set, frozenset, complex)
    },
}


def refuse_excess(pickled: bytes) -> None:
    """Raises unless a pickle can be read in memory and time in proportion to its size.

    Raises:
        pickle.UnpicklingError: If it numbers its objects beyond its size, which would allocate that many places, or
            nests tuples so deeply that their hash, as the key of a dictionary, may take forever.
        ValueError: If it ends before it should.
    """
    # How deeply the tuples on the stack, and those that are remembered, are nested; None for a mark.
    stack: list[int | None] = []
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        name, number = opcode.name, int(argument) if isinstance(argument, int) else 0
        if name == "MARK":
            stack.append(None)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(number, 0))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(memo) if name == "MEMOIZE" else number
            if number > len(pickled):
                raise pickle.UnpicklingError("it numbers objects that it cannot have")
            memo[number] = (stack[-1] or 0) if stack else 0
        else:
            taken = _taken_from(stack, opcode.stack_before)
            depth = 1 + max(taken, default=0) if name.startswith("TUPLE") else 0
            if depth > _MOST_NESTED:
                raise pickle.UnpicklingError(f"it nests more than {_MOST_NESTED} tuples")
            stack += [depth] * len(opcode.stack_after)


# A folder of shards has very many small pickles that are alike.
_refuse_excess_once = lru_cache(maxsize=1024)(refuse_excess)


def _taken_from(stack: list[int | None], what: Sequence[Any]) -> list[int]:
    """Takes from the stack what an opcode takes, down to the last mark if it takes a slice."""
    taken: list[int] = []
    num_alone = len(what)
    if pickletools.markobject in what:
        num_alone = list(what).index(pickletools.markobject)
        while stack and (found := stack.pop()) is not None:
            taken.append(found)
    return taken + [stack.pop() or 0 for _ in range(min(num_alone, len(stack)))]


def inert_names(content: Any) -> set[str]:
    """Returns the names of all objects in a content that are `Inert`."""
    found, seen, waiting = set(), set(), [content]
    while waiting:
        value = waiting.pop()
        # A content may refer to one of its parts very often.
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Inert | InertFunction):
            found.add(type(value).__name__)
        elif isinstance(value, type) and issubclass(value, Inert | InertDict):
            found.add(value.__name__)
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
    return found
