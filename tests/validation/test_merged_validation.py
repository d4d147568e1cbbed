"""What a merged validation logs: names and values, gains, limits, monitors."""

import sys
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from merge_callback import Ema, MergeCallback, MergedCheckpoint, Window
from merge_callback.live.evaluate import LoggedValue
from merge_callback.validation.directions import first_loss
from merge_callback.validation.logged import Names
from merge_callback.validation.results import collecting_results
from tests.helpers import reference
from tests.helpers.toys import BusyToy, Toy, Tracker, assert_same_training, batches, fit, lightning, make, same


@pytest.mark.usefixtures("both_lightnings")
def test_merged_values_are_those_of_validating_the_merge(tmp_path):
    callback = MergeCallback(2, 3, merges={"sma": "sma", "wma": "wma"})
    run = fit(make(Toy), tmp_path, callback)
    for label, name in (("merged", "sma"), ("merged_wma", "wma")):
        other = make(Toy)
        other.load_state_dict(callback.merged_state_dict(name))
        trainer = lightning().Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        (expected,) = trainer.validate(other, batches(24, 8, shuffle=False, seed=1), verbose=False)
        for metric, value in expected.items():
            assert run.epoch_metrics[-1][f"{label}/{metric}"].item() == value


@pytest.mark.usefixtures("both_lightnings")
def test_every_metric_has_its_merged_value_and_gain_at_the_step_and_in_the_row_of_the_live_one(tmp_path):
    callback = MergeCallback(2, 3, merges={"sma": "sma", "late": Window(span_steps=3)})
    run = fit(make(BusyToy), tmp_path, callback)
    metrics = run.epoch_metrics[-1]
    names = {"val_loss", "val_accuracy", "val/noisy_loss", "val/noisy_loss_epoch", "micro", "mean_noise", "hidden"}
    for name in names:
        for label in ("", "_late"):
            assert f"merged{label}/{name}" in metrics
            assert f"merge_gain{label}/{name}" in metrics
    assert {name for name in metrics if name.startswith("merge/")} == {
        "merge/num_snapshots",
        "merge/span_steps",
        "merge/spread",
        "merge/seconds",
    }
    rows = [row for row in run.rows if row["val_loss"]]
    assert len(rows) == 6
    for row in rows:
        for name in ("merged/val_loss", "merge_gain_late/val_loss", "merged/val/noisy_loss_epoch", "merge/spread"):
            assert row[name]
    assert "merged/val/noisy_loss" not in rows[0]
    assert "merged/val/noisy_loss_step" not in rows[0]


def test_the_gain_is_positive_where_the_merge_is_better(tmp_path):
    callback = MergeCallback(2, 3, higher_is_better="*noisy*")
    run = fit(make(BusyToy), tmp_path, callback)
    for metrics in run.epoch_metrics:
        names = ("val_loss", "val_accuracy", "val/noisy_loss")
        live, merged, gain = ({m: metrics[label + m] for m in names} for label in ("", "merged/", "merge_gain/"))
        assert gain["val_loss"] == live["val_loss"] - merged["val_loss"]
        assert gain["val_accuracy"] == merged["val_accuracy"] - live["val_accuracy"]
        assert gain["val/noisy_loss"] == merged["val/noisy_loss"] - live["val/noisy_loss"]


@pytest.mark.parametrize("name", ["acc", "acc_epoch", "acc/dataloader_idx_1", "acc_epoch/dataloader_idx_0"])
def test_a_pattern_also_means_the_names_that_lightning_makes_of_a_metric(name):
    names = Names("merge", "sma", higher_is_better=("acc",))
    value = LoggedValue(torch.zeros(()))
    assert names.is_higher_better(name, value)
    assert not names.is_higher_better("diversity", value)


def test_diagnostics_describe_the_primary_merge(tmp_path):
    callback, tracker = MergeCallback(2, 5, merges={"late": Window(span_steps=5), "sma": "sma"}), Tracker()
    run = fit(make(Toy), tmp_path, callback, tracker)
    metrics = run.epoch_metrics[-1]
    used = {step: value for step, value in callback.coefficients().items() if value}
    assert list(used) == [20, 22, 24]
    assert metrics["merge/num_snapshots"] == 3
    assert metrics["merge/span_steps"] == 4
    snapshots = [tracker.parameters[step] for step in used]
    assert metrics["merge/spread"].item() == pytest.approx(reference.spread(snapshots, tracker.merged(used)), rel=1e-5)
    assert metrics["merge/seconds"] > 0


