"""The errors that commands raise when they are called with invalid arguments."""

from collections.abc import Iterator
from contextlib import contextmanager

# The exit code.
WRONG_CALL = 2


class ConfigError(ValueError):
    """A config lacks an entry, or holds an invalid one."""


class WrongCallError(SystemExit):
    """Ends a command with exit code 2; a SystemExit, since Hydra does not catch those.

    Args:
        message: What is wrong, and what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(WRONG_CALL)
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextmanager
def wrong_calls() -> Iterator[None]:
    """Turns errors about arguments into wrong calls, and errors of the disk into SystemExit, inside the context."""
    try:
        yield
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        raise WrongCallError(str(error)) from error
    except OSError as error:
        raise SystemExit(str(error)) from error
