"""Work on a thread survives interrupts, and the program that began it ends."""

import gc
import subprocess
import sys
import threading
import time

import pytest

from merge_callback.utilities.background import Background
from tests.helpers.processes import call


def interrupted(number):
    """Begins work and waits for it, with an interrupt before the instruction of that number, in whatever function of
    whatever module. Returns whether there was one, and what was done then, and in a second piece of work."""
    background, done, left = Background("test"), [], number

    def work():
        time.sleep(0.002)
        done.append("first")

    def trace(frame, event, argument):
        nonlocal left
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        background.begin(work)
        background.wait()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    background.wait()
    background.begin(done.append, "second")
    background.wait()
    return left < 0, done


def interrupted_everywhere():
    found = []
    while not found or found[-1][0]:
        found.append(interrupted(len(found)))
    return found


def test_an_interrupt_at_any_instruction_leaves_work_that_is_done_once_or_not_begun():
    *found, last = call(interrupted_everywhere)
    assert last == (False, ["first", "second"])
    assert len(found) > 100
    assert [done for _, done in found if done not in (["second"], ["first", "second"])] == []


def test_the_thread_ends_with_what_it_works_for():
    background = Background("short-lived")
    background.begin(time.sleep, 0)
    background.wait()
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "short-lived")
    del background
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


PROGRAM = """
import os, time
from merge_callback.utilities.background import Background

def work():
    time.sleep(0.5)
    print("written", flush=True)

background = Background("test")
background.begin(work)
if child := os.fork():
    os.waitpid(child, 0)
    print("the fork has ended", flush=True)
"""


@pytest.mark.slow
def test_a_program_ends_when_its_work_is_done_and_a_fork_of_it_at_once():
    # A program with threads that forks is warned of by newer versions of Python.
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    assert sorted(done.stdout.splitlines()) == ["the fork has ended", "written"]
