"""The demo with and without the callback, in turns."""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from contest import wait_for_device
from hydra import compose, initialize_config_module
from lightning.pytorch import Callback
from omegaconf import DictConfig
from torch.profiler import ProfilerActivity, profile

from merge_callback import MergeCallback
from merge_callback.apps.train import prepare
from merge_callback.prediction.predictor import AnnealPredictor
from merge_callback.prediction.records import AnnealRecord
from merge_callback.prediction.validations import StableValidation

WITHOUT, WITH = "without the callback", "with the callback"
NUM_HOOK_STEPS = 50
HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


@dataclass(frozen=True)
class Training:
    """The demo, on a device.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        overrides: Of its config, such as another size.
    """

    device: str = "cpu"
    overrides: tuple[str, ...] = ()

    def config(self, *overrides: str) -> DictConfig:
        """The demo's, without its progress bar."""
        fixed = ("~callbacks.progress_bar", "+trainer.enable_progress_bar=false", f"+trainer.accelerator={self.device}")
        with initialize_config_module("merge_callback.apps.commands", version_base="1.3"):
            return compose("demo", [*fixed, "+trainer.devices=1", *self.overrides, *overrides])

    def fit(self, num_steps: int, *callbacks: Callback) -> None:
        """Trains with those callbacks, and validates nothing."""
        options = {"max_steps": num_steps, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        prepare(self.config("callbacks/merge=none"), callbacks, loggers=[], **options).fit()


class HookClock:
    """Adds up the seconds that a callback spends in its hooks of every training batch."""

    def __init__(self, callback: Callback) -> None:
        self.calls: dict[str, list[float]] = {hook: [] for hook in HOOKS}
        for hook in HOOKS:
            setattr(callback, hook, self._timed(hook, getattr(callback, hook)))

    @property
    def seconds_of_steps(self) -> list[float]:
        """Per training step."""
        return [sum(calls) for calls in zip(*self.calls.values(), strict=True)]

    def _timed(self, name: str, hook: Any) -> Any:
        def timed(*arguments: Any) -> None:
            began = time.perf_counter()
            hook(*arguments)
            self.calls[name].append(time.perf_counter() - began)

        return timed


class AlternatingBlocks(Callback):
    """Takes a callback out of the trainer's list and puts it back, block by block, with a clock on every block.

    Has to be the last callback: a block ends when all others have seen its last batch. In every second pair of blocks
    the one with the callback comes first.
    """

    def __init__(self, callback: Callback, block_steps: int, num_pairs: int) -> None:
        self.callback = callback
        self.block_steps = block_steps
        # One block of warm-up, with the callback.
        order = [name for pair in range(num_pairs) for name in ((WITHOUT, WITH) if pair % 2 == 0 else (WITH, WITHOUT))]
        self.blocks = [WITH, *order]
        self.seconds: list[float] = []
        self._began = 0.0

    @property
    def num_steps(self) -> int:
        """Of all blocks."""
        return len(self.blocks) * self.block_steps

    @property
    def counted(self) -> dict[str, list[float]]:
        """Seconds of a step in every block but the first, by kind."""
        blocks = list(zip(self.blocks, self.seconds, strict=True))[1:]
        return {kind: [s / self.block_steps for name, s in blocks if name == kind] for kind in (WITHOUT, WITH)}

    def on_train_start(self, trainer, pl_module) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step % self.block_steps:
            return
        wait_for_device()
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        if len(self.seconds) < len(self.blocks):
            # Another list, since this one is being gone through.
            others = [callback for callback in trainer.callbacks if callback is not self.callback]
            is_in = self.blocks[len(self.seconds)] == WITH
            trainer.callbacks = [self.callback, *others] if is_in else others
        self._began = time.perf_counter()


def paired_blocks(training: Training, block_steps: int, num_pairs: int, **arguments: Any) -> dict[str, list[float]]:
    """Seconds of a training step by block, without and with a callback of those arguments; and those in its hooks."""
    callback = MergeCallback(**arguments)
    blocks = AlternatingBlocks(callback, block_steps, num_pairs)
    training.fit(blocks.num_steps, callback, blocks)
    callback = MergeCallback(**arguments)
    clock = HookClock(callback)
    training.fit(NUM_HOOK_STEPS, callback)
    return {**blocks.counted, "in the callback's hooks": clock.seconds_of_steps}


def hooks_in_large_steps(training: Training, num_steps: int) -> dict[str, list[float]]:
    """Seconds of training steps, and of the callback's hooks in them, between captures."""
    callback = MergeCallback(every_n_train_steps=10**9)
    clock, steps = HookClock(callback), AlternatingBlocks(callback, 1, 0)
    steps.blocks = [WITH] * num_steps
    training.fit(num_steps, callback, steps)
    return {WITH: steps.seconds[1:], "in the callback's hooks": clock.seconds_of_steps[1:]}


def long_run(training: Training, num_steps: int, num_validations: int, num_records: int) -> dict[str, list[float]]:
    """Seconds of the callback's hooks in each step of a long fit of a tiny model, and of learning from validations.

    Args:
        training: What trains.
        num_steps: Of the fit.
        num_validations: Live and merged ones.
        num_records: Real anneals of other runs in the file that the callback predicts from.
    """
    tiny = ("model.width=8", "model.num_heads=1", "model.num_layers=1", "demo.context=16", "data.batch_size=1")
    callback = MergeCallback()
    clock, learning = HookClock(callback), []
    learn = AnnealPredictor.learn

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        problems = learn(*arguments, **named)
        learning.append(time.perf_counter() - began)
        return problems

    with tempfile.TemporaryDirectory() as folder, patch.object(AnnealPredictor, "learn", timed):
        callback.calibration = str(Path(folder) / "anneals.jsonl")
        callback.begin_anew()
        with Path(callback.calibration).open("w") as file:
            file.writelines(f"{json.dumps(asdict(_old_record(index)))}\n" for index in range(num_records))
        config = training.config(*tiny, "callbacks/merge=none", "data.num_validation_blocks=8")
        options = {"max_steps": num_steps, "val_check_interval": num_steps // num_validations}
        prepare(config, [callback], loggers=[], num_sanity_val_steps=0, **options).fit()
    return {"in the callback's hooks": clock.seconds_of_steps, "learning from a validation": learning}


def _old_record(index: int) -> AnnealRecord:
    matched = StableValidation(1000, 90, {"val_loss": 1.5}, {"val_loss": 1.4 - index % 7 / 1000}, "sma")
    return AnnealRecord(f"run {index}", 900, 1000, 100, "linear", {"val_loss": 1.39}, matched=matched)


class ProfiledWaits(Callback):
    """Counts the calls by which the host waits for a GPU, in training steps after a warm-up. The last callback."""

    NAMES = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    num_warm_up = 10
    num_counted = 20

    def __init__(self) -> None:
        self.num_steps = self.num_warm_up + self.num_counted
        self.counts: dict[str, int] = {}
        self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.num_warm_up:
            self._profile.start()
        elif trainer.global_step == self.num_steps:
            self._profile.stop()
            names = [event.name for event in self._profile.events()]
            self.counts = {name: names.count(name) for name in self.NAMES}


class ValidationClock(Callback):
    """Seconds of every live validation, and of the merged ones before it."""

    def __init__(self) -> None:
        self.live: list[float] = []
        self.merged: list[float] = []

    def on_validation_start(self, trainer, pl_module) -> None:
        wait_for_device()
        self._began = time.perf_counter()

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.sanity_checking:
            return
        wait_for_device()
        self.live.append(time.perf_counter() - self._began)
        if "merge/seconds" in trainer.callback_metrics:
            self.merged.append(float(trainer.callback_metrics["merge/seconds"]))


def demo_run(training: Training, num_steps: int, *, merges: bool) -> dict[str, Any]:
    """Seconds of a run of the demo, and of its validations and hooks."""
    validations = ValidationClock()
    with tempfile.TemporaryDirectory() as folder:
        config = training.config(
            f"trainer.max_steps={num_steps}",
            "~logger.tensorboard",
            f"logger.csv.save_dir={folder}",
            *([f"callbacks.merge.calibration={Path(folder, 'anneals.jsonl')}"] if merges else ["callbacks/merge=none"]),
        )
        run = prepare(config, [validations])
        clocks = [HookClock(c) for c in run.trainer.callbacks if isinstance(c, MergeCallback)]
        began = time.perf_counter()
        run.fit()
        seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 4),
        "live_validations": [round(each, 5) for each in validations.live],
        "merged_validations": [round(each, 5) for each in validations.merged],
        "hooks": round(sum(sum(clock.seconds_of_steps) for clock in clocks), 5),
    }