def test_the_curvature_gain_is_the_mean_live_loss_of_the_snapshots_minus_the_merges(tmp_path):
    callback = MergeCallback(4, 3, merges="wma")
    run = fit(make(Toy), tmp_path, callback)
    live, merged = dict(run.logged("val_loss")), dict(run.logged("merged/val_loss"))
    # Rows are one step behind the count of steps.
    mean = sum(value * live[step - 1] for step, value in callback.coefficients().items())
    assert callback.snapshot_steps == [16, 20, 24]
    gains = dict(run.logged("merge/curvature_gain"))
    assert list(gains) == [3, 7, 11, 15, 19, 23]
    assert gains[3] == pytest.approx(0, abs=1e-7)
    assert gains[23] == pytest.approx(mean - merged[23], rel=1e-5)


def test_without_a_live_loss_of_every_snapshot_there_is_no_curvature_gain(tmp_path):
    run = fit(make(Toy), tmp_path, MergeCallback(2, 3))
    assert run.logged("merged/val_loss")
    assert not run.logged("merge/curvature_gain")


def test_nothing_is_logged_before_the_first_snapshot(tmp_path):
    callback = MergeCallback(2, 3)
    run = fit(make(Toy, warmup_steps=10), tmp_path, callback)
    assert not any(name.startswith("merge") for metrics in run.epoch_metrics[:2] for name in metrics)
    assert [step for step, _ in run.logged("merged/val_loss")] == [11, 15, 19, 23]
    assert callback.snapshot_steps == [20, 22, 24]


@pytest.mark.usefixtures("both_lightnings")
def test_several_loaders_are_logged_one_by_one(tmp_path):
    class Several(Toy):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("val_loss", loss)
            self.log("common", loss, add_dataloader_idx=False) if dataloader_idx == 0 else None

    loaders = [batches(16, 8, shuffle=False, seed=1), batches(16, 4, shuffle=False, seed=2)]
    without = fit(make(Several), tmp_path / "without", validation=loaders)
    run = fit(make(Several), tmp_path / "with", MergeCallback(2, 3), validation=loaders)
    assert_same_training(without, run)
    metrics = run.epoch_metrics[-1]
    for name in ("val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1", "common"):
        assert metrics[f"merge_gain/{name}"] == metrics[name] - metrics[f"merged/{name}"]
    assert metrics["merged/val_loss/dataloader_idx_0"] != metrics["merged/val_loss/dataloader_idx_1"]


@pytest.mark.parametrize("limit", [2, 0.5])
def test_with_a_limit_both_sides_of_the_gain_are_taken_on_the_same_batches(tmp_path, limit):
    loader = batches(32, 8, shuffle=False, seed=1)
    limited = fit(make(Toy), tmp_path / "limited", MergeCallback(2, 3, limit_batches=limit), validation=loader)
    two_batches = fit(make(Toy), tmp_path / "two", MergeCallback(2, 3), validation=loader, limit_val_batches=2)
    for ours, theirs in zip(limited.epoch_metrics, two_batches.epoch_metrics, strict=True):
        for name in ("val_loss", "val_accuracy"):
            assert ours[f"merge_gain/{name}"] == theirs[f"merge_gain/{name}"]
            assert ours[name] != theirs[name] or name == "val_accuracy"
        # Beside the whole live validation, as if the gain were the same there. An accuracy could leave its range.
        assert ours["merged/val_loss"] == ours["val_loss"] - ours["merge_gain/val_loss"]
        assert ours["merged/val_accuracy"] == theirs["merged/val_accuracy"]


