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
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate
from torchmetrics import MeanSquaredError
from torchmetrics.wrappers import MetricTracker

from merge_callback import MergeCallback, Parts
from merge_callback.live import isolate
from tests.helpers.toys import Toy, assert_same_training, batches, fit, make

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
    """A sum that is made in a validation, and so for inference only."""

    total = None

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.total is None:
            self.total = torch.zeros((), device=self.device)
        self.total += batch[0].sum()
        self.log("total", self.total.clone())


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


@pytest.mark.parametrize("arguments", [{}, {"limit_batches": 1}], ids=["whole", "limited"])
@pytest.mark.parametrize("module_class", MODULES)
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
def test_data_is_drawn_as_if_there_were_no_merge(tmp_path, name):
    options = {"limit_val_batches": 2}
    without = fit(make(Toy), tmp_path / "without", validation=LOADERS[name](), **options)
    watched = fit(make(Toy), tmp_path / "with", MergeCallback(2, 3), validation=LOADERS[name](), **options)
    assert_same_training(without, watched)


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