def paired_runs(training: Training, num_steps: int, num_pairs: int) -> Iterator[dict[str, Any]]:
    """Pairs of runs, the order of which changes from pair to pair."""
    demo_run(training, 20, merges=True)
    for pair in range(num_pairs):
        order = (False, True) if pair % 2 == 0 else (True, False)
        runs = {merges: demo_run(training, num_steps, merges=merges) for merges in order}
        yield {WITHOUT: runs[False], WITH: runs[True]}


def live_seconds(pair: dict[str, Any]) -> float:
    """What one live validation takes: the median over both runs of a pair."""
    return statistics.median(pair[WITHOUT]["live_validations"] + pair[WITH]["live_validations"])


def share_of_run(pair: dict[str, Any]) -> float:
    """What the callback costs beyond the batches that its merges are validated on, over the run without it."""
    batches = len(pair[WITH]["merged_validations"]) * live_seconds(pair)
    return (pair[WITH]["seconds"] - pair[WITHOUT]["seconds"] - batches) / pair[WITHOUT]["seconds"]


def share_by_clocks(pair: dict[str, Any]) -> float:
    """The same from the clocks inside the run."""
    merged = pair[WITH]["merged_validations"]
    return (sum(merged) - len(merged) * live_seconds(pair) + pair[WITH]["hooks"]) / pair[WITHOUT]["seconds"]
