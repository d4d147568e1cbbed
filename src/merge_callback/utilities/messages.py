"""Info lines and warnings of a callback, on rank zero, and notes on errors."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn


@contextmanager
def noted(what: str) -> Iterator[None]:
    """Adds a note to an error that is raised inside the context, where Python has notes (3.11)."""
    try:
        yield
    except Exception as error:
        if sys.version_info >= (3, 11):
            error.add_note(what)
        raise


class Messages:
    """Logs messages that start with the callback's name, on rank zero. A topic is logged at most once per fit.

    Args:
        name: Name of the callback.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._said: set[str] = set()

    def begin(self) -> None:
        """Starts a new fit: every topic may be logged again."""
        self._said.clear()

    def is_said(self, topic: str) -> bool:
        """Returns whether a topic has been logged in this fit, so that its text need not be made."""
        return topic in self._said

    def say(self, text: str, topic: str) -> None:
        """Logs an info line, at most once per fit and topic; nothing if the text is empty."""
        if topic in self._said:
            return
        self._said.add(topic)
        if text:
            rank_zero_info(f"{self._name}: {text}")

    def warn(self, text: str, topic: str | None = None) -> None:
        """Warns at most once per fit and topic; without a topic, every time."""
        if topic in self._said:
            return
        if topic is not None:
            self._said.add(topic)
        rank_zero_warn(f"{self._name}: {text}")
