"""The observer rule: training with the callback is bit-identical to training without it."""

import copy
import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from merge_callback import Ema, MergeCallback, PowerEma, Window
from tests.helpers.toys import DEVICE, BusyToy, Toy, assert_same_training, batches, fit, lightning, make, same
from tests.prediction.test_predictor import prefilled

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("both_lightnings")]

MERGES = {"sma": "sma", "late": Window(span=0.3), "sqrt": "1-sqrt", "ema": Ema(half_life_steps=3), "edm": PowerEma(0.1)}


@pytest.mark.parametrize("module_class", [pytest.param(Toy, marks=pytest.mark.slow), BusyToy])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
        {"val_check_interval": 1.0},
        {"limit_val_batches": 2},
    ],
    ids=["plain", "accumulation", "bf16-mixed", "at-epoch-end", "limited"],
)
@pytest.mark.parametrize(
    "callback_arguments",
    [
        {},
        pytest.param({"every_n_train_steps": 2, "limit_batches": 1}, marks=pytest.mark.slow),
        pytest.param({"every_n_train_steps": 5, "snapshot": "mean", "mean_samples": 3}, marks=pytest.mark.slow),
    ],
    ids=["all", "limited", "means"],
)
@pytest.mark.sample(1)
def test_training_is_bit_identical_with_and_without_the_callback(tmp_path, module_class, arguments, callback_arguments):
    without = fit(make(module_class), tmp_path / "without", **arguments)
    records = prefilled(tmp_path / "anneals.jsonl")
    callback = MergeCallback(num_snapshots=4, merges=MERGES, calibration=records, **callback_arguments)
    watched = fit(make(module_class), tmp_path / "with", callback, **arguments)
    assert all(watched.logged(f"{name}/val_loss") for name in ("merged", "merged_ema", "merged_edm", "annealed"))
    assert_same_training(without, watched)
    if module_class is BusyToy:
        assert torch.equal(torch.stack(without.module.seen), torch.stack(watched.module.seen))
        assert without.module.num_validations == watched.module.num_validations


@pytest.mark.parametrize("storage", ["cpu", "files"])
@pytest.mark.slow
def test_training_is_bit_identical_wherever_snapshots_live(tmp_path, storage):
    without = fit(make(Toy), tmp_path / "without")
    in_memory = MergeCallback(2, 4, merges=MERGES)
    fit(make(Toy), tmp_path / "device", in_memory)
    callback = MergeCallback(2, 4, merges=MERGES, storage=tmp_path / "snapshots" if storage == "files" else storage)
    watched = fit(make(Toy), tmp_path / "with", callback)
    assert_same_training(without, watched)
    for name in MERGES:
        assert same(callback.merged_state_dict(name), in_memory.merged_state_dict(name))


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.slow
def test_a_loader_with_a_generator_of_its_own_gives_the_live_validation_the_same_order(tmp_path):
    def shuffled():
        return DataLoader(batches(24).dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(3))

    without = fit(make(BusyToy), tmp_path / "without", validation=shuffled())
    watched = fit(make(BusyToy), tmp_path / "with", MergeCallback(2, 3), validation=shuffled())
    assert watched.logged("merged/val_loss")
    assert_same_training(without, watched)
    assert torch.equal(torch.stack(without.module.seen), torch.stack(watched.module.seen))


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_at_a_rate_of_zero_live_and_merged_values_are_equal_to_the_bit(tmp_path):
    module = make(BusyToy, learning_rate=0.0)
    module.norm.momentum = 0.0
    run = fit(module, tmp_path, MergeCallback(1, 3), validation=batches(24, 4, shuffle=True))
    for metrics in run.epoch_metrics:
        for name in ("val_loss", "val_accuracy", "val/noisy_loss", "val/noisy_loss_epoch", "micro", "mean_noise"):
            assert torch.equal(metrics[f"merged/{name}"], metrics[name]), name


@pytest.mark.filterwarnings("ignore:MergeCallback.*where a merged validation is left out")
def test_looking_for_what_is_monitored_before_a_validation_that_is_left_out_changes_nothing(tmp_path):
    stopping = lightning(".callbacks").EarlyStopping("merged/val_loss", patience=9, check_on_train_epoch_end=False)
    without = fit(make(BusyToy), tmp_path / "without")
    watched = fit(make(BusyToy), tmp_path / "with", MergeCallback(1, 3, max_overhead=1e-9), stopping)
    assert len(watched.logged("merged/val_loss")) == 1
    assert_same_training(without, watched)


