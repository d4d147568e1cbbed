"""Real processes, connected by gloo, that run functions of the tests side by side as the ranks of one job."""

import faulthandler
import os
import queue
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tests.helpers.processes import CONTEXT, TIMEOUT_SECONDS, begin, watch


class Ranks:
    """Processes that start once and run one function after the other; anew after one that hung.

    Args:
        world_size: How many.
        is_ended_by_errors: Whether a process ends with the first function that raises, as a program would.
    """

    def __init__(self, world_size: int, is_ended_by_errors: bool = False) -> None:
        self._world_size, self._is_ended_by_errors = world_size, is_ended_by_errors
        self._begin()

    def _begin(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._answers: Any = CONTEXT.Queue()
        self._tasks = [CONTEXT.Queue() for _ in range(self._world_size)]
        self._processes = [
            begin(_serve, rank, self._world_size, port, self._is_ended_by_errors, (tasks, self._answers))
            for rank, tasks in enumerate(self._tasks)
        ]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank; fails if it raises on any, with the traceback."""
        results = self.outcomes(function, *arguments)
        failed = [f"rank {rank}:\n{answer}" for rank, (is_done, answer) in enumerate(results) if not is_done]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in results]

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[bool, Any]]:
        """Whether the function returned on each rank, and what, or the traceback."""
        for tasks in self._tasks:
            tasks.put((function, arguments))
        found: dict[int, tuple[bool, Any]] = {}
        # They end by themselves, and say where they are, a little before.
        end = time.monotonic() + TIMEOUT_SECONDS + 20
        for _ in self._tasks:
            try:
                rank, is_done, answer = self._answers.get(timeout=max(0, end - time.monotonic()))
            except queue.Empty:
                missing = set(range(len(self._tasks))) - found.keys()
                self.stop()
                self._begin()
                raise AssertionError(f"ranks {missing} gave no answer; the others: {found}") from None
            found[rank] = (is_done, answer)
        return [found[rank] for rank in range(len(self._tasks))]

    def stop(self) -> None:
        """Ends them."""
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(20)
            process.kill()


def _serve(rank: int, world_size: int, port: int, is_ended_by_errors: bool, queues: tuple[Any, Any]) -> None:
    tasks, answers = queues
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    theirs = [
        "`isinstance",
        "The '.*' does not have many workers",
        "FSDP2-wrapped module .* returned a view tensor",
        "TypedStorage is deprecated",
    ]
    for message in theirs:
        warnings.filterwarnings("ignore", message)
    # They wait for as long as other tests take.
    faulthandler.cancel_dump_traceback_later()
    while (task := tasks.get()) is not None:
        watch()
        function, arguments = task
        # Lightning takes it away after each fit.
        os.environ["WORLD_SIZE"] = str(world_size)
        try:
            answers.put((rank, True, function(*arguments)))
        except BaseException:
            answers.put((rank, False, traceback.format_exc()))
            if is_ended_by_errors:
                return
        faulthandler.cancel_dump_traceback_later()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
