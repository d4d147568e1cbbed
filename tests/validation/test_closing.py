"""What the terminal shows at the end of a run."""

import math
import re

import pytest
import torch
from torch import nn

from merge_callback import AnnealBranch, Ema, MergeCallback, Window
from merge_callback.live.evaluate import LoggedValue
from merge_callback.prediction.bias import Prediction
from merge_callback.prediction.forecasts import Forecast
from merge_callback.prediction.river import Composition, Decay
from merge_callback.prediction.validations import StableValidation
from merge_callback.validation.closing import MAX_METRICS, Compared, Decayed
from merge_callback.validation.evaluation import Evaluated, Evaluation
from merge_callback.validation.logged import LoggedName
from merge_callback.validation.reasons import Circumstances, circumstances
from merge_callback.validation.results import collecting_results
from tests.helpers.toys import Base, BusyToy, ResumableBatches, Toy, batches, fit, lightning, make
from tests.prediction.test_predictor import Decaying

SEVERAL = {"sma": "sma", "late (x)": "wma", "ema": Ema(half_life=0.1)}
USUAL = Circumstances(
    step=1000,
    num_steps=2000,
    num_snapshots=10,
    capacity=10,
    is_growing=False,
    span_steps=100.0,
    is_rate_constant=True,
    has_stale_statistics=False,
)


def closing(caplog):
    """The lines that a callback said at the end."""
    (said,) = [each.getMessage() for each in caplog.records if "merges took" in each.getMessage()]
    assert max(map(len, said.splitlines())) <= 80
    return said


def compared(values, live, circumstances=USUAL, merges=None):
    logged = {LoggedName(*name): LoggedValue(torch.tensor(value)) for name, value in values.items()}
    beside = {name: LoggedValue(torch.tensor(value)) for name, value in live.items()}
    return Compared(9, beside, logged, merges or {"": ("sma", "10 snapshots, 90 steps")}, circumstances)


def test_a_run_ends_with_live_and_merged_values_and_what_they_cost(tmp_path, caplog):
    run = fit(make(Toy), tmp_path, MergeCallback(2, 5, merges=SEVERAL))
    said = closing(caplog)
    costs = r"merges took .* s, (.*)% of the run\n\((.*)% validating them, (.*)% capturing, merging, drawing\)"
    found = re.search(costs, said)
    of_run, validating, others = map(float, found.groups())
    assert of_run == pytest.approx(validating + others, abs=0.2)
    assert 0 < validating < of_run
    metrics = run.trainer.callback_metrics
    for text in ("\nsma: 5 snapshots, 8 steps\n", "\nema: every step"):
        assert text in said
    for name in ("val_loss", "merged/val_loss", "merged_late__x_/val_loss"):
        assert f"{metrics[name]:.4f}" in said
    assert f"{metrics['merge_gain/val_loss']:+.4f}" in said
    assert "predicted" not in said


def test_the_prediction_stands_beside_with_its_interval_and_small_numbers_keep_their_digits():
    values = {
        ("merged", "", "loss"): 1.5,
        ("merge_gain", "", "loss"): 0.5,
        ("annealed", "", "loss"): 1.25,
        ("annealed", "", "loss", "/low"): 1.125,
        ("annealed", "", "loss", "/high"): 1.375,
        ("merged", "", "mse"): 1e-5,
        ("merge_gain", "", "mse"): 2e-5,
    }
    assert compared(values, {"loss": 2.0, "mse": 3e-5}).describe().splitlines() == [
        "sma (10 snapshots, 90 steps), at step 9",
        "metric    live  merged     gain        predicted",
        "------  ------  ------  -------  ---------------",
        "loss    2.0000  1.5000  +0.5000  1.2500 ± 0.1250",
        "mse      3e-05   1e-05   +2e-05                -",
    ]


