"""What strangers' modules do in their validations leaves no trace, wherever they keep it."""

import copy
import dataclasses
import io
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from matplotlib import pyplot
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate
from torch.utils.tensorboard import SummaryWriter
from torchmetrics import MeanSquaredError
from torchmetrics.wrappers import MetricTracker

from merge_callback import MergeCallback, Parts
from merge_callback.live import isolate
from tests.helpers.processes import call
from tests.helpers.toys import ResumableBatches, Toy, assert_same_training, batches, fit, lightning, make, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*shuffling enabled:UserWarning"),
    # Of limited validations.
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    # A MetricTracker makes its metrics while the module is in evaluation mode.
    pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode:UserWarning"),
]


class Teacher(Toy):
    """Moves a frozen teacher in a validation hook, and trains towards it."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.out).requires_grad_(False)

    def on_validation_start(self):
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.out.parameters(), strict=True):
                slow.lerp_(fast, 0.1)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + sum(p.square().sum() for p in self.teacher.parameters())

    def forward(self, x):
        return super().forward(x) + self.teacher(x)


class LowRank(Toy):
    """Folds an update into a frozen weight for its validations, and takes it out again."""

    def __init__(self):
        super().__init__()
        self.update = nn.Parameter(torch.full((6, 6), 0.1))

    def on_validation_start(self):
        self.folded = self.update.detach().clone()
        self.frozen.weight.data += self.folded

    def on_validation_end(self):
        self.frozen.weight.data -= self.folded

    def forward(self, x):
        return super().forward(x + x @ self.update if self.training else x)


class Collecting(Toy):
    """Keeps copies of a layer as submodules, as ensembles do."""

    def __init__(self):
        super().__init__()
        self.kept = nn.ModuleList()

    def on_validation_start(self):
        if self.global_step >= 8:
            self.kept.append(copy.deepcopy(self.out).requires_grad_(False))
            self.register_buffer(f"seen{self.global_step}", torch.zeros(1))


class Averaging(Toy):
    """Makes an average of a layer in its second validation, and updates it in later ones."""

    def __init__(self):
        super().__init__()
        self.average = None

    def on_validation_start(self):
        if self.global_step == 8:
            self.average = copy.deepcopy(self.out).requires_grad_(False)
        elif self.global_step > 8:
            for mean, new in zip(self.average.parameters(), self.out.parameters(), strict=True):
                mean.data += (new.data - mean.data) / 2


class Tracking(Toy):
    def __init__(self):
        super().__init__()
        self.tracker = MetricTracker(MeanSquaredError(), maximize=False)

    def on_validation_epoch_start(self):
        self.tracker.increment()

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.tracker.update(self(batch[0])[:, 0], batch[1].float())

    def on_validation_epoch_end(self):
        self.log("best", float(self.tracker.best_metric()))
        self.log("num_epochs", float(self.tracker.n_steps))


class Hooking(Toy):
    def on_validation_epoch_start(self):
        self.out.register_forward_hook(lambda module, inputs, output: 1.1 * output)


class OnTheClass(Toy):
    """A list and a number that all objects share."""

    losses: list[float] = []  # noqa: RUF012
    calls = 0

    def __init__(self):
        super().__init__()
        type(self).losses, type(self).calls = [], 0

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        type(self).calls += 1
        self.losses.append(float(batch[0].sum()))
        self.log("calls", float(self.calls))
        self.log("losses", float(len(self.losses)))


@dataclasses.dataclass(slots=True)
class Meter:
    number: int = 0
    total: float = 0.0


class InSlots(Toy):
    def __init__(self):
        super().__init__()
        self.meter = Meter()
        self.count = itertools.count()

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.meter.number += 1
        self.meter.total += float(batch[0].sum())
        self.log("meter", self.meter.total / self.meter.number)
        self.log("count", float(next(self.count)))


class Inferred(Toy):
    """A sum for inference only, whose writes torch does not count."""

    total = None

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        with torch.inference_mode():
            if self.total is None:
                self.total = torch.zeros((), device=self.device)
            self.total += batch[0].sum()
        self.log("total", float(self.total))


class Momenta(Toy):
    def on_validation_epoch_end(self):
        for state in self.trainer.optimizers[0].state.values():
            state["exp_avg"].mul_(0.5)


class Forgetting(Toy):
    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.trainer.optimizers[0].state.popitem()


class Writing(Toy):
    """Adds to a weight, merged or not, wherever its validation runs."""

    def on_validation_epoch_start(self):
        with torch.no_grad():
            self.out.bias += 0.01


class Curriculum(Toy):
    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.trainer.train_dataloader.dataset.noise += 0.1


class Copying(Toy):
    """Copies and pickles itself wherever it may."""

    def check(self):
        twin = copy.deepcopy(self)
        assert "on_validation_epoch_end" not in vars(twin)
        self.trainer, trainer = None, self.trainer
        torch.save(self.state_dict(), io.BytesIO())
        pickle.dumps(list(vars(twin)))
        self.trainer = trainer

    on_validation_start = on_validation_epoch_start = on_validation_epoch_end = on_validation_end = check


class Strict(Toy):
    """Refuses attributes that it does not know."""

    is_complete = False

    def __init__(self):
        super().__init__()
        self.is_complete = True

    def __setattr__(self, name, value):
        known = name.startswith("_") or name in ("trainer", "training") or hasattr(self, name)
        if self.is_complete and not known:
            raise AttributeError(f"{name} is not known")
        super().__setattr__(name, value)


MODULES = [
    Teacher,
    LowRank,
    Collecting,
    Averaging,
    Tracking,
    Hooking,
    OnTheClass,
    InSlots,
    Inferred,
    Momenta,
    Forgetting,
    Writing,
    Copying,
    Strict,
]


@pytest.mark.parametrize(
    "arguments", [{}, pytest.param({"limit_batches": 1}, marks=pytest.mark.slow)], ids=["whole", "limited"]
)
@pytest.mark.parametrize("module_class", MODULES)
@pytest.mark.sample(2)
def test_what_a_validation_keeps_is_kept_once(tmp_path, module_class, arguments):
    without = fit(make(module_class), tmp_path / "without")
    watched = fit(make(module_class), tmp_path / "with", MergeCallback(2, 3, **arguments))
    assert watched.logged("merged/val_loss")
    assert_same_training(without, watched)
    assert [name for name, _ in watched.module.named_modules()] == [name for name, _ in without.module.named_modules()]


def test_what_a_validation_writes_to_an_excluded_parameter_is_written_once(tmp_path):
    without = fit(make(Writing), tmp_path / "without")
    callback = MergeCallback(2, 3, parts=Parts(exclude="out.*"))
    watched = fit(make(Writing), tmp_path / "with", callback)
    assert_same_training(without, watched)


@pytest.mark.parametrize(
    ("module_class", "name"), [(Teacher, "teacher.weight and to 1 more"), (Momenta, r"AdamW.state\[0\]\['exp_avg'\]")]
)
def test_what_there_is_no_room_to_copy_is_told_of_when_it_is_written_to(tmp_path, monkeypatch, module_class, name):
    monkeypatch.setattr(isolate, "ROOM_SHARE", 0.0)
    with pytest.warns(UserWarning, match=f"A validation hook writes to {name}.* There is no room for a copy"):
        fit(make(module_class), tmp_path, MergeCallback(2, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bank: torch.cat([bank, bank]), r"the buffer bank is now \[4\]"),
        (lambda bank: bank.double(), "the buffer bank is now .* of torch.float64"),
        (lambda bank: None, "the buffer bank is gone"),
    ],
    ids=["grows", "dtype", "none"],
)
@pytest.mark.sample(1)
def test_a_buffer_that_changed_since_the_snapshot_stays_live_with_a_warning(tmp_path, change, message):
    class Banking(Toy):
        def __init__(self):
            super().__init__()
            self.register_buffer("bank", torch.zeros(2))

        def on_train_batch_end(self, *arguments):
            # After the snapshot of that step, before its validation.
            if self.global_step == 16:
                self.bank = change(self.bank)

    without = fit(make(Banking), tmp_path / "without")
    with pytest.warns(UserWarning, match=message):
        watched = fit(make(Banking), tmp_path / "with", MergeCallback(2, 3))
    assert_same_training(without, watched)
    assert len(watched.logged("merged/val_loss")) == 6


# Data


class Noise:
    """A transform with a generator of its own."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __call__(self, x):
        return x + 0.1 * torch.from_numpy(self.generator.normal(size=x.shape)).float()


