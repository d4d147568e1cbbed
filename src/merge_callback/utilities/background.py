"""Work that is done beside the training: by a thread, or by a GPU that has been asked for it."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


def wait_for_device(device: torch.device) -> float:
    """Returns when a GPU has done what it has been asked for so far: the seconds that took."""
    began = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


class Background:
    """One piece of work at a time, done by a thread of its own; what it raises arrives at the next `wait`.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: ThreadPoolExecutor | None = None
        self._work: Future[None] | None = None

    def begin(self, work: Callable[..., None], *arguments: Any) -> None:
        """Begins it when the work before is done, and returns."""
        self.wait()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        self._work = self._thread.submit(work, *arguments)

    def wait(self) -> None:
        """Returns when it is done."""
        if self._work is not None:
            work, self._work = self._work, None
            work.result()

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin with a thread of their own."""
        self.wait()
        return {"_name": self._name, "_thread": None, "_work": None}
