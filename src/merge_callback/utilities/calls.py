"""Objects that show the call that made them, and refuse arguments with a hint of what to write instead."""

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Self


class ShownAsItsCall:
    """An object whose ``repr`` is the call of its constructor, as the user has written it."""

    # Names of arguments that users look for here -> what to write instead.
    _ELSEWHERE: ClassVar[Mapping[str, str]] = {}
    _call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        for name, instead in cls._ELSEWHERE.items():
            if name in options:
                raise TypeError(f"{cls.__name__} takes no {name}=; {instead}")
        made = super().__new__(cls)
        vars(made)["_call"] = arguments, options
        return made

    def __repr__(self) -> str:
        arguments, options = self._call
        parts = [*map(repr, arguments), *(f"{name}={value!r}" for name, value in options.items())]
        return f"{type(self).__name__}({', '.join(parts)})"