class Several:
    """Transforms in one, as in torchvision."""

    def __init__(self, *transforms):
        self.transforms = list(transforms)

    def __call__(self, x):
        for transform in self.transforms:
            x = transform(x)
        return x


class Transformed(Dataset):
    def __init__(self, transform, noise=0.0):
        self.data, self.transform, self.noise = batches(64).dataset, transform, noise

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return self.transform(x) + self.noise, y


class Collate:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, items):
        x, y = default_collate(items)
        return x + 0.1 * torch.randn(x.shape, generator=self.generator), y


class InPlace(Sampler):
    """Shuffles its list anew, from the order that it has."""

    def __init__(self, size):
        self.order = list(range(size))

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        random.shuffle(self.order)
        return iter(self.order)


class Files(IterableDataset):
    def __init__(self):
        self.files = list(range(24))

    def __iter__(self):
        random.shuffle(self.files)
        data = batches(24).dataset
        return (data[number] for number in self.files)


def as_is(x):
    return x


LOADERS = {
    "a transform with a generator": lambda: DataLoader(Transformed(Noise()), 8),
    "transforms in one": lambda: DataLoader(Transformed(Several(Noise(), Noise())), 8),
    "a collate function with a generator": lambda: DataLoader(batches(24).dataset, 8, collate_fn=Collate()),
    "a sampler that shuffles its list": lambda: DataLoader(batches(24).dataset, 8, sampler=InPlace(24)),
    "a stream that shuffles its list": lambda: DataLoader(Files(), 8),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.sample(2)
def test_data_is_drawn_as_if_there_were_no_merge(tmp_path, name):
    options = {"limit_val_batches": 2}
    without = fit(make(Toy), tmp_path / "without", validation=LOADERS[name](), **options)
    watched = fit(make(Toy), tmp_path / "with", MergeCallback(2, 3), validation=LOADERS[name](), **options)
    assert_same_training(without, watched)


@pytest.mark.slow
def test_a_transform_that_training_and_validation_share_draws_for_both_as_before(tmp_path):
    runs = []
    for callbacks in ([], [MergeCallback(2, 3)]):
        shared = Noise()
        loaders = [DataLoader(Transformed(shared), 8) for _ in range(2)]
        runs.append(fit(make(Toy), tmp_path / str(len(runs)), *callbacks, train=loaders[0], validation=loaders[1]))
    assert_same_training(*runs)


def test_a_number_of_the_training_data_that_a_validation_hook_raises_is_raised_once(tmp_path):
    runs = []
    for callbacks in ([], [MergeCallback(2, 3)]):
        train = DataLoader(Transformed(as_is), 8)
        runs.append(fit(make(Curriculum), tmp_path / str(len(runs)), *callbacks, train=train))
        assert runs[-1].trainer.train_dataloader.dataset.noise == pytest.approx(0.6)
    assert_same_training(*runs)


# What hooks look up


def test_callbacks_are_found_on_the_trainer_also_while_a_merge_is_validated(tmp_path):
    class Looking(Toy):
        def on_validation_epoch_end(self):
            assert self.callback in self.trainer.callbacks
            places.append(self.trainer.callbacks.index(self.callback))

    places = []
    other, callback = Callback(), MergeCallback(2, 3)
    module = make(Looking)
    module.callback = callback
    run = fit(module, tmp_path, other, callback)
    assert len(places) > len(run.epoch_metrics)
    assert set(places) == {run.trainer.callbacks.index(callback)}


def test_the_loss_of_a_module_that_reads_its_merged_weights_is_that_of_the_merge(tmp_path):
    class Reading(Toy):
        def on_validation_epoch_end(self):
            self.log("norm", F.mse_loss(self.out.weight, torch.zeros_like(self.out.weight)))

    callback = MergeCallback(2, 3)
    run = fit(make(Reading), tmp_path, callback)
    merged = callback.merged_state_dict()["out.weight"].square().mean()
    assert run.logged("merged/norm")[-1][1] == pytest.approx(float(merged), rel=1e-5)


def test_a_merge_whose_values_never_differ_from_the_live_ones_is_told_of(tmp_path):
    class ThroughView(Toy):
        """Reads the weights of its last layer through a view that was made before."""

        def __init__(self):
            super().__init__()
            self.views = []

        def on_fit_start(self):
            self.views = [parameter.data for parameter in self.parameters() if parameter.requires_grad]

        def on_validation_epoch_start(self):
            for parameter, view in zip((p for p in self.parameters() if p.requires_grad), self.views, strict=True):
                parameter.data = view

    module = make(ThroughView)
    # Its statistics would be those of the newest snapshot.
    module.norm.track_running_stats = False
    with pytest.warns(UserWarning, match="exactly the values of the live model 3 times"):
        run = fit(module, tmp_path, MergeCallback(1, 3))
    assert {gain for _, gain in run.logged("merge_gain/val_loss")} == {0.0}


def test_a_merge_of_equal_weights_has_equal_values_and_nothing_is_said(tmp_path):
    run = fit(make(Toy, learning_rate=0.0), tmp_path, MergeCallback(1, 3))
    assert {gain for _, gain in run.logged("merge_gain/val_loss")} <= {0.0}


class Scripted(Toy):
    def __init__(self):
        super().__init__()
        self.out = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))


