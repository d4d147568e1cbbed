"""The observer rule and right merges, in all the forms that real training takes.

Each form is trained without and with the callback: training is bit-identical, the merge agrees with the float64 twin of
the weights that were trained, and merged values appear beside the live ones.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from merge_callback import Ema, MergeCallback, Window
from tests.helpers import reference
from tests.helpers.toys import (
    NUM_CLASSES,
    BusyToy,
    Toy,
    Tracker,
    assert_same_training,
    averages_weights,
    batches,
    fit,
    lightning,
    make,
)

pytestmark = pytest.mark.usefixtures("both_lightnings")


class TwoOptimizers(Toy):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return torch.optim.Adam(self.inner.parameters(), 0.01), torch.optim.SGD(self.out.parameters(), 0.1)


class PerEpoch(Toy):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class Plateau(Toy):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class ManyWaysOfLogging(Toy):
    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()
        metrics = [MulticlassAccuracy(NUM_CLASSES), MulticlassF1Score(NUM_CLASSES)]
        self.collection = MetricCollection(metrics, prefix="val/")

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.log("val_loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        self.log("as a float", loss.item(), batch_size=len(batch[0]))
        self.log("größe", loss, reduce_fx="max")
        self.log("unlogged", loss, logger=False)
        self.mean.update(loss)
        self.log("mean", self.mean, on_epoch=True, on_step=False)
        self.collection.update(logits, batch[1])
        if batch_idx == 1:
            self.log("only/sometimes", loss)

    def on_validation_epoch_end(self):
        self.log_dict(self.collection.compute())
        self.collection.reset()


class SeveralLoaders(Toy):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss)
        self.log(f"own_{dataloader_idx}", loss, add_dataloader_idx=False)

    def val_dataloader(self):
        return [batches(16, 8, shuffle=False, seed=1), batches(12, 4, shuffle=False, seed=2)]


class Sparse(Toy):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6, sparse=True)

    def forward(self, x):
        return super().forward(x + self.embedding((x[:, 0].abs() * 3).long().clamp(max=9)))

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), 0.05)


class Lazy(Toy):
    def __init__(self):
        super().__init__()
        self.lazy = nn.LazyLinear(6)

    def forward(self, x):
        return super().forward(self.lazy(x))


class Configured(Toy):
    def __init__(self):
        super().__init__()
        self.late = None

    def configure_model(self):
        if self.late is None:
            torch.manual_seed(5)
            self.late = nn.Linear(6, 6)

    def forward(self, x):
        return super().forward(self.late(x))


class Compiled(Toy):
    def __init__(self):
        super().__init__()
        self.inner = torch.compile(self.inner, backend="eager")


class Stream(IterableDataset):
    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __iter__(self):
        return iter(batches(self.num_samples, shuffle=False).dataset)


def stream(num_samples):
    return DataLoader(Stream(num_samples), 8)


class LateLazy(Lazy):
    """A layer that has no shape before the third step."""

    def forward(self, x):
        return super().forward(x) if self.trainer.global_step > 2 else super(Lazy, self).forward(x)


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "accumulation": (Toy, {"accumulate_grad_batches": 3}),
    "clipping by norm": (Toy, {"gradient_clip_val": 0.1}),
    "clipping by value": (Toy, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16-mixed": (BusyToy, {"precision": "bf16-mixed"}),
    "bf16-true": (Toy, {"precision": "bf16-true"}),
    "64-true": (Toy, {"precision": "64-true"}),
    "several optimizers, by hand": (TwoOptimizers, {"max_steps": 48}),
    "a schedule per epoch": (PerEpoch, {"max_steps": 48}),
    "a schedule on plateaus": (Plateau, {}),
    "many ways of logging": (ManyWaysOfLogging, {}),
    "several loaders": (SeveralLoaders, {"own_validation": True}),
    "streams without length": (Toy, {"train": lambda: stream(400), "validation": lambda: stream(24)}),
    "validation across epochs": (Toy, {"val_check_interval": 11, "check_val_every_n_epoch": None}),
    "validation every second epoch": (Toy, {"val_check_interval": 1.0, "check_val_every_n_epoch": 2, "max_steps": 40}),
    "a share of the validation": (BusyToy, {"limit_val_batches": 0.7}),
    "no sanity check": (BusyToy, {"num_sanity_val_steps": 0}),
    "reloaded loaders": (Toy, {"reload_dataloaders_every_n_epochs": 1}),
    "overfitting one batch": (Toy, {"overfit_batches": 1, "val_check_interval": 1.0}),
    "sparse gradients": (Sparse, {}),
    "lazy parameters": (Lazy, {}),
    "configure_model": (Configured, {}),
    "a compiled submodule": (Compiled, {}),
}


@pytest.mark.filterwarnings("ignore:.*shuffling enabled:UserWarning")
@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.filterwarnings("ignore:You are overriding:UserWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore:.*sync_dist=True:UserWarning")
@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.slow][: i % 2]) for i, form in enumerate(FORMS)]
)
@pytest.mark.sample(3)
def test_training_is_the_same_and_the_merge_is_right(tmp_path, form):
    toy_class, arguments = FORMS[form]
    arguments = dict(arguments)

    def run(folder, *callbacks):
        made = {key: arguments[key]() for key in ("train", "validation") if key in arguments}
        module = make(toy_class)
        if arguments.get("own_validation"):
            made["validation"] = module.val_dataloader()
        rest = {k: v for k, v in arguments.items() if k not in ("train", "validation", "own_validation")}
        return fit(module, tmp_path / folder, *callbacks, **(rest | made))

    without = run("without")
    callback = MergeCallback(2, 4, merges={"sma": "sma", "late": Window(span=0.3)})
    means = MergeCallback(3, 2, snapshot="mean", name="means")
    tracker = Tracker()
    watched = run("with", callback, means, tracker)
    assert_same_training(without, watched)

    assert len(callback.snapshot_steps) >= 2
    for name in ("sma", "late"):
        expected = tracker.merged(callback.coefficients(name))
        state = callback.merged_state_dict(name)
        for key, tensor in expected.items():
            rounding = 2 * torch.finfo(state[key].dtype).eps
            torch.testing.assert_close(state[key].double(), tensor, rtol=rounding, atol=max(rounding * 1e-1, 1e-15))

    steps = means.session.capture.covered.intervals
    assert len(steps) == 2
    expected = tracker.merged({step: 1 / 6 for first, last in steps for step in range(first, last + 1)})
    for key, tensor in expected.items():
        rounding = 3 * torch.finfo(means.merged_state_dict()[key].dtype).eps
        found = means.merged_state_dict()[key].double()
        torch.testing.assert_close(found, tensor, rtol=rounding, atol=max(rounding * 1e-1, 1e-15))

    metrics = watched.epoch_metrics[-1]
    for name in [name for name in metrics if not name.startswith(("merge", "train"))]:
        assert f"merged/{name}" in metrics, name
        assert f"merge_gain_late/{name}" in metrics, name
    written = {key for row in watched.rows for key, value in row.items() if value}
    assert {key for key in written if key.startswith("merged/")}
    for key in written:
        if key.startswith("merged/"):
            steps = {step for step, _ in watched.logged(key)}
            assert steps <= {step for step, _ in watched.logged(key.removeprefix("merged/"))}, key


def test_a_metric_that_is_logged_only_sometimes_has_its_values_then(tmp_path):
    class Sometimes(Toy):
        def on_validation_epoch_end(self):
            if self.global_step % 8 == 0:
                self.log("sometimes", 1.0)

    run = fit(make(Sometimes), tmp_path, MergeCallback(2, 3))
    assert [step for step, _ in run.logged("sometimes")] == [7, 15, 23]
    assert [step for step, _ in run.logged("merged/sometimes")] == [7, 15, 23]
    assert [value for _, value in run.logged("merge_gain/sometimes")] == [0, 0, 0]


def test_what_is_unfrozen_in_the_middle_begins_a_new_window_and_training_stays_the_same(tmp_path):
    class Unfreezing(lightning(".callbacks").BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.out)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 2:
                self.unfreeze_and_add_param_group(pl_module.out, optimizer, lr=0.01)

    class Plain(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), 0.05)

    without = fit(make(Plain), tmp_path / "without", Unfreezing())
    callback, tracker = MergeCallback(2, 4), Tracker()
    with pytest.warns(UserWarning, match="The trainable parameters changed before step 18: the window of 4 snapshots"):
        watched = fit(make(Plain), tmp_path / "with", callback, Unfreezing(), tracker)
    assert_same_training(without, watched)
    assert callback.snapshot_steps == [18, 20, 22, 24]
    expected = tracker.merged(callback.coefficients())["out.weight"]
    torch.testing.assert_close(callback.merged_state_dict()["out.weight"].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_compiled_module_is_not_compiled_anew_by_the_swap(tmp_path):
    class Counted(Toy):
        def __init__(self):
            super().__init__()
            self.compilations = 0
            self.middle = torch.compile(nn.Linear(6, 6), backend=self.count)

        def count(self, graph, inputs):
            compilations.append(graph)
            return graph

        def forward(self, x):
            return super().forward(self.middle(x))

    counts = []
    for callbacks in ([], [MergeCallback(2, 3)]):
        compilations: list[Any] = []
        torch.compiler.reset()
        fit(make(Counted), tmp_path / str(len(counts)), *callbacks)
        counts.append(len(compilations))
    assert counts[0] == counts[1] > 0


def test_evaluating_and_predicting_before_and_after_fit_are_left_alone(tmp_path):
    class Whole(Toy):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    loader = batches(24, 8, shuffle=False, seed=1)
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_checkpointing": False}
    results = []
    for callbacks in ([], [MergeCallback(2, 3)]):
        module, other = make(Whole), make(Whole)
        trainer = lightning().Trainer(
            max_steps=12, val_check_interval=4, callbacks=callbacks, enable_model_summary=False, **quiet
        )
        found = []
        for _ in range(2):
            found += trainer.validate(module, loader, verbose=False)
            found += trainer.test(module, loader, verbose=False)
            found += trainer.predict(module, loader)
            found += trainer.validate(other, loader, verbose=False)
            torch.manual_seed(3)
            trainer.fit(module, batches(), loader)
            trainer.fit_loop.epoch_loop.max_steps += 6
        results.append(found)
    for ours, theirs in zip(*results, strict=True):
        if isinstance(ours, dict):
            assert ours == theirs
            assert not any(name.startswith("merge") for name in ours)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.slow
def test_lightnings_tuners_and_monitors_work_beside_it(tmp_path):
    callbacks = lightning(".callbacks")

    def run(folder, *ours):
        finder = callbacks.LearningRateFinder(num_training_steps=40, min_lr=1e-4, max_lr=1.0)
        monitor = callbacks.LearningRateMonitor("step")
        module = make(Toy)
        return fit(module, tmp_path / folder, *ours, finder, monitor, train=batches(512), max_steps=24)

    without = run("without")
    callback = MergeCallback(2, 3)
    watched = run("with", callback)
    assert_same_training(without, watched)
    assert callback.snapshot_steps == [20, 22, 24]
    assert watched.module.learning_rate != 0.05


@pytest.mark.slow
def test_the_batch_size_finder_works_beside_it(tmp_path):
    class Sized(Toy):
        batch_size = 2

        def train_dataloader(self):
            return batches(64, self.batch_size)

        def val_dataloader(self):
            return batches(24, 8, shuffle=False, seed=1)

    def run(folder, *ours):
        finder = lightning(".callbacks").BatchSizeFinder(max_trials=2, steps_per_trial=2)
        module = make(Sized)
        torch.manual_seed(0)
        trainer = lightning().Trainer(
            max_steps=6,
            callbacks=[*ours, finder],
            default_root_dir=tmp_path / folder,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module)
        return module

    callback = MergeCallback(2, 3)
    without, watched = run("without"), run("with", callback)
    assert without.batch_size == watched.batch_size > 2
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(without.parameters(), watched.parameters(), strict=True)
    )
    assert callback.snapshot_steps == [2, 4, 6]


@pytest.mark.filterwarnings("ignore::UserWarning")
@averages_weights
def test_lightnings_weight_averaging_works_beside_it(tmp_path):
    def run(folder, *ours):
        average = lightning(".callbacks").EMAWeightAveraging(decay=0.9)
        return fit(make(Toy), tmp_path / folder, *ours, average)

    callback, tracker = MergeCallback(2, 3), Tracker()
    without, watched = run("without"), run("with", callback, tracker)
    assert_same_training(without, watched)
    expected = tracker.merged(callback.coefficients())
    for name, tensor in expected.items():
        torch.testing.assert_close(callback.merged_state_dict()[name].double(), tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("arguments", [{"fast_dev_run": True}, {"max_steps": 0}, {"max_epochs": 0, "max_steps": -1}])
def test_runs_that_hardly_train_are_the_same_and_leave_no_merge(tmp_path, arguments):
    callback = MergeCallback(100, 3)
    without = fit(make(Toy), tmp_path / "without", **arguments)
    watched = fit(make(Toy), tmp_path / "with", callback, **arguments)
    assert_same_training(without, watched)
    assert not any(name.startswith("merge") for metrics in watched.epoch_metrics for name in metrics)
    with pytest.raises(RuntimeError, match="nothing was captured yet"):
        callback.merged_state_dict()


def test_a_reference_merge_is_not_fooled_by_order():
    first, second = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
    assert reference.merge([first, second], [0.25, 0.75])["w"] == 2.5


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.slow
def test_a_parameter_that_gets_its_shape_late_begins_a_new_window(tmp_path):
    without = fit(make(LateLazy), tmp_path / "without")
    callback = MergeCallback(1, 30, merges={"sma": "sma", "ema": Ema(half_life_steps=3)})
    with pytest.warns(UserWarning, match="The trainable parameters changed before step 4"):
        watched = fit(make(LateLazy), tmp_path / "with", callback)
    assert_same_training(without, watched)
    assert callback.snapshot_steps == list(range(4, 25))
    assert "lazy.weight" in callback.merged_state_dict("ema")
