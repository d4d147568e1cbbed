"""A run from its beginning to its end: steps, phases, what is said, and fits that go on."""

import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from merge_callback import MergeCallback
from tests.callbacks.test_anneal_branch import Stopper
from tests.helpers.toys import ResumableBatches, Toy, Tracker, assert_same_training, batches, fit, lightning, make


class TwoOptimizers(Toy):
    """Manual optimization with two optimizers that both step in every batch, or only every second batch."""

    def __init__(self, every=1):
        super().__init__()
        self.automatic_optimization = False
        self.every = every

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        if (batch_idx + 1) % self.every == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.inner.parameters(), 0.1), torch.optim.SGD(self.out.parameters(), 0.01)]


@pytest.mark.usefixtures("both_lightnings")
def test_a_step_of_several_optimizers_is_one_round_of_them(tmp_path):
    callback, tracker = MergeCallback(2, 3), Tracker()
    fit(make(TwoOptimizers), tmp_path, callback, tracker, max_steps=20)
    assert callback.snapshot_steps == [6, 8, 10]
    expected = tracker.merged(callback.coefficients())
    torch.testing.assert_close(callback.merged_state_dict()["out.weight"].double(), expected["out.weight"])


@pytest.mark.parametrize("manual", [False, True])
def test_accumulated_batches_are_one_step(tmp_path, manual):
    callback = MergeCallback(2, 10)
    module = make(TwoOptimizers, every=4) if manual else make(Toy)
    arguments = {} if manual else {"accumulate_grad_batches": 4}
    fit(module, tmp_path, callback, max_steps=12 if manual else 6, **arguments)
    assert callback.snapshot_steps == [2, 4, 6]


def test_a_warmup_is_seen_through_accumulation(tmp_path):
    callback = MergeCallback(1, 10)
    fit(make(Toy, warmup_steps=5), tmp_path, callback, max_steps=8, accumulate_grad_batches=4)
    assert callback.snapshot_steps == [6, 7, 8]


def test_the_window_is_frozen_in_the_decay_and_still_evaluated(tmp_path, caplog):
    class Decaying(Toy):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 12 else (24 - step) / 12)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    callback = MergeCallback(2, 3)
    run = fit(make(Decaying), tmp_path, callback)
    # The update of step 13 still has the full rate: (24 - 12) / 12 = 1.
    assert callback.snapshot_steps == [8, 10, 12]
    values = [value for step, value in run.logged("merged/val_loss") if step >= 15]
    assert len(values) == 3
    assert len(set(values)) == 1
    assert "the window of 3 snapshots up to step 12 stays as it is" in caplog.text


def test_a_rate_that_never_settles_is_said_once_with_what_to_do(tmp_path):
    class Cosine(Toy):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    with pytest.warns(UserWarning, match=r"not constant in \d+ steps .*start='any'.*start=STEP") as said:
        run = fit(make(Cosine), tmp_path, callback := MergeCallback(2, 3))
    assert len([warning for warning in said if "MergeCallback" in str(warning.message)]) == 1
    assert callback.snapshot_steps == []
    assert not run.logged("merged/val_loss")
    fit(make(Cosine), tmp_path, callback := MergeCallback(2, 12, start=10))
    assert callback.snapshot_steps == [10, 12, 14, 16, 18, 20, 22, 24]
    run = fit(make(Cosine), tmp_path, callback := MergeCallback(2, 12, start="any"))
    assert callback.snapshot_steps == list(range(2, 25, 2))
    assert run.logged("merged/val_loss")


@pytest.mark.usefixtures("both_lightnings")
def test_a_run_without_validation_captures_and_says_that_nothing_is_evaluated(tmp_path, caplog):
    class Unvalidated(Toy):
        validation_step = None

    callback = MergeCallback(2, 3)
    torch.manual_seed(0)
    trainer = lightning().Trainer(
        max_steps=10,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
        enable_model_summary=False,
    )
    trainer.fit(make(Unvalidated), batches())
    assert callback.snapshot_steps == [6, 8, 10]
    assert callback.merged_state_dict()
    assert caplog.text.count("no validation") == 1