@pytest.mark.slow
def test_a_small_share_of_a_loader_is_one_batch(tmp_path):
    loader = batches(32, 8, shuffle=False, seed=1)
    small = fit(make(Toy), tmp_path / "small", MergeCallback(2, 3, limit_batches=0.01), validation=loader)
    one = fit(make(Toy), tmp_path / "one", MergeCallback(2, 3, limit_batches=1), validation=loader)
    assert small.logged("merged/val_loss") == one.logged("merged/val_loss")


def test_the_progress_bar_shows_the_primary_merge_of_what_it_shows_live_under_one_short_name(tmp_path):
    run = fit(make(BusyToy), tmp_path, MergeCallback(2, 3, merges={"sma": "sma", "wma": "wma"}))
    shown = {name: value for name, value in run.trainer.progress_bar_metrics.items() if name.startswith("merge")}
    assert shown == {"merged": run.epoch_metrics[-1]["merged/val_loss"].item()}
    assert "merged" not in run.trainer.callback_metrics


def test_a_metric_logged_by_step_alone_has_no_merged_value_and_hides_no_other(tmp_path):
    class ByStep(Toy):
        def validation_step(self, batch, batch_idx):
            self.log("by_step", 1.0, on_step=True, on_epoch=False)
            super().validation_step(batch, batch_idx)

    run = fit(make(ByStep), tmp_path, MergeCallback(2, 3))
    assert "merged/val_loss" in run.epoch_metrics[-1]
    assert "merged/by_step" not in run.epoch_metrics[-1]


def test_a_share_of_a_loader_without_length_is_refused_by_name(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(batches(16).dataset)

    stream = torch.utils.data.DataLoader(Stream(), 4)
    # At the start, long before there is a merge; a sanity check or none makes no difference.
    for num_sanity in (0, 2):
        module = make(Toy, warmup_steps=100)
        with pytest.raises(ValueError, match=r"limit_batches=0.5 is a share .* no length; give a number"):
            fit(module, tmp_path, MergeCallback(2, 3, limit_batches=0.5), validation=stream,
                num_sanity_val_steps=num_sanity)  # fmt: skip
        assert module.global_step == 0
    run = fit(make(Toy), tmp_path, MergeCallback(2, 3, limit_batches=2), validation=stream)
    assert run.logged("merged/val_loss")


def test_merges_are_evaluated_at_every_nth_validation(tmp_path):
    run = fit(make(Toy), tmp_path, MergeCallback(2, 3, evaluate_every_n_validations=3))
    assert [step for step, _ in run.logged("val_loss")] == [3, 7, 11, 15, 19, 23]
    assert [step for step, _ in run.logged("merged/val_loss")] == [11, 23]


@pytest.mark.usefixtures("both_lightnings")
@pytest.mark.slow
def test_two_callbacks_keep_their_names_and_states_apart(tmp_path):
    callbacks = MergeCallback(2, 3), MergeCallback(4, 2, merges={"wma": "wma", "sma": "sma"}, name="slow")
    assert callbacks[0].state_key != callbacks[1].state_key
    alone = fit(make(BusyToy), tmp_path / "alone", MergeCallback(2, 3))
    run = fit(make(BusyToy), tmp_path / "both", *callbacks)
    assert_same_training(alone, run)
    for name in ("merged/val_loss", "merge_gain/mean_noise", "merge/spread"):
        assert alone.epoch_metrics[-1][name] == run.epoch_metrics[-1][name]
    for name in ("merged_slow/val_loss", "merged_slow_sma/val_loss", "merge_gain_slow/val_loss", "merge_slow/spread"):
        assert name in run.epoch_metrics[-1]
    assert not any("merged" in name and name.count("merged") > 1 for name in run.epoch_metrics[-1])


@pytest.mark.usefixtures("both_lightnings")
def test_early_stopping_and_checkpoints_monitor_merged_values_of_the_same_validation(tmp_path):
    stopping = lightning(".callbacks").EarlyStopping(
        "merged/val_loss", patience=1, mode="max", check_on_train_epoch_end=False
    )
    checkpoint = lightning(".callbacks").ModelCheckpoint(tmp_path / "best", monitor="merged/val_loss", save_top_k=1)
    with pytest.warns(UserWarning, match="EarlyStopping.*has mode='max', but less of it is better") as said:
        run = fit(make(Toy), tmp_path, stopping, MergeCallback(2, 3), checkpoint, enable_checkpointing=True)
    assert sum("has mode=" in str(warning.message) for warning in said) == 1
    losses = [value for _, value in run.logged("merged/val_loss")]
    assert checkpoint.best_model_score.item() == pytest.approx(min(losses))
    assert run.trainer.global_step < 24
    best = int(torch.tensor(losses).argmin())
    assert torch.load(checkpoint.best_model_path, weights_only=True)["global_step"] == 4 * (best + 1)


@pytest.mark.filterwarnings("ignore:The learning rate was not constant")
def test_a_monitor_of_a_merge_that_is_never_there_gets_its_reason_before_the_run_ends(tmp_path):
    class Falling(Toy):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 24)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    why = r"which it was in none of \d+ steps; if it never is, start='any' captures whatever it does"
    best = lightning(".callbacks").ModelCheckpoint(tmp_path / "best", monitor="merged/val_loss")
    with (
        pytest.warns(UserWarning, match=rf"ModelCheckpoint monitors 'merged/val_loss', which is not there .*: .*{why}"),
        pytest.raises(Exception, match="could not find the monitored key"),
    ):
        fit(make(Falling), tmp_path, MergeCallback(2, 3), best, enable_checkpointing=True)
    # Another callback's values are there, so nothing is said of them.
    stopping = lightning(".callbacks").EarlyStopping("merged/val_loss", check_on_train_epoch_end=False, patience=9)
    fit(make(Toy), tmp_path, MergeCallback(1, 3), MergeCallback(1, 3, name="late", start=20), stopping)
    # What waits is not warned of, and a file that is asked for at the end has the reason in its error.
    callback = MergeCallback(2, 3)
    waiting = MergedCheckpoint(callback, dirpath=tmp_path / "merged", monitor="merged/val_loss")
    stopping = lightning(".callbacks").EarlyStopping("merged/val_loss", strict=False, check_on_train_epoch_end=False)
    callbacks = [callback, waiting, stopping, lightning(".callbacks").ModelCheckpoint(tmp_path / "plain")]
    with pytest.warns(UserWarning, match="the learning rate was not constant") as said:
        fit(make(Falling), tmp_path, *callbacks, enable_checkpointing=True)
    assert not any("monitors" in str(warning.message) for warning in said)
    with pytest.raises(RuntimeError, match=f"nothing was captured yet, so there is no merge: .*{why}"):
        callback.save_merged(tmp_path / "merged.ckpt")