def test_no_name_is_broken_no_nan_has_a_sign_and_further_metrics_are_counted():
    names = [f"val/a_long_name_of_a_metric_of_a_module_with_parts/dataloader_idx_{number}" for number in range(1000)]
    values = {(kind, "", name): math.nan for name in names for kind in ("merged", "merge_gain")}
    said = compared(values, dict.fromkeys(names, 1.0)).describe()
    assert all(name in said.splitlines() for name in names[:MAX_METRICS])
    assert names[MAX_METRICS] not in said
    assert f"and {1000 - MAX_METRICS} further metrics, which are in the loggers" in said
    assert "nan" in said
    assert "+nan" not in said
    assert max(map(len, said.splitlines())) <= 80


def test_a_decay_is_told_as_one(tmp_path, caplog):
    run = fit(make(Decaying), tmp_path, MergeCallback(1, 4, merges="sma"))
    said = closing(caplog)
    # The merge is set beside the live model as it was before the decay, and nowhere beside the annealed one.
    live, merged = dict(run.logged("val_loss")), dict(run.logged("merged/val_loss"))
    table = next(line for line in said.splitlines() if line.startswith("val_loss") and "+" in line).split()
    assert table[:3] == ["val_loss", f"{live[15]:.4f}", f"{merged[15]:.4f}"]
    assert "(4 snapshots, 3 steps), at step 16, before the decay" in said
    assert "after the decay, at step 24, and what step 16 had said" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("val_loss  ")][1:]
    assert rows == [
        ["val_loss", "live", f"{live[15]:.4f}", f"{live[23]:.4f}"],
        ["val_loss", "merged", f"{merged[15]:.4f}", f"{live[23]:.4f}"],
    ]