class Traced(Toy):
    def __init__(self):
        super().__init__()
        self.out = torch.jit.trace(nn.Linear(6, 3), torch.zeros(1, 6))


def train_scripted(folder, module_class):
    """Both runs without the executor that compiles after some calls, and then rounds otherwise."""
    torch._C._jit_set_profiling_executor(False)
    torch._C._jit_set_profiling_mode(False)
    without = fit(make(module_class), folder / "without")
    watched = fit(make(module_class), folder / "with", MergeCallback(2, 3))
    assert_same_training(without, watched)
    return {gain for _, gain in watched.logged("merge_gain/val_loss")}


@pytest.mark.slow
@pytest.mark.parametrize("module_class", [Scripted, Traced])
def test_scripted_and_traced_children_train_the_same_and_have_merges(tmp_path, module_class):
    assert call(train_scripted, tmp_path, module_class) != {0.0}


# Validations that are counted, stopped and wrapped


def test_every_second_validation_has_a_merge_also_where_a_later_callback_decides_on_it(tmp_path):
    class Deciding(Callback):
        """Asks for validations that nobody could foresee, and prevents others, as a clock does."""

        def on_train_start(self, trainer, pl_module):
            foreseen, real = (3, 5, 9, 12), (3, 6, 7, 12, 15, 18)
            loop = trainer.fit_loop.epoch_loop
            loop._should_check_val_fx = lambda fetcher: trainer.global_step in (real if self.has_decided else foreseen)

        def on_train_batch_start(self, *arguments):
            self.has_decided = False

        def on_train_batch_end(self, *arguments):
            self.has_decided = True

    callback = MergeCallback(1, 3, evaluate_every_n_validations=2)
    run = fit(make(Toy), tmp_path, callback, Deciding())
    assert [step + 1 for step, _ in run.logged("val_loss")] == [3, 6, 7, 12, 15, 18]
    assert [step + 1 for step, _ in run.logged("merged/val_loss")] == [6, 12, 18]


