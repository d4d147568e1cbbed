"""`AnnealBranch`: the rates that optimizer steps really use, what is recorded, and what is left as it was."""

import math
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from merge_callback import AnnealBranch, MergeCallback, SpikeRecovery
from merge_callback.live.learning_rates import RateOverlay, learning_rates
from merge_callback.prediction.records import read_records
from merge_callback.prediction.validations import read_validation, run_identity
from tests.helpers.toys import Base, ResumableBatches, Toy, Tracker, fit, make, same


class Keeper(Callback):
    """Saves checkpoints at the end of the validations after some steps."""

    def __init__(self, folder, *steps):
        self.folder, self.steps = folder, steps

    def on_validation_end(self, trainer, pl_module):
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class Stopper(Callback):
    """Saves a checkpoint after a step and ends the run."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


class Scheduled(Base):
    """A linear model with any optimizers and schedulers; notes the rate that each step moves the weights by."""

    def __init__(self, optimizers, scheduler=None, interval="step", manual=False, tensor_rate=False):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.make_optimizers, self.make_scheduler, self.interval = optimizers, scheduler, interval
        self.automatic_optimization = not manual
        self.used = []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(loss, retain_graph=True)
                optimizer.step()
            for scheduler in self.lr_schedulers() or []:
                scheduler.step()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.layer(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizers = self.make_optimizers(self.layer.parameters())
        for index, optimizer in enumerate(optimizers):
            self.note_rates(optimizer, index)
        if self.make_scheduler is None:
            return optimizers
        schedulers = [self.make_scheduler(optimizer) for optimizer in optimizers]
        return optimizers, [{"scheduler": scheduler, "interval": self.interval} for scheduler in schedulers]

    def note_rates(self, optimizer, index):
        own_step = optimizer._init_group if hasattr(optimizer, "_init_group") else None
        assert own_step is not None

        def init_group(group, *arguments):
            self.used.append((index, float(group["lr"])))
            return own_step(group, *arguments)

        optimizer._init_group = init_group


SGD = lambda parameters: [torch.optim.SGD(parameters, lr=0.5)]  # noqa: E731
SCHEDULERS = {
    "none": (None, "step", [0.5] * 12),
    "constant after warmup": (
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1, (step + 1) / 4)),
        "step",
        [0.125, 0.25, 0.375, *[0.5] * 9],
    ),
    # Goes on from the rate it finds, so it must find its own.
    "chainable": (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), "step", [0.5**k for k in range(1, 13)]),
    "by epoch": (lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5), "epoch", [*[0.5] * 8, *[0.25] * 4]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("shape", ["linear", "1-sqrt", "cosine"])
@pytest.mark.sample(4)
def test_the_multiplier_goes_on_top_of_what_the_scheduler_sets(name, shape, tmp_path, recwarn):
    scheduler, interval, rates = SCHEDULERS[name]
    module = make(Scheduled, optimizers=SGD, scheduler=scheduler, interval=interval)
    fit(module, tmp_path, AnnealBranch(12, shape), max_steps=20)
    shapes = {
        "linear": lambda x: 1 - x,
        "1-sqrt": lambda x: 1 - math.sqrt(x),
        "cosine": lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
    }
    assert [rate for _, rate in module.used] == pytest.approx([r * shapes[shape](k / 12) for k, r in enumerate(rates)])
    moved = [str(w.message) for w in recwarn if "moved the rates" in str(w.message)]
    assert len(moved) == (name != "none")


OPTIMIZERS = {
    "adam": (lambda p: [torch.optim.AdamW(p, lr=0.5)], False),
    "groups": (lambda p: [torch.optim.SGD([{"params": [q], "lr": 0.5} for q in p])], False),
    "tensor rate": (lambda p: [torch.optim.Adam(p, lr=torch.tensor(0.5))], False),
    "two optimizers": (lambda p: [torch.optim.SGD([q], lr=0.5) for q in p], True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_decays_alike_and_has_its_rate_back(name, tmp_path):
    optimizers, manual = OPTIMIZERS[name]
    module = make(Scheduled, optimizers=optimizers, manual=manual)
    run = fit(module, tmp_path, AnnealBranch(10), max_steps=100)
    expected = [0.5 * (1 - k / 10) for k in range(10)]
    num_each = len(module.used) // 10
    assert [rate for _, rate in module.used] == pytest.approx([rate for rate in expected for _ in range(num_each)])
    for group in [group for optimizer in run.trainer.optimizers for group in optimizer.param_groups]:
        assert float(group["lr"]) == 0.5
        assert isinstance(group["lr"], torch.Tensor) == (name == "tensor rate")


def test_accumulated_batches_are_one_step_of_the_decay(tmp_path):
    module = make(Scheduled, optimizers=SGD)
    run = fit(module, tmp_path, AnnealBranch(5), accumulate_grad_batches=2, max_steps=100)
    assert [rate for _, rate in module.used] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert run.trainer.global_step == 5


@pytest.fixture
def trunk(tmp_path):
    """A trunk of 24 steps, validated every 4, with checkpoints after the steps 12 and 24."""

    callbacks = MergeCallback(1, 4), Keeper(tmp_path, 4, 12, 24)
    return fit(toy(), tmp_path / "trunk", *callbacks, train=ResumableBatches()), tmp_path


def branch(folder, *callbacks, start=12, **arguments):
    if not any(isinstance(callback, MergeCallback) for callback in callbacks):
        callbacks = (MergeCallback(1, 4), *callbacks)
    checkpoint = folder / f"{start}.ckpt"
    return fit(toy(), folder / "branch", *callbacks, train=ResumableBatches(), ckpt_path=checkpoint, **arguments)


def toy():
    """Without dropout, since a checkpoint does not hold the state of random numbers."""
    module = make(Toy)
    module.dropout.p = 0.0
    return module


@pytest.mark.slow
def test_a_branch_is_recorded_with_what_its_trunk_knew(trunk):
    run, folder = trunk
    record = folder / "anneals.jsonl"
    ended = branch(folder, AnnealBranch(4, record=record, trunk=folder / "24.ckpt"))
    (found,) = read_records(record)
    assert (found.start_step, found.step, found.span_steps, found.shape, found.span) == (12, 16, 4, "linear", 0.25)
    assert found.annealed == {k: float(v) for k, v in ended.epoch_metrics[-1].items() if k in found.annealed}
    assert found.annealed.keys() == {"val_loss", "val_accuracy"}
    for alignment, step in ((found.forecast, 12), (found.matched, 16)):
        at_step = run.epoch_metrics[step // 4 - 1]
        assert alignment.step == step
        assert alignment.live["val_loss"] == float(at_step["val_loss"])
        assert alignment.merged["val_loss"] == float(at_step["merged/val_loss"])
        assert alignment.span_steps == int(at_step["merge/span_steps"])
    assert ended.trainer.global_step == 16


def test_the_trunk_itself_stays_as_it_was_without_its_branch(trunk):
    run, folder = trunk
    branch(folder, AnnealBranch(4, record=folder / "r.jsonl"))
    again = branch(folder, MergeCallback(1, 4))
    assert same(again.module.state_dict(), run.module.state_dict())


def test_a_branch_without_a_later_checkpoint_waits_for_its_match(trunk):
    _, folder = trunk
    branch(folder, AnnealBranch(4, record=folder / "r.jsonl"))
    (found,) = read_records(folder / "r.jsonl")
    assert found.forecast is not None
    assert found.matched is None


def test_a_share_of_the_steps_counts_up_to_the_end_of_the_branch(trunk):
    _, folder = trunk
    branch(folder, AnnealBranch(span=0.25, record=folder / "r.jsonl"))
    (found,) = read_records(folder / "r.jsonl")
    assert (found.start_step, found.span_steps, found.step) == (12, 4, 16)


def test_the_last_step_of_a_branch_hardly_moves(trunk):
    _, folder = trunk
    tracker = Tracker()
    branch(folder, AnnealBranch(8, "1-sqrt"), tracker)
    weights = [torch.cat([t.flatten() for t in tracker.parameters[step].values()]) for step in range(13, 21)]
    moves = [float((later - earlier).norm()) for earlier, later in pairwise(weights)]
    assert moves[-1] < 0.2 * moves[0]


def test_an_interrupted_branch_ends_as_the_one_that_was_not(trunk):
    _, folder = trunk
    arguments = {"span_steps": 8, "shape": "cosine"}
    whole = branch(folder, AnnealBranch(**arguments, record=folder / "whole.jsonl"))

    stopper = Stopper(folder / "15.ckpt", 15)
    with pytest.warns(UserWarning, match="ended at step 15, before the end of the decay at step 20"):
        branch(folder, AnnealBranch(**arguments, record=folder / "resumed.jsonl"), stopper)
    assert read_records(folder / "resumed.jsonl") == []
    resumed = branch(folder, AnnealBranch(**arguments, record=folder / "resumed.jsonl"), start=15)
    assert same(resumed.module.state_dict(), whole.module.state_dict())
    assert read_records(folder / "resumed.jsonl") == read_records(folder / "whole.jsonl")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.slow
def test_the_merge_of_a_branch_stays_that_of_its_trunk_wherever_it_is_listed(trunk, first):
    _, folder = trunk
    merging, annealing = MergeCallback(1, 4), AnnealBranch(6)
    ended = branch(folder, *((annealing, merging) if first else (merging, annealing)))
    # The first step of the decay is still at the full rate.
    assert merging.snapshot_steps == [10, 11, 12, 13]
    assert ended.trainer.global_step == 18


def test_epochs_without_a_validation_do_not_keep_the_end_from_being_recorded(trunk):
    _, folder = trunk
    run = branch(folder, AnnealBranch(4, record=folder / "r.jsonl"), val_check_interval=1.0, check_val_every_n_epoch=5)
    assert len(read_records(folder / "r.jsonl")) == 1
    assert run.trainer.check_val_every_n_epoch == 5


@pytest.mark.parametrize("min_epochs", [1, 3, 7])
@pytest.mark.sample(1)
def test_a_branch_ends_where_its_decay_does_also_if_the_run_may_not_stop_before_some_epoch(trunk, min_epochs):
    _, folder = trunk
    run = branch(folder, AnnealBranch(5, record=folder / f"{min_epochs}.jsonl"), min_epochs=min_epochs)
    (found,) = read_records(folder / f"{min_epochs}.jsonl")
    assert (run.trainer.global_step, found.step) == (17, 17)
    assert run.trainer.min_epochs == min_epochs


@pytest.mark.parametrize(
    ("annealing", "arguments", "message"),
    [
        ({"span_steps": 8}, {"max_steps": 19}, "8 steps ends at step 20, but max_steps=19 stops the run before"),
        ({"span_steps": 8}, {"min_steps": 21, "max_steps": 30}, "but min_steps=21 keeps the run going"),
        ({"span_steps": 8, "record": "r"}, {"limit_val_batches": 0}, "record='r' needs a validation"),
        ({"span_steps": 8, "trunk": "other.ckpt"}, {}, "trunk='.*other.ckpt' is not a later checkpoint of the run"),
        (
            {"span_steps": 8, "trunk": "torn.ckpt"},
            {},
            "torn.ckpt' is no checkpoint that can be read: .* holds no dictionary",
        ),
        ({"span_steps": 8, "trunk": "none.ckpt"}, {}, "none.ckpt' is no checkpoint that can be read: .*No such file"),
        ({"span_steps": 8, "trunk": "4.ckpt"}, {}, "4.ckpt' is not a later checkpoint of the run"),
    ],
)
@pytest.mark.sample(3)
def test_a_decay_that_cannot_be_is_refused_before_the_first_step(trunk, annealing, arguments, message):
    _, folder = trunk
    state = torch.load(folder / "24.ckpt", weights_only=True)
    (merge_state,) = [s for s in state["callbacks"].values() if "history" in s]
    merge_state["history"][0]["live"]["val_loss"] += 1.0
    torch.save(state, folder / "other.ckpt")
    torch.save(test_a_decay_that_cannot_be_is_refused_before_the_first_step, folder / "torn.ckpt")
    if "trunk" in annealing:
        annealing = annealing | {"trunk": folder / annealing["trunk"]}
    with pytest.raises(ValueError, match=message):
        branch(folder, AnnealBranch(**annealing), **arguments)


def test_a_share_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="but the run begins at step 0; give ckpt_path"):
        fit(make(Toy), tmp_path, AnnealBranch(span=0.1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of span_steps and span, got None and None"),
        ({"span_steps": 5, "span": 0.1}, ValueError, "exactly one"),
        ({"span_steps": 0}, ValueError, "span_steps must be >= 1, got 0"),
        ({"span": 1.0}, ValueError, r"span must be a share of the steps in \(0, 1\), got 1.0"),
        ({"span": "0.1"}, ValueError, r"span must be a share of the steps in \(0, 1\), got '0.1'"),
        ({"span_steps": 5, "shape": ["linear"]}, ValueError, r"got \['linear'\]"),
        ({"span_steps": 5, "record": 3}, TypeError, "record must be the path of a file, got 3"),
        ({"span_steps": 5, "trunk": "."}, ValueError, "trunk must be the path of a file, but '.' is a folder"),
        ({"span_steps": 5, "shape": "exponential"}, ValueError, "linear, 1-sqrt, cosine, got 'exponential'"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        AnnealBranch(**arguments)


def test_an_overlay_acts_inside_steps_only_and_leaves_nothing_behind():
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    overlay = RateOverlay([optimizer], lambda: 0.25)
    weight.grad = torch.ones(1)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert learning_rates([optimizer]) == [0.125]
    optimizer.step()
    assert weight.item() == 0.875
    assert optimizer.param_groups[0]["lr"] == 0.5
    overlay.remove()
    assert learning_rates([optimizer]) == [0.5]
    optimizer.step()
    assert weight.item() == 0.375


def test_an_optimizer_whose_step_calls_its_bases_step_decays_once():
    rates = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    # From the first optimizer of a class on, torch calls hooks around the class's step.
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = Recording([parameter], lr=0.5)
    overlay = RateOverlay([optimizer], lambda: 0.25)
    for _ in range(3):
        parameter.grad = torch.ones(1)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.5
    assert rates == [0.125] * 3
    assert parameter.item() == pytest.approx(1 - 3 * 0.125)
    assert overlay.num_steps == 3
    overlay.remove()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_step_that_fails_gives_the_rate_back():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    overlay = RateOverlay([optimizer], lambda: 0.25)

    def fail():
        raise RuntimeError("closure")

    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(fail)
    overlay.remove()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_an_optimizer_that_sets_its_own_rate_is_refused():
    optimizer = torch.optim.Adafactor([nn.Parameter(torch.ones(1, 1))], lr=0.5)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="the optimizer Adafactor has no learning rate"):
        RateOverlay([optimizer], lambda: 1.0)


def test_the_data_of_a_branch_are_those_of_its_trunk(trunk):
    """At a span of one step, which is at the full rate, the branch is the trunk's next step."""
    _, folder = trunk
    tracker = Tracker()
    branch(folder, AnnealBranch(1), tracker)
    whole = Tracker()
    fit(toy(), folder / "again", whole, train=ResumableBatches(), max_steps=13)
    assert same(tracker.parameters[13], whole.parameters[13])


