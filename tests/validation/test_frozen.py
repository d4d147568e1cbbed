"""While the rate decays the merge is frozen: it is validated once, and its values are repeated while they hold."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from merge_callback import Ema, MergeCallback, Parts
from tests.helpers.toys import Toy, assert_same_training, batches, fit, lightning, make

pytestmark = pytest.mark.usefixtures("both_lightnings")
STABLE_STEPS, NUM_STEPS = 12, 24
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
    # Step 12 is the last with the full rate. The averages had seen it too.
    assert found == {4: 3 * once, 8: 3 * once, 12: 3 * once, 16: once, 20: once, 24: once}
    for name in ("merged/val_loss", "merged_ema/val_loss", "merged/val_accuracy"):
        values = dict(run.logged(name))
        assert values[15] == values[19] == values[23] == values[11]
        assert values[11] != values[7]
    live, gains = (dict(run.logged(name)) for name in ("val_loss", "merge_gain/val_loss"))
    for step in (15, 19, 23):
        assert gains[step] == pytest.approx(live[step] - dict(run.logged("merged/val_loss"))[step], abs=1e-6)
    said = [record.getMessage() for record in caplog.records]
    assert any("its values of step 12 were repeated 3 times" in each for each in said)
    # They are what the merge has now.
    with callback.merged_weights(run.module), torch.no_grad():
        run.module.eval()
        losses = [F.cross_entropy(run.module(x), y) for x, y in batches(24, 8, shuffle=False, seed=1)]
    assert float(torch.stack(losses).mean()) == pytest.approx(dict(run.logged("merged/val_loss"))[23], abs=1e-5)


class Teaching(Callback):
    """Writes to a frozen parameter once, as averages of a teacher do, where no version counter sees it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 17:
            pl_module.frozen.bias.data[0] += 1.0


class Reading(Decaying):
    def forward(self, x):
        return super().forward(self.frozen(x))


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
        ((Reading, {}, [Teaching], {}), [20]),
        ((Decaying, {"parts": Parts(exclude="out.*")}, [], {}), [16, 20, 24]),
        ((Decaying, {"recalibrate_batches": 2}, [], {}), [16, 20, 24]),
        ((Counter, {}, [], {}), [16, 20, 24]),
        ((Decaying, {}, [], {}), []),
    ],
    ids=["frozen", "excluded", "recalibrated", "counters", "nothing"],
)
def test_it_is_validated_again_when_anything_else_has_changed(tmp_path, changed, again):
    toy_class, arguments, callbacks, options = changed
    callback = MergeCallback(**({"every_n_train_steps": 2, "num_snapshots": 4} | arguments))
    _, found = counted(tmp_path, callback, *(each() for each in callbacks), toy_class=toy_class, **options)
    assert [step for step in (16, 20, 24) if found[step] == found[12]] == again
    assert [step for step in (16, 20, 24) if 2 * found[step] == found[12]] == [
        s for s in (16, 20, 24) if s not in again
    ]


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
        found.append([VALIDATED.count(step) for step in (12, 16, 20, 24)])
    # Epochs of eight steps.
    assert found == [[6, 3, 3, 3], [6, 3, 6, 3]]


def test_a_merge_that_does_not_change_is_validated_again_while_the_rate_is_constant(tmp_path):
    """A validation that draws random numbers then sees the same ones for live and merged weights."""
    _, found = counted(tmp_path, MergeCallback(4, 4), val_check_interval=2)
    assert found[8] == found[4]
    counts = [VALIDATED.count(step) for step in range(4, 13, 2)]
    assert len(set(counts)) == 1


def test_with_a_limit_the_live_model_is_still_validated_on_the_same_batches(tmp_path):
    run, found = counted(tmp_path, MergeCallback(2, 4, limit_batches=1))
    assert found[12] == found[16] + 1
    live, merged, gains = (dict(run.logged(name)) for name in ("val_loss", "merged/val_loss", "merge_gain/val_loss"))
    assert all(merged[step] == pytest.approx(live[step] - gains[step], abs=1e-6) for step in merged)
    assert len({gains[step] for step in (15, 19, 23)}) == 3


def test_a_budget_does_not_skip_what_costs_nothing(tmp_path):
    # The first merged validation is that of step 12, and by then the budget is spent.
    callback = MergeCallback(12, 4, max_overhead=1e-9)
    run, _ = counted(tmp_path, callback)
    assert callback.session.validation.budget.num_skipped == 0
    assert [step for step, _ in run.logged("merged/val_loss")] == [11, 15, 19, 23]
