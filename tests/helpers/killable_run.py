"""A run that says what it is doing, so that a test can kill it there.

    python -m tests.helpers.killable_run FOLDER [STEP]

Saves a checkpoint after every step and resumes from it when it is started again. At the end it leaves what came of it.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from merge_callback import MergeCallback, Window
from tests.helpers.toys import ResumableBatches, Toy, fit, make


def say(*words):
    print(*words, flush=True)


class Talking(Toy):
    """Says which batch of which validation it is at; of two passes over the loader the first is the merge's."""

    num_passes = 0

    def on_validation_epoch_start(self):
        self.num_passes += 1

    def validation_step(self, batch, batch_idx):
        is_merged = self.trainer.fit_loop.epoch_loop.val_loop.run.__class__.__name__ != "_ObservedRun"
        say("merged" if is_merged else "live", self.trainer.global_step, batch_idx)
        super().validation_step(batch, batch_idx)


class SaveEveryStep(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, *args):
        trainer.save_checkpoint(self.path)
        say("step", trainer.global_step)


class LargeSaveAt(TorchCheckpointIO):
    """Makes the checkpoint of one step so large that writing it takes a while."""

    def __init__(self, step):
        self.step = step

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if checkpoint["global_step"] == self.step:
            checkpoint = checkpoint | {"padding": torch.ones(2**27)}
            say("saving", self.step)
        super().save_checkpoint(checkpoint, path, storage_options)


def main(folder, large_save_at=-1):
    path = folder / "last.ckpt"
    callback = MergeCallback(3, 4, merges={"late": Window(span=0.4), "sma": "sma"})
    module = make(Talking, warmup_steps=3)
    # Lightning's checkpoints hold no random states.
    module.dropout.p = 0.0
    run = fit(
        module,
        folder,
        callback,
        SaveEveryStep(path),
        train=ResumableBatches(),
        ckpt_path=str(path) if path.exists() else None,
        plugins=[LargeSaveAt(large_save_at)],
    )
    state = {
        "weights": dict(module.state_dict()),
        "merged": {name: callback.merged_state_dict(name) for name in callback.merges},
        "steps": callback.snapshot_steps,
        "coefficients": [callback.coefficients(name) for name in callback.merges],
        "last_values": {k: v for k, v in run.epoch_metrics[-1].items() if k != "merge/seconds"},
    }
    torch.save(state, folder / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
