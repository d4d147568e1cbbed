"""A run that says what it is doing, so that a test can kill it there.

Saves a checkpoint after every step and resumes from it when it is started again. At the end it leaves what came of it.
"""

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from merge_callback import Ema, MergeCallback, Window
from merge_callback.capture.running_averages import Shadow
from merge_callback.live.swap import is_swapped
from tests.helpers.processes import CONTEXT, begin
from tests.helpers.toys import ResumableBatches, Toy, Tracker, fit, make, same

# In a process of its own, the test that started it.
LISTENERS: list[Any] = []


class Talk:
    """A process that runs one of the functions of this file, and what it says, line by line, until it ends."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._receiver, sender = CONTEXT.Pipe(duplex=False)
        self.process = begin(_talking, sender, function, arguments)
        sender.close()

    def __iter__(self) -> Iterator[str]:
        try:
            while True:
                yield self._receiver.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(120)


def _talking(sender: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    LISTENERS.append(sender)
    warnings.simplefilter("ignore")
    function(*arguments)


def say(*words: Any) -> None:
    """Tells the test something."""
    for listener in LISTENERS:
        listener.send(" ".join(map(str, words)))


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


def main(folder, large_save_at=-1, place="device"):
    path = folder / "last.ckpt"
    merges = {"late": Window(span=0.4), "sma": "sma", "ema": Ema(half_life_steps=4)}
    callback = MergeCallback(3, 4, merges=merges, storage=folder / "snapshots" if place == "files" else place)
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
        "coefficients": [callback.coefficients(name) for name in ("late", "sma")],
    }
    # A run that was killed at its very end has no further validation.
    if run.epoch_metrics:
        state["last_values"] = {k: v for k, v in run.epoch_metrics[-1].items() if k != "merge/seconds"}
    torch.save(state, folder / "end.pt")


class Saying(Callback):
    """Says which step begins."""

    def on_train_batch_start(self, trainer, *args):
        say("begins", trainer.global_step)


def interrupted(folder, place):
    """A run that gets an interrupt somewhere, and says whether all that was captured is what it should be."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The coverage would wait forever for its own lock, were it interrupted while it has that.
    sys.settrace(None)
    profile, tracker = Ema(half_life_steps=2), Tracker()
    storage = folder / "snapshots" if place == "files" else place
    callback = MergeCallback(1, 4, merges={"sma": "sma", "ema": profile}, storage=storage)
    saving = OnExceptionCheckpoint(folder, "interrupted")
    # Without end: it is always interrupted.
    settings = {"max_steps": -1, "max_epochs": -1, "val_check_interval": 2, "enable_checkpointing": True}
    try:
        fit(make(Toy), folder, tracker, callback, Saying(), saving, **settings)
    except BaseException as error:
        say("ended with", type(error).__name__)
    averages = averages_of(profile, tracker)
    capture = callback.session.capture
    found = {step: dict(tensors) for step, tensors in capture.ring.snapshots()} if capture.ring else {}
    problems = [
        f"snapshot {step}" for step, tensors in found.items() if not same(tensors, tracker.parameters.get(step))
    ]
    average = capture.averages["ema"]
    if average.step is not None and not same(average.tensors, averages.get(average.step)):
        problems.append(f"average of {average.step}")
    problems += [name for name, tensor in callback.session.module.named_parameters() if is_swapped(tensor)]
    if (folder / "interrupted.ckpt").exists():
        saved = torch.load(folder / "interrupted.ckpt", weights_only=True)["callbacks"][callback.state_key]
        step = saved["capture"]["averages"]["profiles"]["ema"]["step"]
        known = {"average.ema": averages.get(step)}
        known |= {f"snapshot.{step}": tensors for step, tensors in tracker.parameters.items()}
        for key, tensor in saved["tensors"].items():
            kind, which, name = key.split(".", 2)
            if not same(tensor, known[f"{kind}.{which}"][name]):
                problems.append(f"saved {key}")
        say("saved", len(saved["tensors"]), "tensors at step", saved["step"])
    say("problems", *problems)


def averages_of(profile, tracker):
    """What the average over every step is after each step, made anew from the weights."""
    shadow, found = Shadow(profile), {}
    for step, parameters in tracker.parameters.items():
        shadow.update(step, parameters)
        found[step] = {name: tensor.clone() for name, tensor in shadow.tensors.items()}
    return found


class Terminated(Talking):
    """Sends itself a signal in the first validation of a merge."""

    trained = None

    def on_train_batch_end(self, *args):
        self.trained = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.trained and not same(dict(self.state_dict()), self.trained):
            say("terminated in the merge")
            os.kill(os.getpid(), self.signal)


def terminated(folder, number):
    """A run that gets a signal in the validation of a merge, and says what is left."""
    # A shell that starts its jobs in the background has them ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module = make(Terminated)
    module.signal = number
    try:
        fit(module, folder, MergeCallback(2, 3))
    except BaseException as error:
        say("ended with", type(error).__name__)
    say("live weights are back" if same(dict(module.state_dict()), module.trained) else "other weights")
