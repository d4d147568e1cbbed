"""Does an interrupt or a kill at any moment leave what it should? Runs that get one at random moments, and their ends.

Statistic: for each place of snapshots, the number of interrupts after which a snapshot or an average, in memory or in
the checkpoint that was saved then, is not that of its step, or the model is not live; and the number of kills after
which the resumed run does not end as the one that was not killed, to the bit.
Pass rule: none.

    python -m tests.interrupts.run    # 60 interrupts and 30 kills for each place, in minutes; writes record.json
"""

import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.helpers.killable_run import Talk, interrupted, main
from tests.helpers.toys import same

RECORD = Path(__file__).with_name("record.json")
PLACES = ("device", "cpu", "files")
NUM_INTERRUPTS, NUM_KILLS = 60, 30
NUM_AT_ONCE = 2


def signalled(talk: Talk, number: int, begins: str, seed: int) -> tuple[list[str], bool]:
    """What a process says that gets a signal at a random moment of a random step, and whether it got it."""
    chance = random.Random(seed)
    where = f"{begins} {chance.randrange(1, 23)}"
    said, is_sent = [], False
    for line in talk:
        said.append(line)
        if line == where:
            # A step takes a few milliseconds, one with a validation some more.
            time.sleep(chance.uniform(0, 0.03))
            # A fast machine may have done all of the run by now.
            with suppress(ProcessLookupError):
                os.kill(talk.process.pid, number)
            is_sent = True
    talk.process.join()
    return said, is_sent


def interrupt(folder: Path, seed: int, place: str) -> str:
    """Interrupts a run. Returns what is wrong then; empty if nothing is."""
    said, is_sent = signalled(Talk(interrupted, folder, place), signal.SIGINT, "begins", seed)
    if not is_sent or "ended with SystemExit" not in said or not said[-1].startswith("problems"):
        return f"not interrupted: {said[-3:]}"
    return said[-1].removeprefix("problems").strip()


def finished(folder: Path, place: str) -> dict[str, Any]:
    """What a run leaves at its end, from the last checkpoint on if there is one."""
    said = list(Talk(main, folder, -1, place))
    if not (folder / "end.pt").exists():
        raise RuntimeError(f"the run did not end: {said[-3:]}")
    end: dict[str, Any] = torch.load(folder / "end.pt", weights_only=True)
    return end


def kill(folder: Path, seed: int, place: str, whole: dict[str, Any]) -> str:
    """Kills a run and starts it again. Returns how its end differs from that of a whole run; empty if it does not."""
    _, is_sent = signalled(Talk(main, folder, -1, place), signal.SIGKILL, "step", seed)
    if not is_sent:
        return "it was not killed"
    end = finished(folder, place)
    return " and ".join(key for key in end if not same(end[key], whole[key]))


def many(attempt: Callable[[Path, int], str], number: int, root: Path) -> list[str]:
    """What is wrong after each attempt, in folders of their own."""

    def once(seed: int) -> str:
        with tempfile.TemporaryDirectory(dir=root) as folder:
            return attempt(Path(folder), seed)

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        return list(pool.map(once, range(number)))


def run(num_interrupts: int, num_kills: int, root: Path) -> dict[str, Any]:
    """For each place, the numbers of interrupts and kills, and what was wrong after some of them."""
    (root / "whole").mkdir()
    whole = finished(root / "whole", "device")
    found: dict[str, Any] = {}
    for place in PLACES:
        after_interrupts = many(partial(interrupt, place=place), num_interrupts, root)
        after_kills = many(partial(kill, place=place, whole=whole), num_kills, root)
        found[place] = {
            "interrupts": num_interrupts,
            "wrong after interrupts": [each for each in after_interrupts if each],
            "kills": num_kills,
            "wrong after kills": [each for each in after_kills if each],
        }
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        record = run(NUM_INTERRUPTS, NUM_KILLS, Path(folder))
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
