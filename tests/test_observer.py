"""The observer rule: training with the callback is bit-identical to training without it."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from merge_callback import MergeCallback, Window
from tests.toys import BusyToy, Toy, assert_same_training, batches, fit, lightning, make

pytestmark = pytest.mark.usefixtures("both_lightnings")

MERGES = {"sma": "sma", "late": Window(span=0.3), "sqrt": "1-sqrt"}


@pytest.mark.parametrize("module_class", [Toy, BusyToy])
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
    "callback_arguments", [{}, {"every_n_train_steps": 2, "limit_batches": 1}], ids=["all", "limited"]
)
def test_training_is_bit_identical_with_and_without_the_callback(tmp_path, module_class, arguments, callback_arguments):
    without = fit(make(module_class), tmp_path / "without", **arguments)
    callback = MergeCallback(num_snapshots=4, merges=MERGES, **callback_arguments)
    watched = fit(make(module_class), tmp_path / "with", callback, **arguments)
    assert watched.logged("merged/val_loss")
    assert_same_training(without, watched)
    if module_class is BusyToy:
        assert torch.equal(torch.stack(without.module.seen), torch.stack(watched.module.seen))
        assert without.module.num_validations == watched.module.num_validations


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
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
