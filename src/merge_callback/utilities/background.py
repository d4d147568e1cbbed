"""Work that runs beside the training, on a thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any


class Background:
    """Runs one piece of work at a time on its own thread. An exception in the work is raised by the next `wait`.

    Args:
        name: Prefix of the thread's name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: ThreadPoolExecutor | None = None
        self._work: Future[None] | None = None

    def begin(self, work: Callable[..., None], *arguments: Any) -> None:
        """Waits for the previous work, starts ``work(*arguments)`` on the thread, and returns at once."""
        self.wait()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        self._work = self._thread.submit(work, *arguments)

    def wait(self) -> None:
        """Waits until the work is done; raises its exception if it failed. An interrupted wait can be repeated."""
        if self._work is not None:
            wait([self._work])
            work, self._work = self._work, None
            work.result()

    def __getstate__(self) -> dict[str, Any]:
        """Waits for the work. A thread cannot be copied or pickled, so a copy starts its own."""
        self.wait()
        return {"_name": self._name, "_thread": None, "_work": None}
