"""How much memory and time does a merge of large checkpoints on disk take?

Statistic: peak resident memory of the whole program, and seconds, for 2, 5 and 10 Lightning checkpoints of 1 GB each
(300 tensors, the largest of 400 MB), into a `.safetensors` and into a `.ckpt`. Files were just written, so that memory
and not the disk is measured.
Pass rule: at most 1.5 GB for ten of them, and no more than 50 MB above that for two.

Then the ten into a folder of torch.distributed.checkpoint, by one and by two ranks, with nothing of the checkpoints in
memory before: bytes read a second, as a share of what the disk gives when the files are read one after the other, three
times each in turn, the median. Goal: at least .8 of it.

    python benchmarks/offline_merge/run.py          # a few minutes, 12 GB of disk; writes record.json
    python benchmarks/offline_merge/run.py folders  # the folders alone; the rest of the record stays
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

RECORD = Path(__file__).with_name("record.json")
NUMBERS = (2, 5, 10)
PROGRAM = """
import os, sys, time
import torch
from pathlib import Path
from merge_callback.checkpoints.merge import merge_checkpoints
if "WORLD_SIZE" in os.environ:
    torch.distributed.init_process_group("gloo")
began = time.perf_counter()
merge_checkpoints(sys.argv[2:], sys.argv[1], "1-sqrt")
seconds = time.perf_counter() - began
# What the kernel counts for the program alone; the figure that a program asks for itself begins with its parent's.
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
# Written at once, since several ranks may write at the same time.
sys.stdout.write(f"{int(peak.split()[1]) * 1024} {seconds}\\n")
"""
NUM_TURNS = 3


def forget(paths: list[str]) -> None:
    """Lets the system drop what it keeps of files in memory."""
    for path in paths:
        with Path(path).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(paths: list[str]) -> float:
    """How long it takes to read files one after the other."""
    forget(paths)
    buffer, began = bytearray(2**24), time.perf_counter()
    for path in paths:
        with Path(path).open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def folder_seconds(paths: list[str], output: Path, program: Path, num_ranks: int) -> tuple[float, float]:
    """Largest peak of memory of a rank, and the seconds of the slowest one, for a merge into a folder."""
    forget(paths)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(output), *paths], capture_output=True, text=True, check=True, env=environment)
    shutil.rmtree(output)
    ranks = [tuple(map(float, line.split())) for line in done.stdout.splitlines() if line.strip()]
    assert len(ranks) == num_ranks
    return max(peak for peak, _ in ranks), max(seconds for _, seconds in ranks)


def folders(paths: list[str], folder: Path) -> dict:
    """Merges into folders by one and two ranks, beside plain reading."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    num_bytes = sum(Path(path).stat().st_size for path in paths)
    reading: list[float] = []
    merging: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(NUM_TURNS):
        reading.append(read_seconds(paths))
        for num_ranks, turns in merging.items():
            turns.append(folder_seconds(paths, folder / "merged", program, num_ranks))
    runs = [
        {
            "num_ranks": num_ranks,
            "peak_bytes": max(peak for peak, _ in turns),
            "seconds": median(seconds for _, seconds in turns),
            "share_of_read_speed": median(reading) / median(seconds for _, seconds in turns),
        }
        for num_ranks, turns in merging.items()
    ]
    return {"read_bytes_per_second": num_bytes / median(reading), "runs": runs}


def main() -> None:
    """Makes checkpoints, merges them, and records what it took."""
    shapes = {"embedding": (50_000, 2_000), **{f"layer.{n}.weight": (500, 1_000) for n in range(299)}}
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    runs = record.get("runs", []) if sys.argv[1:] == ["folders"] else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in range(max(NUMBERS)):
            state = {key: torch.randn(shape) for key, shape in shapes.items()}
            torch.save({"state_dict": state, "global_step": step + 1}, folder / f"step-{step + 1}.ckpt")
        size = (folder / "step-1.ckpt").stat().st_size
        of_folders = folders([str(folder / f"step-{step + 1}.ckpt") for step in range(max(NUMBERS))], folder)
        print(of_folders)
        for suffix in () if sys.argv[1:] == ["folders"] else (".safetensors", ".ckpt"):
            for number in NUMBERS:
                paths = [str(folder / f"step-{step + 1}.ckpt") for step in range(number)]
                command = [sys.executable, "-c", PROGRAM, str(folder / f"merged{suffix}"), *paths]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                peak, seconds = map(float, done.stdout.split())
                runs.append({"output": suffix, "num_checkpoints": number, "peak_bytes": peak, "seconds": seconds})
                print(runs[-1])
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=RECORD.parent, text=True).strip()
    about = {"torch": version("torch"), "processor": platform.processor() or platform.machine(), "commit": commit}
    about = {"about": record["about"], "folders_about": about} if sys.argv[1:] == ["folders"] else {"about": about}
    found = {**about, "checkpoint_bytes": size, "runs": runs, "folders": of_folders}
    RECORD.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