def test_the_start_line_says_what_where_and_how_much(tmp_path, caplog):
    fit(make(Toy), tmp_path, MergeCallback(2, 3, merges={"sma": "sma", "late": "wma"}))
    line = next(line for line in caplog.text.splitlines() if "MergeCallback" in line)
    assert "sma, late: up to 3 snapshots, every 2 steps while the learning rate is constant, in 0.0 MiB on cpu" in line


def test_a_fit_that_goes_on_keeps_the_window_and_a_new_one_begins_empty(tmp_path):
    callback = MergeCallback(2, 10)
    run = fit(make(Toy), tmp_path, callback, max_steps=8)
    run.trainer.fit_loop.epoch_loop.max_steps = 12
    run.trainer.fit(run.module, batches(), batches(24, 8, shuffle=False))
    assert callback.snapshot_steps == [2, 4, 6, 8, 10, 12]
    fit(run.module, tmp_path, callback, max_steps=4)
    assert callback.snapshot_steps == [2, 4]
    fit(make(Toy), tmp_path, callback, max_steps=6)
    assert callback.snapshot_steps == [2, 4, 6]


def test_a_model_that_is_frozen_when_the_fit_begins_is_captured_once_it_is_thawed(tmp_path):
    class Thawed(Toy):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 8:
                self.out.requires_grad_(True)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if loss.requires_grad else loss.requires_grad_()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    runs, callback = [], MergeCallback(2, 3)
    for callbacks in ([], [callback]):
        module = make(Thawed).requires_grad_(False)
        runs.append(fit(module, tmp_path / str(len(runs)), *callbacks))
    assert_same_training(*runs)
    assert callback.snapshot_steps == [20, 22, 24]
    assert not torch.equal(callback.merged_state_dict()["out.weight"], runs[1].module.out.weight)


def test_a_rule_is_asked_once_at_each_validation(tmp_path):
    asked = []

    def rule(steps):
        asked.append(list(steps))
        return [1 / len(steps)] * len(steps)

    fit(make(Toy), tmp_path, MergeCallback(2, 3, merges={"rule": rule, "sma": "sma"}), max_steps=8)
    assert asked == [[2, 4], [4, 6, 8]]


def test_a_rule_that_fails_later_is_named_at_each_validation_and_the_run_goes_on(tmp_path):
    def fragile(steps):
        if steps[-1] >= 15:
            raise ZeroDivisionError("too far")
        return [1.0] * len(steps)

    callback = MergeCallback(2, 3, merges={"fragile": fragile, "sma": "sma"})
    without = fit(make(Toy), tmp_path / "without")
    with pytest.warns(UserWarning, match="no merge 'fragile' at step") as said:
        run = fit(make(Toy), tmp_path / "with", callback)
    texts = [str(warning.message) for warning in said if "fragile" in str(warning.message)]
    assert len(texts) == 3
    assert (
        "no merge 'fragile' at step 16: merge rule fragile failed for steps [12, 14, 16]: ZeroDivisionError" in texts[0]
    )
    assert_same_training(without, run)
    assert [step for step, _ in run.logged("merged/val_loss")] == [3, 7, 11]
    assert [step for step, _ in run.logged("merged_sma/val_loss")] == [3, 7, 11, 15, 19, 23]