def test_a_run_that_is_resumed_in_its_decay_tells_what_was_said_before(tmp_path, caplog):
    class Saving(lightning().Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.global_step == 20:
                trainer.save_checkpoint(tmp_path / "20.ckpt")

    fit(make(Decaying), tmp_path / "whole", MergeCallback(1, 4), Saving(), train=ResumableBatches())
    whole = closing(caplog)
    caplog.clear()
    resumed = {"train": ResumableBatches(), "ckpt_path": tmp_path / "20.ckpt"}
    fit(make(Decaying), tmp_path / "rest", MergeCallback(1, 4), **resumed)
    rest = closing(caplog)
    # What it came to depends on dropout, whose random numbers begin anew.
    rows = [
        [line.split()[:3] for line in said.splitlines() if " live " in line or " merged " in line]
        for said in (whole, rest)
    ]
    assert rows[1] == rows[0][-len(rows[1]) :]
    assert len(rows[1]) == 4
    assert "before the decay" not in rest


def test_each_interval_holds_or_does_not():
    before = StableValidation(80, 8, live={"loss": 2.0, "other": 1.0}, merged={"loss": 1.5})
    decay = Decay(80, 20)
    decayed = Decayed(
        before,
        step=100,
        values={"loss": 1.25},
        predictions={"loss": Prediction(1.3, 1.25, 1.35)},
        forecasts={"loss": Forecast(decay, Prediction(1.4, 1.3, 1.5), "")},
    )
    assert decayed.describe().splitlines()[1:] == [
        "metric  said        value          interval  came to  holds",
        "------  ---------  ------  ----------------  -------  -----",
        "loss    live       2.0000                 -   1.2500      -",
        "loss    merged     1.5000                 -   1.2500      -",
        "loss    predicted  1.3000  1.2500 to 1.3500   1.2500    yes",
        "loss    forecast   1.4000  1.3000 to 1.5000   1.2500     no",
    ]


def test_a_forecast_of_another_length_is_neither_right_nor_wrong():
    before = StableValidation(80, 8, live={"loss": 2.0}, merged={"loss": 1.5})
    forecasts = {"loss": Forecast(Decay(80, 20), Prediction(1.4, 1.3, 1.5), "")}
    lines = Decayed(before, 180, {"loss": 1.25}, forecasts=forecasts).describe().splitlines()
    assert lines[-1].split() == ["loss", "forecast", "of", "20", "steps", "1.4000", "1.3000", "to", "1.5000", "1.2500"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create:UserWarning")
@pytest.mark.filterwarnings("ignore:.*the checkpoint holds no state of it:UserWarning")
@pytest.mark.filterwarnings("ignore:.*the learning rate was not constant:UserWarning")
def test_a_branch_tells_what_its_decay_came_to(tmp_path, caplog):
    class Saving(lightning().Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.global_step == 16:
                trainer.save_checkpoint(tmp_path / "16.ckpt")

    trunk = fit(make(Toy), tmp_path / "trunk", MergeCallback(1, 4), Saving())
    caplog.clear()
    branch = fit(make(Toy), tmp_path / "branch", AnnealBranch(8), max_steps=30, ckpt_path=tmp_path / "16.ckpt")
    (said,) = [each.getMessage() for each in caplog.records if "came to" in each.getMessage()]
    live, merged = dict(trunk.logged("val_loss"))[15], dict(trunk.logged("merged/val_loss"))[15]
    came = f"{dict(branch.logged('val_loss'))[23]:.4f}"
    rows = [line.split() for line in said.splitlines() if line.startswith("val_loss")]
    assert rows == [["val_loss", "live", f"{live:.4f}", came], ["val_loss", "merged", f"{merged:.4f}", came]]
    # Beside a MergeCallback there is one such table, too, whether that one knows what was before or not.
    for number, merge in enumerate([MergeCallback(1, 4), MergeCallback(merges=Ema(half_life=0.1), name="other")]):
        caplog.clear()
        both = [merge, AnnealBranch(8)]
        fit(make(Toy), tmp_path / str(number), *both, max_steps=30, ckpt_path=tmp_path / "16.ckpt")
        assert caplog.text.count("came to") == 1


REASONS = {
    "the window is young: 3 of 10 snapshots": {"num_snapshots": 3, "is_growing": True},
    "the window is short: 5 steps, 0.5% of the training so far": {"span_steps": 5.0},
    "it is early: step 1000 of 20000": {"num_steps": 20_000},
    "the learning rate moved while the snapshots were taken": {"is_rate_constant": False},
    "batch norm statistics": {"has_stale_statistics": True},
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_negative_gain_has_its_reason_under_it(reason):
    values = {("merged", "", "loss"): 1.5, ("merge_gain", "", "loss"): -0.5}
    circumstances = Circumstances(**{**vars(USUAL), **REASONS[reason]})
    said = " ".join(compared(values, {"loss": 1.0}, circumstances).describe().split())
    assert "loss is worse merged than live" in said
    assert [each for each in REASONS if each in said] == [reason]


def test_a_loss_that_falls_faster_than_averaging_gains_is_a_reason_and_else_there_is_chance():
    def said(fall, gain):
        known = [
            StableValidation(step, 90, {"loss": 2 - fall * step}, {"loss": 2.0}, composition=Composition(45.0, 0.1))
            for step in range(500, 1001, 20)
        ]
        circumstances = Circumstances(**{**vars(USUAL), "history": known})
        values = {("merged", "", "loss"): 1.5, ("merge_gain", "", "loss"): gain}
        return " ".join(compared(values, {"loss": 1.0}, circumstances).describe().split())

    assert "loss moved by 0.045 in 45 steps, the mean age of what is merged" in said(0.001, -0.05)
    assert "none of the usual reasons is seen" in said(0.001, -0.1)
    assert "worse" not in said(0.001, 0.1)


def test_a_run_whose_gain_is_negative_says_why(tmp_path, caplog):
    class Slow(Base):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(6, 1)

        def training_step(self, batch, batch_idx):
            return (self.out.weight - 10).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", (self.out.weight - 10).square().mean())

        def configure_optimizers(self):
            return torch.optim.SGD([self.out.weight], lr=0.001)

    fit(make(Slow), tmp_path, MergeCallback(2, 5))
    said = closing(caplog)
    assert "val_loss is worse merged than live" in said
    assert "val_loss moved by" in said


def test_batch_norm_layers_are_mentioned_at_the_start_unless_they_are_recalibrated(tmp_path, caplog):
    fit(make(Toy), tmp_path / "plain", MergeCallback(2, 5))
    assert caplog.text.count("merges take batch norm statistics, here of 1 layer, from the newest snapshot") == 1
    assert "recalibrate_batches=10" in caplog.text
    caplog.clear()
    fit(make(Toy), tmp_path / "recalibrated", MergeCallback(2, 5, recalibrate_batches=2))
    assert "batch norm" not in caplog.text


@pytest.mark.parametrize(("num_steps", "kept", "is_growing"), [(4, 4, True), (10, 6, False), (24, 4, False)])
def test_a_ring_that_was_full_is_not_young_again(tmp_path, num_steps, kept, is_growing):
    """A ring that was thinned has fewer snapshots than it holds."""
    callback = MergeCallback(num_snapshots=6, merges=Window(span=0.5))
    fit(make(Toy), tmp_path, callback, max_steps=num_steps)
    steps = callback.snapshot_steps
    assert len(steps) == kept
    window = Evaluated(None, {steps[-1]: 1.0}, [], None, "", {})
    evaluation = Evaluation(num_steps, {"window": window}, None, {"span_steps": 1.0}, is_limited=False)
    found = circumstances(evaluation, callback.session.merges, num_steps, [], has_batch_norms=False)
    assert found.is_growing == is_growing


def test_reasons_are_those_of_the_primary_merge_whatever_the_callback_is_called():
    values = {
        ("merged", "_b", "loss"): 1.5,
        ("merge_gain", "_b", "loss"): -0.5,
        ("merged", "_b_late", "loss"): 0.5,
        ("merge_gain", "_b_late", "loss"): 0.5,
    }
    merges = {"_b": ("sma", "10 snapshots, 90 steps"), "_b_late": ("late", "5 snapshots, 40 steps")}
    assert "loss is worse merged than live" in compared(values, {"loss": 1.0}, merges=merges).describe()
    values[("merge_gain", "_b", "loss")] = 0.1
    assert "worse" not in compared(values, {"loss": 1.0}, merges=merges).describe()


def row_of(said, metric):
    (row,) = [line.split() for line in said.splitlines() if line.startswith(f"{metric} ")]
    return row


def test_a_sound_merge_beside_a_broken_live_model_is_shown():
    values = {("merged", "", "loss"): 0.5, ("merge_gain", "", "loss"): math.nan}
    assert row_of(compared(values, {"loss": math.nan}).describe(), "loss") == ["loss", "nan", "0.5000", "nan"]


def test_with_fewer_batches_live_and_merged_value_are_of_the_same_batches(tmp_path, caplog):
    """An accuracy less its gain, on other batches, might be more than one."""
    run = fit(make(BusyToy), tmp_path, MergeCallback(2, 3, limit_batches=1))
    _, live, merged, gain = row_of(closing(caplog), "val_accuracy")
    metrics = run.epoch_metrics[-1]
    assert merged == f"{metrics['merged/val_accuracy']:.4f}"
    assert gain == f"{metrics['merge_gain/val_accuracy']:+.4f}"
    assert float(merged) - float(live) == pytest.approx(float(gain), abs=2e-4)
    # Means over batches are told of the whole validation.
    assert row_of(closing(caplog), "val_loss")[1] == f"{metrics['val_loss']:.4f}"


def test_without_anything_to_compare_there_is_no_table():
    assert compared({}, {}).describe() == ""
    assert Decayed(StableValidation(80, 8, {"a": 1.0}, {"a": 1.0}), 90, {"b": 1.0}).describe() == ""


def test_a_metric_that_the_last_validation_did_not_log_came_to_nothing(tmp_path, caplog):
    class Now(Decaying):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if self.trainer.global_step < 20:
                self.log("early", 1.0)

    with collecting_results() as fits:
        fit(make(Now), tmp_path, MergeCallback(1, 4))
    table = closing(caplog).partition("after the decay")[2]
    assert "val_loss" in table
    assert "early" not in table
    assert set(fits[-1][-1].metrics) == {"val_loss", "val_accuracy"}


def test_each_fit_tells_of_its_own_decay(tmp_path, caplog):
    class Long(Toy):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (40 - step) / 24))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    run = fit(make(Long), tmp_path, MergeCallback(1, 4))
    assert "after the decay, at step 24" in closing(caplog)
    caplog.clear()
    run.trainer.fit_loop.epoch_loop.max_steps = 27
    run.trainer.fit(run.module, batches(), batches(24, 8, shuffle=False, seed=1))
    assert "after the decay" not in caplog.text
