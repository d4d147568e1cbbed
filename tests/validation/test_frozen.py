"""While the rate decays the merge is frozen: it is validated once, and its values are repeated while they hold."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from merge_callback import Ema, MergeCallback, Parts
from merge_callback.live.checksums import checksums_without
from tests.helpers.toys import ResumableBatches, Toy, assert_same_training, batches, fit, lightning, make

pytestmark = pytest.mark.usefixtures("both_lightnings")
STABLE_STEPS, NUM_STEPS = 12, 28
# The step of each validation batch. Outside of the module, whose attributes a merged validation restores.
VALIDATED: list[int] = []


class Decaying(Toy):
    """Twelve steps at a constant rate, and twelve of a decay."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD((p for p in self.parameters() if p.requires_grad), 0.05)
        decay = LambdaLR(optimizer, lambda step: min(1.0, (NUM_STEPS - step) / (NUM_STEPS - STABLE_STEPS + 1)))
        return [optimizer], [{"scheduler": decay, "interval": "step"}]

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        VALIDATED.append(self.global_step)


def counted(folder, *callbacks, toy_class=Decaying, **arguments):
    """The run, and how many validation batches each step had."""
    VALIDATED.clear()
    options = {"max_steps": NUM_STEPS, "val_check_interval": 4, "num_sanity_val_steps": 0} | arguments
    run = fit(make(toy_class), folder, *callbacks, **options)
    return run, {step: VALIDATED.count(step) for step in range(4, NUM_STEPS + 1, 4)}


def test_the_frozen_merge_is_validated_once_and_its_values_are_logged_at_each_validation(tmp_path, caplog):
    without, alone = counted(tmp_path / "without")
    (once,) = set(alone.values())
    callback = MergeCallback(2, 4, merges={"sma": "sma", "ema": Ema(half_life_steps=3)})
    with caplog.at_level("INFO"):
        run, found = counted(tmp_path / "with", callback)
    assert_same_training(without, run)
    # Step 12 is the last with the full rate. The averages had seen it too. That of step 16 finds the same values again.
    assert found == {4: 3 * once, 8: 3 * once, 12: 3 * once, 16: 3 * once, 20: once, 24: once, 28: once}
    for name in ("merged/val_loss", "merged_ema/val_loss", "merged/val_accuracy"):
        values = dict(run.logged(name))
        assert values[15] == values[19] == values[23] == values[27] == values[11]
        assert values[11] != values[7]
    live, gains = (dict(run.logged(name)) for name in ("val_loss", "merge_gain/val_loss"))
    for step in (15, 19, 23, 27):
        assert gains[step] == pytest.approx(live[step] - dict(run.logged("merged/val_loss"))[step], abs=1e-6)
    said = [record.getMessage() for record in caplog.records]
    assert any("its values of step 16 were repeated 3 times" in each for each in said)
    # They are what the merge has now.
    with callback.merged_weights(run.module), torch.no_grad():
        run.module.eval()
        losses = [F.cross_entropy(run.module(x), y) for x, y in batches(24, 8, shuffle=False, seed=1)]
    assert float(torch.stack(losses).mean()) == pytest.approx(dict(run.logged("merged/val_loss"))[27], abs=1e-5)