def test_a_snapshot_with_nan_is_refused_in_a_run_that_goes_on(tmp_path):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 10:
                self.kept = pl_module.out.bias.data.clone()

        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 11:
                pl_module.out.bias.data.fill_(torch.nan)
            if trainer.global_step == 13:
                pl_module.out.bias.data.copy_(self.kept)

    class Plain(Toy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return torch.nan_to_num(loss) * 0 if loss.isnan() else loss

    callback = MergeCallback(2, 4)
    with pytest.warns(UserWarning, match=r"No snapshot at step 12: .*out.bias|No snapshot at step 12: inner.weight"):
        run = fit(make(Plain), tmp_path, Poison(), callback, max_steps=12, val_check_interval=6)
    assert callback.snapshot_steps == [4, 6, 8, 10]
    assert all(tensor.isfinite().all() for tensor in callback.merged_state_dict().values())
    assert math.isfinite(run.logged("merged/val_loss")[-1][1])


def test_a_run_too_short_for_a_snapshot_says_so(tmp_path, caplog):
    for arguments, due in (({"every_n_train_steps": 100}, 100), ({"start": 50}, 50)):
        caplog.clear()
        with caplog.at_level("INFO"):
            fit(make(Toy), tmp_path, MergeCallback(**arguments), max_steps=4)
        assert f"nothing was captured in 4 steps; the first is due at step {due}" in caplog.text


class EpochWise(Toy):
    """A rate that is set once an epoch."""

    def __init__(self, scheduler, **options):
        super().__init__()
        self.scheduler, self.options = scheduler, options

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), **self.options}}


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)


def chained(optimizer):
    # Has no count of its own.
    return torch.optim.lr_scheduler.ChainedScheduler([cosine(optimizer)])


def constant(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


ON_METRIC = {"monitor": "val_loss"}


# An epoch has eight steps, and schedulers that step once an epoch do so before its last batch ends.
@pytest.mark.usefixtures("both_lightnings")
@pytest.mark.parametrize(
    ("module", "arguments", "steps"),
    [
        ((cosine, {}), {"max_steps": 32}, []),
        ((chained, {}), {"max_steps": 32}, []),
        ((cosine, {"interval": "step", "frequency": 6}), {"max_steps": 24}, []),
        ((constant, {}), {"max_steps": 16}, list(range(8, 17))),
        ((constant, {"interval": "step", "frequency": 6}), {"max_steps": 10}, [6, 7, 8, 9, 10]),
        ((constant, {}), {"max_steps": 8}, list(range(1, 9))),
        ((constant, {}), {"max_epochs": 1, "max_steps": -1}, list(range(1, 9))),
        ((constant, {"frequency": 3}), {"max_epochs": 2, "max_steps": -1}, list(range(7, 17))),
        ((plateau, {"monitor": "val_loss"}), {"max_steps": 8}, list(range(1, 9))),
    ],
)
@pytest.mark.sample(4)
def test_a_rate_that_is_set_rarely_is_constant_once_it_was_set_again(tmp_path, caplog, module, arguments, steps):
    callback, (scheduler, options) = MergeCallback(1, 10), module
    with caplog.at_level("INFO"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the learning rate was not constant")
        fit(make(EpochWise, scheduler=scheduler, **options), tmp_path, callback, **arguments)
    assert callback.snapshot_steps == steps
    is_waiting = steps == [] or steps[0] in (6, 8)
    assert caplog.text.count("capturing begins once it has been set again to the same value") == is_waiting
    assert caplog.text.count("the learning rate moved") == 0


def test_a_run_that_waits_for_its_scheduler_is_resumed_exactly(tmp_path):
    whole, first, second = (MergeCallback(2, 10) for _ in range(3))
    fit(make(EpochWise, scheduler=constant), tmp_path / "whole", whole, train=ResumableBatches(8))
    stopper = Stopper(path := str(tmp_path / "first.ckpt"), 5)
    fit(make(EpochWise, scheduler=constant), tmp_path / "first", first, stopper, train=ResumableBatches(8))
    fit(make(EpochWise, scheduler=constant), tmp_path / "second", second, train=ResumableBatches(8), ckpt_path=path)
    assert whole.snapshot_steps == [8, 10, 12, 14, 16, 18, 20, 22, 24]
    assert second.snapshot_steps == whole.snapshot_steps


def test_a_long_cosine_that_steps_once_an_epoch_is_told_of_before_the_run_ends(tmp_path):
    class At(Callback):
        def on_train_batch_start(self, trainer, *arguments):
            if trainer.global_step == 150:
                raise RuntimeError("before its end")

    module = make(EpochWise, scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60))
    with pytest.warns(UserWarning, match="the learning rate was not constant"), pytest.raises(RuntimeError):
        fit(module, tmp_path, MergeCallback(1, 3), At(), max_steps=480, limit_val_batches=0)