@pytest.mark.usefixtures("both_lightnings")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_merged_validation_arrives_and_the_live_weights_are_back(tmp_path, error):
    class Failing(Toy):
        calls = 0
        trained = None

        def on_train_batch_end(self, *args):
            self.trained = {name: tensor.clone() for name, tensor in self.state_dict().items()}

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.calls += self.trained is not None
            if self.calls == 2:
                # The second batch of the first evaluation after training began: the merge is in place now.
                assert not same(dict(self.state_dict()), self.trained)
                raise error("from the user's own code")

    module, callback = make(Failing), MergeCallback(2, 3)
    arrives = SystemExit if error is KeyboardInterrupt else error
    rng = []
    with pytest.raises(arrives) as raised:
        fit(module, tmp_path, callback, Remember(rng))
    notes = getattr(raised.value, "__notes__", [])
    if error is RuntimeError and sys.version_info >= (3, 11):
        assert "in the validation of the merge 'sma', which is before that of the live model" in notes
    assert same(dict(module.state_dict()), module.trained)
    assert same(torch.get_rng_state(), rng[-1])
    assert "on_validation_epoch_end" not in vars(module)
    assert callback.snapshot_steps == [2, 4]


class Remember(Callback):
    def __init__(self, rng):
        self.rng = rng

    def on_train_batch_end(self, *args):
        self.rng.append(torch.get_rng_state())


def test_a_pattern_that_fits_no_metric_is_told_of_once(tmp_path):
    with pytest.warns(
        UserWarning, match=r"higher_is_better='\*accurracy\*' fits none of the metrics .*val_loss"
    ) as told:
        fit(make(Toy), tmp_path, MergeCallback(2, 3, higher_is_better=("*accurracy*", "val_accuracy")))
    assert sum("higher_is_better" in str(warning.message) for warning in told) == 1