def test_two_branches_at_once_are_refused(trunk):
    _, folder = trunk
    with pytest.raises(ValueError, match="the rates of AdamW decay already; a run takes one AnnealBranch at a time"):
        branch(folder, AnnealBranch(4), AnnealBranch(6, "cosine"))


def test_a_branch_that_has_ended_is_not_trained_further(trunk):
    _, folder = trunk
    branch(folder, AnnealBranch(4, record=folder / "r.jsonl"), Keeper(folder, 16))
    with pytest.raises(ValueError, match="ends at step 16, but this checkpoint is already there"):
        branch(folder, AnnealBranch(4, record=folder / "r.jsonl"), start=16)
    assert len((folder / "r.jsonl").read_text().splitlines()) == 1


def test_a_run_that_was_over_before_it_began_says_so(trunk):
    _, folder = trunk
    with pytest.warns(
        UserWarning, match="nothing was annealed, because the run was over before it began: max_steps=24"
    ):
        branch(folder, AnnealBranch(4, record=folder / "r.jsonl"), start=24)
    assert not (folder / "r.jsonl").exists()


def test_a_run_that_goes_on_at_a_rate_of_zero_is_recorded_once(trunk):
    _, folder = trunk

    class GoOn(Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.should_stop = False

    run = branch(folder, AnnealBranch(4, record=folder / "r.jsonl"), GoOn())
    assert run.trainer.global_step > 16
    assert len((folder / "r.jsonl").read_text().splitlines()) == 1


def test_a_branch_of_an_unknown_trunk_says_that_it_calibrates_nothing(tmp_path):
    with pytest.warns(UserWarning, match="the checkpoint holds no validation of a MergeCallback"):
        fit(toy(), tmp_path, AnnealBranch(4, record=tmp_path / "r.jsonl"))
    (found,) = read_records(tmp_path / "r.jsonl")
    assert (found.forecast, found.matched) == (None, None)


def test_the_multiplier_is_logged(trunk):
    _, folder = trunk
    run = branch(folder, AnnealBranch(4))
    assert [value for _, value in run.logged("anneal/multiplier")] == [1.0, 0.75, 0.5, 0.25]


class ByStep(Base):
    """A linear model whose data depend on the step alone; may save the run in the middle of one, as a signal does."""

    def __init__(self, make_optimizer, save=None, accident=-1):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.make_optimizer, self.save, self.accident = make_optimizer, save, accident

    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step
        if self.save and step == self.save[0]:
            self.trainer.save_checkpoint(self.save[1])
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(self.layer(x), x.argmax(-1) % 3)
        return loss * math.nan if step == self.accident else loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.layer(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.layer.parameters())
        scheduler = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def recovering():
    merge = MergeCallback(2, 4, start=0)
    return [merge, SpikeRecovery(merge, rate_factor=0.1, rate_steps=20)]


@pytest.mark.filterwarnings(
    "ignore:SpikeRecovery", "ignore:AnnealBranch. the run's own schedule", "ignore:AnnealBranch. the checkpoint"
)
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.1), capturable=False, foreach=False),
    ],
)
@pytest.mark.parametrize("callbacks", [lambda: [AnnealBranch(24)], recovering])
@pytest.mark.sample(1)
def test_a_run_that_is_saved_in_the_middle_of_a_lowered_step_resumes_exactly(tmp_path, callbacks, make_optimizer):
    path = str(tmp_path / "preempted.ckpt")
    accident = 12 if callbacks is recovering else -1
    whole = make(ByStep, make_optimizer=make_optimizer, save=(15, path), accident=accident)
    run = fit(whole, tmp_path / "whole", *callbacks(), train=ResumableBatches())
    (saved,) = torch.load(path, weights_only=True)["optimizer_states"]
    # What the schedule has made of it in fifteen steps, without what the branch or the recovery makes of that.
    assert float(saved["param_groups"][0]["lr"]) == pytest.approx(0.1 * 0.99**15, rel=1e-5)
    again = make(ByStep, make_optimizer=make_optimizer)
    resumed = fit(again, tmp_path / "resumed", *callbacks(), train=ResumableBatches(), ckpt_path=path)
    assert same(dict(whole.state_dict()), dict(resumed.module.state_dict()))
    ours, theirs = (float(each.trainer.optimizers[0].param_groups[0]["lr"]) for each in (run, resumed))
    assert ours == theirs


