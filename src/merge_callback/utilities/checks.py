"""Checks of arguments. Each error names the argument, its value and what was expected."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any


def check_bool(argument: str, value: Any) -> None:
    """Raises TypeError unless the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument} must be True or False, got {value!r}")


def check_count(argument: str, value: Any, minimum: int = 1) -> None:
    """Raises TypeError unless the value is an int, and ValueError if it is below the minimum."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{argument} must be >= {minimum}, got {value}")


def check_optional_count(argument: str, value: Any) -> None:
    """Raises TypeError unless the value is an int or None, and ValueError if it is below one."""
    if value is not None:
        check_count(argument, value)


def check_limit(limit_batches: Any) -> None:
    """Raises unless the value is a number of batches (int >= 1), a share of them (float in (0, 1]), or None."""
    if limit_batches is None:
        return
    if isinstance(limit_batches, bool) or not isinstance(limit_batches, int | float):
        raise TypeError(f"limit_batches must be an int, a float or None, got {limit_batches!r}")
    if limit_batches < 1 if isinstance(limit_batches, int) else not 0 < limit_batches <= 1:
        raise ValueError(f"limit_batches must be a number of batches >= 1 or a share in (0, 1], got {limit_batches}")


def check_installed(package: str, extra: str) -> None:
    """Raises unless an optional package is installed.

    Call it at the start of a program that would otherwise fail only at its end.

    Raises:
        ModuleNotFoundError: If the package is missing. The message says how to install it.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is not installed: {how_to_install(extra)}")


def how_to_install(extra: str) -> str:
    """Returns the commands that install an extra.

    Examples:
        >>> how_to_install("export")
        "pip install 'merge-callback[export]', or in a clone pip install '.[export]'"
    """
    return f"pip install 'merge-callback[{extra}]', or in a clone pip install '.[{extra}]'"


def check_share(argument: str, value: Any) -> None:
    """Raises TypeError unless the value is a number or None, and ValueError unless it lies in (0, 1)."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument} must be a float or None, got {value!r}")
    if not 0 < value < 1:
        raise ValueError(f"{argument} must be a share in (0, 1), got {value}")


def patterns(argument: str, value: Any) -> tuple[str, ...]:
    """Returns one or several name patterns as a tuple; raises TypeError for anything else."""
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, Sequence) or not all(isinstance(each, str) and each for each in given):
        raise TypeError(f"{argument} must be a pattern of names or a list of them, got {value!r}")
    return tuple(given)


def check_exactly_one(owner: str, **given: float | None) -> None:
    """Raises ValueError unless exactly one of the arguments is not None.

    Args:
        owner: Name of the class or function, for the message.
        **given: The arguments by name.
    """
    if sum(value is not None for value in given.values()) != 1:
        values = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"{owner} takes exactly one of {' and '.join(given)}, got {values}")


def check_numbers(**given: Any) -> None:
    """Raises TypeError unless each argument is a number or None."""
    for name, value in given.items():
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise TypeError(f"{name} must be a number, got {value!r}")
