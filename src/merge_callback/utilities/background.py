"""Work that runs beside the training, on a thread.

The executors and queues of the standard library take locks in Python code. An interrupt that comes just then leaves a
lock taken, the thread waits for it, and a program waits for its threads before it ends: it never does. Whatever the
main thread does here can therefore be interrupted anywhere, and done again.
"""

import atexit
import contextlib
import os
import weakref
from _thread import start_new_thread
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any


class Background:
    """Runs one piece of work at a time on its own thread. An exception in the work is raised by the next `wait`.

    Args:
        name: The thread's name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._inbox: SimpleQueue[_Work | None] | None = None
        self._work: _Work | None = None

    def begin(self, work: Callable[..., None], *arguments: Any) -> None:
        """Waits for the previous work, starts ``work(*arguments)`` on the thread, and returns at once."""
        self.wait()
        self._work = _Work(partial(work, *arguments))
        self._hand_over(self._work)

    def wait(self) -> None:
        """Waits until the work is done; raises its exception if it failed. An interrupted wait can be repeated."""
        if self._work is not None:
            if not self._work.is_done:
                # It has not been handed over where an interrupt came before that.
                self._hand_over(self._work)
            self._work.wait()
            error, self._work = self._work.error, None
            if error is not None:
                raise error

    def _hand_over(self, work: "_Work") -> None:
        if self._inbox is None:
            inbox: SimpleQueue[_Work | None] = SimpleQueue()
            thread = Thread(target=_serve, args=(inbox,), name=self._name, daemon=True)
            # A thread that starts another waits for it, with a lock; this one is never interrupted.
            start_new_thread(thread.start, ())
            # The thread ends with this; at the exit of a program it is still needed.
            weakref.finalize(self, inbox.put, None).atexit = False
            _STARTED.add(self)
            self._inbox = inbox
        self._inbox.put(work)

    def __getstate__(self) -> dict[str, Any]:
        """Waits for the work. A thread cannot be copied or pickled, so a copy starts its own."""
        self.wait()
        return {"_name": self._name, "_inbox": None, "_work": None}


class _Work:
    """What is to be done, and whether it is and how it ended."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._unfinished = Lock()
        self._unfinished.acquire()
        self.is_done = False
        self.error: BaseException | None = None

    def run(self) -> None:
        """Does it, unless it is done: it may have been handed over twice."""
        if self.is_done:
            return
        try:
            self._function()
        except BaseException as error:
            self.error = error
        self.is_done = True
        self._unfinished.release()

    def wait(self) -> None:
        # An interrupt may leave the lock taken here, but then the work is done.
        while not self.is_done:
            if self._unfinished.acquire(timeout=1):
                self._unfinished.release()


# Those that have a thread, of this process.
_STARTED: "weakref.WeakSet[Background]" = weakref.WeakSet()
os.register_at_fork(after_in_child=_STARTED.clear)


def _serve(inbox: "SimpleQueue[_Work | None]") -> None:
    while (work := inbox.get()) is not None:
        work.run()
        # Else what it belongs to, and with it this thread, would never end.
        del work


@atexit.register
def _finish() -> None:
    # A thread must not be in the middle of torch when the interpreter goes.
    for background in list(_STARTED):
        with contextlib.suppress(Exception):
            background.wait()