class StopError(Exception):
    pass


class Stopping(Toy):
    """Is stopped in the second batch of the validation of the merge at step 8."""

    is_stopped = False

    def on_validation_epoch_start(self):
        self.is_merged = type(self.trainer.fit_loop.epoch_loop.val_loop.run).__name__ != "_ObservedRun"

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.is_stopped and self.is_merged and self.global_step == 8 and batch_idx == 1:
            self.trainer.save_checkpoint(self.path)
            raise StopError


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.slow
def test_a_merged_validation_in_which_a_run_was_stopped_is_repeated_after_the_resume(tmp_path):
    def module():
        made = make(Stopping)
        made.dropout.p = 0.0
        return made

    whole = fit(module(), tmp_path / "whole", MergeCallback(2, 3), train=ResumableBatches())
    stopping = module()
    stopping.is_stopped, stopping.path = True, tmp_path / "stopped.ckpt"
    with pytest.raises(StopError):
        fit(stopping, tmp_path / "stopped", MergeCallback(2, 3), train=ResumableBatches())
    path = str(tmp_path / "stopped.ckpt")
    resumed = fit(module(), tmp_path / "resumed", MergeCallback(2, 3), train=ResumableBatches(), ckpt_path=path)
    assert same(dict(whole.module.state_dict()), dict(resumed.module.state_dict()))
    for name in ("val_loss", "merged/val_loss"):
        assert resumed.logged(name) == [pair for pair in whole.logged(name) if pair[0] + 1 >= 8]


def test_what_somebody_else_has_put_around_the_validation_loop_is_called_and_stays(tmp_path):
    class Wrapping(Callback):
        """A profiler, say."""

        def on_fit_start(self, trainer, pl_module):
            loop = trainer.fit_loop.epoch_loop.val_loop
            own = loop.run

            def run():
                self.calls.append(trainer.global_step)
                return own()

            loop.run = self.run = run

        def __init__(self):
            self.calls = []

    for order in (0, 1):
        wrapping, callback = Wrapping(), MergeCallback(2, 3)
        callbacks = [wrapping, callback] if order == 0 else [callback, wrapping]
        run = fit(make(Toy), tmp_path / str(order), *callbacks)
        assert [step for step in wrapping.calls if step] == [4, 8, 12, 16, 20, 24]
        assert run.trainer.fit_loop.epoch_loop.val_loop.run is wrapping.run
        assert len(run.logged("merged/val_loss")) == 6


# Loggers


@pytest.mark.slow
def test_experiments_answer_what_they_are_asked_and_nothing_is_written(tmp_path):
    class Asking(Toy):
        def on_validation_epoch_end(self):
            experiment = self.logger.experiment
            assert isinstance(experiment, SummaryWriter)
            answers.append((experiment.log_dir, experiment.get_logdir()))
            figure, _ = pyplot.subplots()
            experiment.add_figure("a picture", figure, self.global_step)
            experiment.add_scalar("written", 1.0, self.global_step)

    answers = []
    logger = lightning(".loggers").TensorBoardLogger(tmp_path)
    fit(make(Asking), tmp_path, MergeCallback(2, 3), logger=logger)
    assert set(answers) == {(logger.log_dir, logger.log_dir)}
    assert pyplot.get_fignums() == []
    events = EventAccumulator(logger.log_dir).Reload()
    # The sanity check and six live validations.
    assert len(events.Scalars("written")) == 7
    assert len(answers) == 7 + 6