@pytest.mark.parametrize(("options", "is_told"), [({}, False), ({"evaluate_every_n_validations": 2}, True)])
def test_early_stopping_that_would_count_left_out_validations_is_told_of(tmp_path, caplog, options, is_told):
    stopping = lightning(".callbacks").EarlyStopping("merged/val_loss", patience=9, strict=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(make(Toy), tmp_path, MergeCallback(1, 4, **options), stopping)
    assert any("patience" in str(warning.message) for warning in told) == is_told


@pytest.mark.parametrize(
    ("merges", "options", "why"),
    [
        # The first validation is left out, so there is no earlier value to see again.
        ("sma", {"evaluate_every_n_validations": 2}, "leaves this validation out"),
        # Of two merges, the one that is monitored is not there yet.
        ({"sma": "sma", "ema": Ema(half_life_steps=4)}, {"every_n_train_steps": 9}, "begins once"),
    ],
)
@pytest.mark.filterwarnings("ignore:MergeCallback.*where a merged validation is left out")
def test_a_strict_monitor_of_one_merge_that_is_not_there_is_warned_of(tmp_path, merges, options, why):
    stopping = lightning(".callbacks").EarlyStopping("merged/val_loss", check_on_train_epoch_end=False)
    callback = MergeCallback(**({"every_n_train_steps": 1, "num_snapshots": 4, "merges": merges} | options))
    with (
        pytest.warns(UserWarning, match=f"EarlyStopping monitors 'merged/val_loss', .* not there at step 4: .*{why}"),
        pytest.raises(RuntimeError, match="which is not available"),
    ):
        fit(make(Toy), tmp_path, callback, stopping)


def test_each_of_several_early_stoppings_is_told_of_left_out_validations(tmp_path):
    stoppings = [lightning(".callbacks").EarlyStopping(f"merged/{name}", strict=False) for name in ("val_loss", "x")]
    with pytest.warns(UserWarning, match="patience") as told:
        fit(make(Toy), tmp_path, MergeCallback(1, 4, evaluate_every_n_validations=2), *stoppings)
    assert sum("patience" in str(warning.message) for warning in told) == 2


class TwoRates(Toy):
    """A constant rate for 12 steps, then a tenth of it."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 12 else 0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def test_a_merge_of_an_earlier_rate_is_not_set_beside_the_live_model_of_the_new_one(tmp_path, caplog):
    # Validated at steps 12 and 16, with snapshots of the first rate.
    fit(make(TwoRates), tmp_path / "one", MergeCallback(6, 4), max_steps=17)
    assert "sma (2 snapshots, 6 steps), at step 12, before the learning rate changed" in caplog.text
    caplog.clear()
    # The first snapshot of the new rate is that of step 18.
    fit(make(TwoRates), tmp_path / "two", MergeCallback(6, 4), max_steps=20)
    assert "sma (1 snapshot, 0 steps), at step 20\n" in caplog.text


def test_a_validation_without_a_metric_is_told_of(tmp_path, caplog):
    class Silent(Toy):
        def validation_step(self, batch, batch_idx):
            pass

    fit(make(Silent), tmp_path, MergeCallback(2, 3))
    assert caplog.text.count("the validation logs no metric of its epoch, so merges cannot be compared") == 1


def test_what_a_module_logs_to_set_the_axis_of_its_logger_is_no_result(tmp_path, caplog):
    class OwnAxis(Toy):
        def validation_step(self, batch, batch_idx):
            self.log("step", float(self.trainer.global_step))
            super().validation_step(batch, batch_idx)

    with collecting_results() as fits:
        fit(make(OwnAxis), tmp_path, MergeCallback(2, 3, forecast=0.1))
    assert first_loss({name: each.higher_is_better for name, each in fits[-1][0].metrics.items()}) == "val_loss"
    assert [line for line in caplog.text.splitlines() if line.startswith("val_loss ")]
    assert not [line for line in caplog.text.splitlines() if line.startswith("step ")]
    assert "forecast/step" not in caplog.text