def test_other_callbacks_are_there_in_the_merged_validation_but_their_hooks_are_not_called(tmp_path):
    class Asking(Toy):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if not self.trainer.sanity_checking:
                assert isinstance(self.trainer.progress_bar_callback, lightning(".callbacks").RichProgressBar)
                assert self.trainer.early_stopping_callback.patience == 100
                self.steps = getattr(self, "steps", 0) + 1

    counts = []
    for callbacks in ([], [MergeCallback(2, 3)]):
        counting = Counting()
        stopping = lightning(".callbacks").EarlyStopping("val_loss", patience=100, check_on_train_epoch_end=False)
        bars = [lightning(".callbacks").RichProgressBar(), stopping, counting]
        run = fit(make(Asking), tmp_path / str(len(counts)), *callbacks, *bars, enable_progress_bar=True)
        counts.append((counting.hooks, run.module.steps, stopping.state_dict()))
    assert counts[0] == counts[1]


class Counting(Callback):
    def __init__(self):
        self.hooks = []

    def on_validation_start(self, *args):
        self.hooks.append("start")

    def on_validation_batch_end(self, *args):
        self.hooks.append("batch")

    def on_validation_epoch_end(self, *args):
        self.hooks.append("end")


def test_what_is_written_to_the_logger_directly_is_the_live_validation_s_and_nothing_is_printed(tmp_path, capfd):
    class Direct(Toy):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.logger.log_metrics({"direct": float(self(batch[0]).mean())}, step=1000 + self.global_step)
            self.logger.experiment.log_hparams({"anything": 1})

    without = fit(make(Direct), tmp_path / "without")
    watched = fit(make(Direct), tmp_path / "with", MergeCallback(2, 3))
    assert_same_training(without, watched)
    # Three batches in each of six validations, and two in the sanity check.
    assert len(watched.logged("direct")) == 3 * 6 + 2
    assert "Validate metric" not in capfd.readouterr().out


def test_the_callback_leaves_nothing_on_trainer_and_module(tmp_path):
    callback = MergeCallback(2, 3)
    run = fit(make(Toy), tmp_path, callback)
    assert "run" not in vars(run.trainer.fit_loop.epoch_loop.val_loop)
    assert "on_validation_epoch_end" not in vars(run.module)
    assert callback in run.trainer.callbacks


