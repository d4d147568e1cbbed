"""Stand-ins for callbacks and loggers in an extra validation: they answer as the real ones do, and do nothing."""

import sys
from collections.abc import Iterator
from pathlib import PurePath
from types import ModuleType
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger

# Methods of experiments that begin so only read.
_READS = ("get", "search", "list", "load", "download", "is_", "has_", "keys", "values", "items", "copy", "as_dict")
_PLAIN = (type(None), str, bytes, int, float, tuple, frozenset, PurePath, type, ModuleType)


class SilentCallback:
    """A proxy for a callback whose hooks do nothing. Everything else, also its class, is the callback's own.

    Removing the callbacks instead would break user code that looks them up on the trainer, and the thread that draws
    Lightning's rich progress bar.
    """

    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._callback)

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._callback

    def __hash__(self) -> int:
        return hash(self._callback)

    def __getattr__(self, name: str) -> Any:
        return do_nothing if name.startswith("on_") else getattr(self._callback, name)


class SilentLogger:
    """A proxy for a logger that logs nothing. Names, folders, the class and what can be asked are the logger's own."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._logger)

    @property
    def experiment(self) -> "_Silent":
        return _Silent(self._logger.experiment)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._logger, name)
        is_action = name.startswith("log_") or name in ("save", "finalize", "after_save_checkpoint", "watch")
        return do_nothing if is_action and callable(value) else value


class _Silent:
    """A proxy for what a logger writes to, and for what that holds. It answers what is asked, and writes nothing."""

    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "_real", real)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._real)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if not callable(value) or isinstance(value, type):
            return _answer(value)
        if name.startswith(_READS):
            return value
        return _close_figure if name == "add_figure" else do_nothing

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __getitem__(self, key: Any) -> Any:
        return _answer(self._real[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __delitem__(self, key: Any) -> None:
        pass

    def __contains__(self, key: object) -> bool:
        return key in self._real

    def __iter__(self) -> Iterator[Any]:
        return iter(self._real)

    def __len__(self) -> int:
        return len(self._real)

    def __bool__(self) -> bool:
        return True

    def __call__(self, *arguments: Any, **options: Any) -> None:
        pass


def _answer(value: Any) -> Any:
    if isinstance(value, list | dict | set):
        return value.copy()
    return value if isinstance(value, _PLAIN) else _Silent(value)


def _close_figure(tag: str, figure: Any, *arguments: Any, close: bool = True, **options: Any) -> None:
    """Closes figures, as TensorBoard's ``add_figure`` does after it has drawn them."""
    # Third after the figure: global_step, close.
    is_closed = arguments[1] if len(arguments) > 1 else close
    # A figure that pyplot does not manage need not be closed.
    if is_closed and (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        for each in figure if isinstance(figure, list) else [figure]:
            pyplot.close(each)


def do_nothing(*arguments: Any, **options: Any) -> None:
    """Takes any arguments and does nothing."""