class Teaching(Callback):
    """Writes to a frozen parameter once, as averages of a teacher do, where no version counter sees it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 17:
            pl_module.frozen.bias.data[0] += 1.0


class Reading(Decaying):
    def forward(self, x):
        return super().forward(self.frozen(x))


class Moving(Decaying):
    """A one that moves through a buffer, whose sum stays."""

    def __init__(self):
        super().__init__()
        self.register_buffer("stage", torch.eye(64, dtype=torch.int64)[0])

    def training_step(self, batch, batch_idx):
        self.stage = self.stage.roll(1)
        return super().training_step(batch, batch_idx)


class Noisy(Decaying):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class ByStep(Decaying):
    def on_validation_epoch_end(self):
        self.log("weighted", float(self.global_step))


class NowAndThen(Decaying):
    def on_validation_epoch_end(self):
        if self.global_step % 8 == 0:
            self.log("rare", 1.0)


class Counter(Decaying):
    def __init__(self):
        super().__init__()
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch, batch_idx):
        self.num_seen += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ((Reading, {}, [Teaching], {}), [20, 24]),
        ((Decaying, {"parts": Parts(exclude="out.*")}, [], {}), [20, 24, 28]),
        ((Decaying, {"recalibrate_batches": 2}, [], {}), [20, 24, 28]),
        ((Counter, {}, [], {}), [20, 24, 28]),
        ((Moving, {}, [], {}), [20, 24, 28]),
        ((Noisy, {}, [], {}), [20, 24, 28]),
        ((ByStep, {}, [], {}), [20, 24, 28]),
        # Two validations have other metrics than the one before.
        ((NowAndThen, {}, [], {}), [20, 24, 28]),
        ((Decaying, {}, [], {}), []),
    ],
    ids=["frozen", "excluded", "recalibrated", "counters", "moving", "random", "by step", "now and then", "nothing"],
)
@pytest.mark.sample(4)
def test_it_is_validated_again_when_anything_else_has_changed(tmp_path, changed, again):
    toy_class, arguments, callbacks, options = changed
    callback = MergeCallback(**({"every_n_train_steps": 2, "num_snapshots": 4} | arguments))
    _, found = counted(tmp_path, callback, *(each() for each in callbacks), toy_class=toy_class, **options)
    late = (20, 24, 28)
    assert [step for step in late if found[step] == found[12]] == again
    assert [step for step in late if 2 * found[step] == found[12]] == [step for step in late if step not in again]


def test_it_is_validated_again_after_the_loaders_were_loaded_again(tmp_path):
    class Loading(Decaying):
        def val_dataloader(self):
            return batches(24, 8, shuffle=False, seed=1)

    found = []
    for num_epochs in (0, 1):
        VALIDATED.clear()
        trainer = lightning().Trainer(
            max_steps=NUM_STEPS,
            val_check_interval=4,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=num_epochs,
            callbacks=[MergeCallback(2, 4)],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(make(Loading), batches())
        found.append([VALIDATED.count(step) for step in (12, 16, 20, 24, 28)])
    # Epochs of eight steps.
    assert found == [[6, 6, 3, 3, 3], [6, 6, 6, 6, 6]]


@pytest.mark.slow
def test_a_merge_that_does_not_change_is_validated_again_while_the_rate_is_constant(tmp_path):
    """A validation that draws random numbers then sees the same ones for live and merged weights."""
    _, found = counted(tmp_path, MergeCallback(6, 4), val_check_interval=1)
    assert found[8] == found[12] == 2 * found[4]
    assert [VALIDATED.count(step) for step in range(6, 12)] == [found[8]] * 6


@pytest.mark.filterwarnings("ignore:Be aware that when using:UserWarning")
def test_a_run_resumed_in_its_decay_logs_what_the_uninterrupted_one_repeats(tmp_path):
    def run(folder, *callbacks, **arguments):
        module = make(Decaying)
        module.dropout.p = 0.0
        options = {"train": ResumableBatches(), "max_steps": NUM_STEPS, "num_sanity_val_steps": 0} | arguments
        return fit(module, folder, MergeCallback(2, 4), *callbacks, **options)

    saving = lightning(".callbacks").ModelCheckpoint(tmp_path / "saved", every_n_train_steps=22, filename="{step}")
    whole = run(tmp_path / "whole", saving, enable_checkpointing=True)
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    resumed = run(tmp_path / "resumed", ckpt_path=str(path))
    for name in ("merged/val_loss", "merge_gain/val_loss", "merged/val_accuracy"):
        assert resumed.logged(name) == [(step, value) for step, value in whole.logged(name) if step > 22]
        assert len(resumed.logged(name)) == 2


def test_parameters_that_never_get_a_shape_do_not_end_the_run(tmp_path):
    class Unshaped(Decaying):
        def __init__(self):
            super().__init__()
            self.never = torch.nn.LazyLinear(3)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature")
        run, _ = counted(tmp_path, MergeCallback(2, 4), toy_class=Unshaped)
    assert len(run.logged("merged/val_loss")) == 7


def test_a_checksum_needs_little_memory_and_sees_every_move():
    module = torch.nn.Module()
    module.register_buffer("large", torch.arange(3_000_000, dtype=torch.int32))
    before = checksums_without(module, [])
    assert checksums_without(module, []) == before
    module.large[[5, 2_500_000]] = module.large[[2_500_000, 5]]
    assert checksums_without(module, []) != before
    module.large[[5, 2_500_000]] = module.large[[2_500_000, 5]]
    assert checksums_without(module, []) == before
    assert checksums_without(module, ["large"]) == []


def test_with_a_limit_the_live_model_is_still_validated_on_the_same_batches(tmp_path):
    run, found = counted(tmp_path, MergeCallback(2, 4, limit_batches=1))
    assert found[12] == found[20] + 1
    live, merged, gains = (dict(run.logged(name)) for name in ("val_loss", "merged/val_loss", "merge_gain/val_loss"))
    assert all(merged[step] == pytest.approx(live[step] - gains[step], abs=1e-6) for step in merged)
    assert len({gains[step] for step in (15, 19, 23)}) == 3


def test_a_budget_does_not_skip_what_costs_nothing(tmp_path):
    callback = MergeCallback(12, 4, max_overhead=0.999)

    class Poor(Callback):
        """After step 16 the budget is spent."""

        def on_train_batch_end(self, trainer, pl_module, *arguments):
            if trainer.global_step == 17:
                callback.session.validation.budget.spend(1e6)

    run, _ = counted(tmp_path, callback, Poor())
    assert callback.session.validation.budget.num_skipped == 0
    assert [step for step, _ in run.logged("merged/val_loss")] == [11, 15, 19, 23, 27]