def test_a_checkpoint_that_a_signal_handler_saves_in_the_merged_validation_is_the_live_one(tmp_path):
    class Interrupted(Toy):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            is_merged = type(self.trainer.fit_loop.epoch_loop.val_loop.run).__name__ != "_ObservedRun"
            if self.handler is not None and is_merged and self.global_step == 12 and batch_idx == 1:
                self.handler(self.trainer)

        handler = None

    def handler(trainer):
        # What a handler does, at the moment at which it would.
        trainer.save_checkpoint(tmp_path / "interrupted.ckpt")

    class Saving(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 12:
                trainer.save_checkpoint(tmp_path / "trained.ckpt")

        def on_validation_start(self, trainer, pl_module):
            if trainer.global_step == 12:
                trainer.save_checkpoint(tmp_path / "before.ckpt")

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            checkpoint["noted"] = trainer.global_step

    def validation_state(checkpoint):
        return {key: value for key, value in checkpoint["loops"]["fit_loop"].items() if "val_loop" in key}

    callback = MergeCallback(2, 3)
    without = fit(make(Interrupted), tmp_path / "without")
    module = make(Interrupted)
    module.handler = handler
    watched = fit(module, tmp_path / "with", callback, Saving())
    assert_same_training(without, watched)
    expected, saved = (torch.load(tmp_path / name, weights_only=True) for name in ("before.ckpt", "interrupted.ckpt"))
    assert same(dict(saved["state_dict"]), dict(expected["state_dict"]))
    assert saved["callbacks"].keys() == expected["callbacks"].keys()
    assert saved["global_step"] == saved["noted"] == 12
    # The live validation is one that has begun, so that a run that resumes from here repeats it.
    saved_state, key = validation_state(saved), "epoch_loop.val_loop.batch_progress"
    assert saved_state.pop(key)["current"] == {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    trained_state = validation_state(torch.load(tmp_path / "trained.ckpt", weights_only=True))
    assert trained_state.pop(key)
    assert saved_state == trained_state != {}
    assert [step for step, _ in watched.logged("merged/val_loss")] == [3, 7, 11, 15, 19, 23]


@pytest.mark.slow
def test_workers_that_persist_draw_for_the_live_validation_as_they_would_alone(tmp_path):
    def run(folder, *callbacks):
        loader = DataLoader(batches(24).dataset, 4, num_workers=1, persistent_workers=True)
        return fit(
            make(BusyToy), tmp_path / folder, *callbacks, validation=loader, num_sanity_val_steps=0, max_steps=12
        )

    without, watched = run("without"), run("with", MergeCallback(2, 3))
    assert watched.logged("merged/val_loss")
    assert_same_training(without, watched)


def test_folders_of_the_logger_can_be_used_in_the_merged_validation(tmp_path):
    class Writing(Toy):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            assert Path(self.trainer.log_dir).parent.name == "lightning_logs"
            assert Path(self.logger.log_dir) == Path(self.trainer.log_dir)
            assert isinstance(self.logger, lightning(".loggers").CSVLogger)

    assert fit(make(Writing), tmp_path, MergeCallback(2, 3)).logged("merged/val_loss")


def test_the_module_can_be_pickled_and_copied_at_the_end_of_a_validation(tmp_path):
    class Copying(Callback):
        copies = 0

        def on_validation_end(self, trainer, pl_module):
            assert "on_validation_epoch_end" not in vars(pl_module)
            copy.deepcopy(pl_module)
            self.copies += 1

    copying = Copying()
    fit(make(Toy), tmp_path, MergeCallback(2, 3), copying)
    assert copying.copies == 7


def test_what_a_validation_changes_in_objects_and_buffers_is_the_live_validation_s_alone(tmp_path):
    class Meter:
        def __init__(self):
            self.sum, self.history = 0.0, []

    class Keeping(Toy):
        def __init__(self):
            super().__init__()
            self.meter = Meter()
            self.counts = np.zeros(3)
            self.register_buffer("count", torch.zeros(()))

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.meter.sum += 1.0
            self.meter.history.append(batch_idx)
            self.counts[batch_idx] += 1
            self.count = self.count + 1
            self.log_dict({"sum": self.meter.sum, "counts": self.counts.sum(), "buffer": self.count.clone()})

    without = fit(make(Keeping), tmp_path / "without")
    watched = fit(make(Keeping), tmp_path / "with", MergeCallback(2, 3))
    assert_same_training(without, watched)
    assert watched.module.meter.sum == watched.module.count == watched.module.counts.sum() == 20
    assert len(watched.module.meter.history) == 20


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_a_barebones_trainer_is_left_alone(tmp_path):
    callback = MergeCallback(2, 3)
    trainer = lightning().Trainer(barebones=True, max_steps=6, callbacks=[callback], accelerator=DEVICE.type)
    trainer.fit(make(Toy), batches(), batches(24, 8, shuffle=False))
    assert callback.snapshot_steps == [2, 4, 6]
    assert not any(name.startswith("merge") for name in trainer.callback_metrics)


def step_the_schedule(module):
    module.lr_schedulers().step()


def raise_weight_decay(module):
    for group in module.trainer.optimizers[0].param_groups:
        group["weight_decay"] += 0.1


def halve_the_clip(module):
    module.trainer.gradient_clip_val = (module.trainer.gradient_clip_val or 1.0) / 2


def freeze_or_unfreeze(module):
    module.out.bias.requires_grad_(not module.out.bias.requires_grad)


def stop_early(module):
    # The merge is below that at once, and the live model above it after 28 steps.
    if not 1.1 <= module.trainer.callback_metrics["val_loss"] <= 1.9:
        module.trainer.should_stop = True


def ask_for_metrics(module):
    metrics = module.trainer.callback_metrics
    module.log("gap", metrics["val_loss"] - metrics["train_loss"])
    module.log("in_bar", module.trainer.progress_bar_metrics["val_loss"])


def count_elsewhere(module):
    module.meter.update(float(module.trainer.callback_metrics["val_loss"]))
    module.note.calls += 1
    module.log("best", module.meter.best)
    module.log("calls", float(module.note.calls))


METER = """
class Meter:
    best = float("inf")

    def update(self, value):
        self.best = min(self.best, value)
"""
ACTS = [
    step_the_schedule,
    raise_weight_decay,
    halve_the_clip,
    freeze_or_unfreeze,
    stop_early,
    ask_for_metrics,
    count_elsewhere,
]


@pytest.mark.filterwarnings("ignore:The trainable parameters changed", "ignore:Detected call of .lr_scheduler.step")
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.sample(1)
def test_what_hooks_of_the_validation_do_to_the_training_is_done_once(tmp_path, monkeypatch, act):
    (tmp_path / "meter_of_the_user.py").write_text(METER)
    monkeypatch.syspath_prepend(tmp_path)

    class Acting(Toy):
        def __init__(self):
            super().__init__(warmup_steps=6)
            # Its losses are those of every device.
            self.dropout.p = 0.0
            self.meter = importlib.import_module("meter_of_the_user").Meter()
            self.note = SimpleNamespace(calls=0)

        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                act(self)

    without = fit(make(Acting), tmp_path / "without", max_steps=40)
    watched = fit(make(Acting), tmp_path / "with", MergeCallback(1, 4, start=0), max_steps=40)
    assert watched.logged("merged/val_loss")
    assert_same_training(without, watched)
    idle = make(Toy, warmup_steps=6)
    idle.dropout.p = 0.0
    plain = fit(idle, tmp_path / "plain", max_steps=40)
    does_something = act not in (ask_for_metrics, count_elsewhere)
    assert same(plain.module.state_dict(), without.module.state_dict()) != does_something
