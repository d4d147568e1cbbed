"""What does the loss look like between snapshots, and from the live model over the merge to the annealed one?

The paper's contour figure on the demo's model: 1,000 steps at a constant rate, then (a) the plane through the snapshots
of steps 920, 960 and 1,000, with their mean, and (b) the way from the live weights of step 1,000 to the uniform merge
of the ten snapshots since step 900, and on to the weights after a linear decay from step 900 to 1,000. One seed, the
demo's validation text. It asks for no pass or fail; it is made with the commands that users have.

    python benchmarks/landscape/run.py  # ten minutes on one core; writes records/ and docs/pictures/
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORDS = Path(__file__).parent / "records"
END, START, EVERY = 1000, 900, 10
# Of the demo.
CONFIGS = str(ROOT / "src" / "merge_callback" / "apps" / "commands")
KEPT = ["every_n_train_steps=10", "save_top_k=-1", "filename='{step}'", "auto_insert_metric_name=false"]


def run(folder: Path, name: str, *arguments: str) -> None:
    """One command, in a folder."""
    program = str(Path(sys.executable).with_name("merge-callback"))
    command = [program, name, *arguments]
    subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def keeping(folder: str) -> list[str]:
    """Overrides for a run that keeps checkpoints there."""
    target = "+callbacks.kept._target_=lightning.pytorch.callbacks.ModelCheckpoint"
    return [target, f"+callbacks.kept.dirpath={folder}", *(f"+callbacks.kept.{option}" for option in KEPT)]


def main() -> None:
    """Trains, anneals, merges, and looks at what lies between."""
    demo = [
        "--config-dir",
        CONFIGS,
        "--config-name",
        "demo",
        "callbacks/merge=none",
        "callbacks.progress_bar=null",
        "hydra.run.dir=output",
    ]
    steps = [f"trainer.max_steps={END}", f"trainer.val_check_interval={END}", "trainer.enable_checkpointing=true"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(folder, "train", *demo, *steps, *keeping("trunk"))
        anneal = [f"anneal.from=trunk/{START}.ckpt", f"anneal.span_steps={END - START}"]
        run(folder, "train", *demo, *steps[1:], *anneal, *keeping("branch"))
        snapshots = [f"trunk/{step}.ckpt" for step in range(START + EVERY, END + 1, EVERY)]
        run(folder, "merge", f"checkpoints=[{','.join(snapshots)}]", "output=merged.ckpt")
        look = [*demo[:4], f"landscape.output={RECORDS}", "landscape.limit_batches=32"]
        three = ", ".join(f"step {step}: trunk/{step}.ckpt" for step in (920, 960, END))
        run(
            folder,
            "landscape",
            *look,
            "+landscape=plane",
            "landscape.num_points=11",
            f"landscape.checkpoints={{{three}}}",
        )
        way = f"{{live: trunk/{END}.ckpt, merged: merged.ckpt, annealed: branch/{END}.ckpt}}"
        run(folder, "landscape", *look, "+landscape=line", f"landscape.checkpoints={way}")
    for kind in ("plane", "line"):
        (RECORDS / f"{kind}.png").replace(ROOT / "docs" / "pictures" / f"landscape_{kind}.png")


if __name__ == "__main__":
    main()