def test_a_decay_takes_over_from_the_lowered_rates_of_a_recovery():
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], 1.0)
    lowered = RateOverlay([optimizer], lambda: 0.5, is_decay=False)
    decay = RateOverlay([optimizer], lambda: 0.25)
    lowered.remove()
    parameter.grad = torch.ones(())
    optimizer.step()
    assert parameter.item() == -0.25
    with pytest.raises(ValueError, match="decay already"):
        RateOverlay([optimizer], lambda: 0.5, is_decay=False)
    decay.remove()
    optimizer.step()
    assert parameter.item() == -1.25


def test_of_several_callbacks_the_one_that_reads_the_records_has_the_branch(tmp_path):
    record = tmp_path / "anneals.jsonl"

    def callbacks():
        return MergeCallback(1, 4, name="often"), MergeCallback(10, 2, name="seldom", calibration=record)

    fit(toy(), tmp_path / "trunk", *callbacks(), Keeper(tmp_path, 12), train=ResumableBatches())
    branch(tmp_path, *callbacks(), AnnealBranch(4, record=record))
    (found,) = read_records(record)
    state = torch.load(tmp_path / "12.ckpt", weights_only=True)["callbacks"][callbacks()[1].state_key]
    assert found.run == run_identity([read_validation(each) for each in state["history"]])
    assert found.forecast.step == 12
