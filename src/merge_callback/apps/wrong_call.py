"""What commands raise when they were called with something that makes no sense."""

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A config lacks an entry, or holds one that makes no sense."""


class WrongCallError(SystemExit):
    """Ends a command with exit code 2; Hydra lets it pass.

    Args:
        message: What makes no sense, and what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextmanager
def wrong_calls() -> Iterator[None]:
    """Inside the context, errors that tell of arguments are wrong calls, and those of the disk end the program."""
    try:
        yield
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        raise WrongCallError(str(error)) from error
    except OSError as error:
        raise SystemExit(str(error)) from error
