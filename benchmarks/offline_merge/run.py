"""How much memory and time does a merge of large checkpoints on disk take?

Statistic: peak resident memory of the whole program, and seconds, for 2, 5 and 10 Lightning checkpoints of 1 GB each
(300 tensors, the largest of 400 MB), into a `.safetensors` and into a `.ckpt`. Files were just written, so that memory
and not the disk is measured.
Pass rule: at most 1.5 GB for ten of them, and no more than 50 MB above that for two.

    python benchmarks/offline_merge/run.py  # a few minutes, 12 GB of disk; writes record.json
"""

import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

RECORD = Path(__file__).with_name("record.json")
NUMBERS = (2, 5, 10)
PROGRAM = """
import sys, time
from pathlib import Path
from merge_callback.checkpoints.merge import merge_checkpoints
began = time.perf_counter()
merge_checkpoints(sys.argv[2:], sys.argv[1], "1-sqrt")
seconds = time.perf_counter() - began
# What the kernel counts for the program alone; the figure that a program asks for itself begins with its parent's.
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(int(peak.split()[1]) * 1024, seconds)
"""


def main() -> None:
    """Makes checkpoints, merges them, and records what it took."""
    shapes = {"embedding": (50_000, 2_000), **{f"layer.{n}.weight": (500, 1_000) for n in range(299)}}
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in range(max(NUMBERS)):
            state = {key: torch.randn(shape) for key, shape in shapes.items()}
            torch.save({"state_dict": state, "global_step": step + 1}, folder / f"step-{step + 1}.ckpt")
        size = (folder / "step-1.ckpt").stat().st_size
        for suffix in (".safetensors", ".ckpt"):
            for number in NUMBERS:
                paths = [str(folder / f"step-{step + 1}.ckpt") for step in range(number)]
                command = [sys.executable, "-c", PROGRAM, str(folder / f"merged{suffix}"), *paths]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                peak, seconds = map(float, done.stdout.split())
                runs.append({"output": suffix, "num_checkpoints": number, "peak_bytes": peak, "seconds": seconds})
                print(runs[-1])
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=RECORD.parent, text=True).strip()
    about = {"torch": version("torch"), "processor": platform.processor() or platform.machine(), "commit": commit}
    RECORD.write_text(json.dumps({"about": about, "checkpoint_bytes": size, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
