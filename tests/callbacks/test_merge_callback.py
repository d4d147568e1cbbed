"""What a user sees: logged names and values, merges against the float64 twin, exports, monitors, errors."""

import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F

from merge_callback import Ema, MergeCallback, SnapshotDirectory, Window
from merge_callback.live.evaluate import LoggedValue
from merge_callback.merging.rules import ema
from merge_callback.validation.logged import Names
from tests.helpers import reference
from tests.helpers.toys import BusyToy, Toy, Tracker, assert_same_training, batches, fit, lightning, make, same

# What is merged


@pytest.mark.usefixtures("both_lightnings")
@pytest.mark.parametrize("rule", ["sma", "wma", "ema", "linear", "1-sqrt", "cosine", ema(0.5), Window(span_steps=7)])
def test_the_merge_agrees_with_the_float64_twin_of_the_run(tmp_path, rule):
    callback, tracker = MergeCallback(3, 4, merges=rule), Tracker()
    run = fit(make(Toy), tmp_path, callback, tracker)
    assert callback.snapshot_steps == [15, 18, 21, 24]
    expected = tracker.merged(callback.coefficients())
    state = callback.merged_state_dict()
    assert state.keys() == run.module.state_dict().keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name].double(), tensor, rtol=1e-6, atol=1e-7)


def test_frozen_tied_and_integer_tensors_and_buffers_are_each_treated_as_they_should(tmp_path):
    callback, tracker = MergeCallback(5, 3), Tracker()
    run = fit(make(Toy), tmp_path, callback, tracker, max_steps=24)
    state, live = callback.merged_state_dict(), run.module.state_dict()
    assert torch.equal(state["inner.weight"], state["tied.weight"])
    assert not torch.equal(state["inner.weight"], live["inner.weight"])
    assert torch.equal(state["frozen.weight"], live["frozen.weight"])
    assert torch.equal(state["position_ids"], live["position_ids"])
    assert state["norm.num_batches_tracked"] == live["norm.num_batches_tracked"] == 24
    newest = tracker.buffers[callback.snapshot_steps[-1]]
    assert callback.snapshot_steps[-1] == 20
    assert torch.equal(state["norm.running_mean"], newest["norm.running_mean"])
    assert not torch.equal(state["norm.running_mean"], live["norm.running_mean"])


def test_the_state_dict_loads_strictly_into_a_new_module_and_is_a_copy(tmp_path):
    callback = MergeCallback(2, 3)
    run = fit(make(Toy), tmp_path, callback)
    before = {name: tensor.clone() for name, tensor in run.module.state_dict().items()}
    other = make(Toy)
    other.load_state_dict(callback.merged_state_dict(), strict=True)
    for tensor in callback.merged_state_dict().values():
        tensor.zero_()
    assert same(dict(other.state_dict()), callback.merged_state_dict())
    assert same(dict(run.module.state_dict()), before)


def test_what_is_no_tensor_in_a_state_dict_is_kept(tmp_path):
    class Extra(Toy):
        def get_extra_state(self):
            return {"note": "kept"}

        def set_extra_state(self, state):
            self.note = state["note"]

    callback = MergeCallback(2, 3)
    fit(make(Extra), tmp_path, callback)
    other = make(Extra)
    other.load_state_dict(callback.merged_state_dict(), strict=True)
    assert other.note == "kept"


def test_a_window_of_one_is_the_latest_snapshot(tmp_path):
    callback = MergeCallback(1, 1)
    run = fit(make(Toy), tmp_path, callback)
    assert callback.snapshot_steps == [24]
    assert same(callback.merged_state_dict(), dict(run.module.state_dict()))


def test_bfloat16_parameters_and_float32_storage_of_them(tmp_path):
    callback, tracker = MergeCallback(3, 4, dtype="float32"), Tracker()
    fit(make(Toy), tmp_path, callback, tracker, precision="bf16-true")
    expected = tracker.merged(callback.coefficients())
    for name, tensor in expected.items():
        merged = callback.merged_state_dict()[name]
        assert merged.dtype == torch.bfloat16
        torch.testing.assert_close(merged.double(), tensor, rtol=2**-8, atol=1e-6)


def test_a_compiled_submodule_is_matched_by_its_clean_name(tmp_path):
    module, callback, tracker = make(Toy), MergeCallback(3, 4), Tracker()
    module.inner = torch.compile(module.inner, backend="eager")
    fit(module, tmp_path, callback, tracker)
    state = callback.merged_state_dict()
    assert set(state) == set(module.state_dict())
    expected = tracker.merged(callback.coefficients())["inner._orig_mod.weight"]
    torch.testing.assert_close(state["inner._orig_mod.weight"].double(), expected, rtol=1e-6, atol=1e-7)


def test_merged_weights_swaps_in_and_always_back(tmp_path):
    callback = MergeCallback(2, 3, merges={"sma": "sma", "newest": Window(span_steps=1)})
    run = fit(make(Toy), tmp_path, callback)
    before = {name: tensor.clone() for name, tensor in run.module.state_dict().items()}
    with pytest.raises(ZeroDivisionError), callback.merged_weights(run.module, "sma"):
        assert same(dict(run.module.state_dict()), callback.merged_state_dict("sma"))
        raise ZeroDivisionError
    assert same(dict(run.module.state_dict()), before)


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
def test_testing_the_merge_inside_the_context_uses_it_and_leaves_live_weights(tmp_path):
    class Tested(Toy):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    callback = MergeCallback(2, 3)
    run = fit(make(Tested), tmp_path, callback)
    before = {name: tensor.clone() for name, tensor in run.module.state_dict().items()}
    loader = batches(24, 8, shuffle=False, seed=1)
    with callback.merged_weights(run.module):
        (tested,) = run.trainer.test(run.module, loader, verbose=False)
    assert tested["test_loss"] == run.epoch_metrics[-1]["merged/val_loss"].item()
    assert same(dict(run.module.state_dict()), before)
    (live,) = run.trainer.test(run.module, loader, verbose=False)
    assert live["test_loss"] == run.epoch_metrics[-1]["val_loss"].item()


# What is logged


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
    assert not names.is_higher_better("accuracy", value)


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
            assert ours[f"merged/{name}"] == theirs[f"merged/{name}"]
            assert ours[f"merge_gain/{name}"] == theirs[f"merge_gain/{name}"]
            assert ours[name] != theirs[name] or name == "val_accuracy"


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
    with pytest.raises(ValueError, match=r"limit_batches=0.5 is a share .* no length; give a number"):
        fit(make(Toy), tmp_path, MergeCallback(2, 3, limit_batches=0.5), validation=stream)
    run = fit(make(Toy), tmp_path, MergeCallback(2, 3, limit_batches=2), validation=stream)
    assert run.logged("merged/val_loss")


def test_merges_are_evaluated_at_every_nth_validation(tmp_path):
    run = fit(make(Toy), tmp_path, MergeCallback(2, 3, evaluate_every_n_validations=3))
    assert [step for step, _ in run.logged("val_loss")] == [3, 7, 11, 15, 19, 23]
    assert [step for step, _ in run.logged("merged/val_loss")] == [11, 23]


@pytest.mark.usefixtures("both_lightnings")
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


# What acts on it


@pytest.mark.usefixtures("both_lightnings")
def test_early_stopping_and_checkpoints_monitor_merged_values_of_the_same_validation(tmp_path):
    stopping = lightning(".callbacks").EarlyStopping(
        "merged/val_loss", patience=1, mode="max", check_on_train_epoch_end=False
    )
    checkpoint = lightning(".callbacks").ModelCheckpoint(tmp_path / "best", monitor="merged/val_loss", save_top_k=1)
    run = fit(make(Toy), tmp_path, stopping, MergeCallback(2, 3), checkpoint, enable_checkpointing=True)
    losses = [value for _, value in run.logged("merged/val_loss")]
    assert checkpoint.best_model_score.item() == pytest.approx(min(losses))
    assert run.trainer.global_step < 24
    best = int(torch.tensor(losses).argmin())
    assert torch.load(checkpoint.best_model_path, weights_only=True)["global_step"] == 4 * (best + 1)


# Steps


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

    with pytest.warns(UserWarning, match=r"not constant in \d+ steps .*MergeCallback\(start=STEP\)") as said:
        run = fit(make(Cosine), tmp_path, callback := MergeCallback(2, 3))
    assert len([warning for warning in said if "MergeCallback" in str(warning.message)]) == 1
    assert callback.snapshot_steps == []
    assert not run.logged("merged/val_loss")
    fit(make(Cosine), tmp_path, callback := MergeCallback(2, 3, start=10))
    assert callback.snapshot_steps == [20, 22, 24]


# Ends and beginnings


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
    assert (
        "up to 3 snapshots, every 2 steps while the learning rate is constant, in 0.0 MiB on cpu; merges: sma, late"
        in line
    )


def test_before_anything_was_captured_asking_for_the_merge_says_so(tmp_path):
    callback = MergeCallback(100, 3)
    for ask in (callback.merged_state_dict, callback.coefficients, callback.implied_decay):
        with pytest.raises(RuntimeError, match=r"nothing was captured yet.*once the learning rate is constant"):
            ask()
    run = fit(make(Toy), tmp_path, callback)
    assert callback.snapshot_steps == []
    with pytest.raises(RuntimeError, match="nothing was captured yet"), callback.merged_weights(run.module):
        pass


def test_an_unknown_merge_is_refused_with_the_known_ones(tmp_path):
    callback = MergeCallback(2, 3, merges={"sma": "sma", "late": "wma"})
    fit(make(Toy), tmp_path, callback)
    with pytest.raises(ValueError, match="no merge called 'latest'; there are: sma, late"):
        callback.coefficients("latest")


def test_coefficients_and_implied_decay_belong_to_the_snapshot_steps(tmp_path):
    callback = MergeCallback(2, 4, merges={"sma": "sma", "sqrt": "1-sqrt"})
    fit(make(Toy), tmp_path, callback)
    assert callback.coefficients() == {18: 0.25, 20: 0.25, 22: 0.25, 24: 0.25}
    assert callback.implied_decay() == [(18, 1.0), (20, 0.75), (22, 0.5), (24, 0.25)]
    steps, multipliers = zip(*callback.implied_decay("sqrt"), strict=True)
    assert steps == (18, 20, 22, 24)
    assert multipliers == pytest.approx([1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])


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


# Things that go wrong


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
    with pytest.raises(arrives):
        fit(module, tmp_path, callback, Remember(rng))
    assert same(dict(module.state_dict()), module.trained)
    assert same(torch.get_rng_state(), rng[-1])
    assert "on_validation_epoch_end" not in vars(module)
    assert callback.snapshot_steps == [2, 4]


class Remember(Callback):
    def __init__(self, rng):
        self.rng = rng

    def on_train_batch_end(self, *args):
        self.rng.append(torch.get_rng_state())


def test_a_function_that_gives_no_weights_fails_at_its_first_use_and_names_itself(tmp_path):
    def hopeless(steps):
        return [math.nan] * len(steps)

    with pytest.raises(ValueError, match="merge rule hopeless gave a weight that is not finite"):
        fit(make(Toy), tmp_path, MergeCallback(2, 3, merges=hopeless))


def test_a_model_without_trainable_parameters_is_refused_before_training(tmp_path):
    class Frozen(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)

        def training_step(self, batch, batch_idx):
            raise AssertionError("training began")

    with pytest.raises(ValueError, match="Frozen has no trainable floating-point parameters"):
        fit(make(Frozen).requires_grad_(False), tmp_path, MergeCallback())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every_n_train_steps": 0}, ValueError, "every_n_train_steps must be >= 1, got 0"),
        ({"every_n_train_steps": 2.5}, TypeError, "every_n_train_steps must be an int, got 2.5"),
        ({"num_snapshots": 0}, ValueError, "num_snapshots must be >= 1, got 0"),
        ({"num_snapshots": True}, TypeError, "num_snapshots must be an int, got True"),
        ({"evaluate_every_n_validations": 0}, ValueError, "evaluate_every_n_validations must be >= 1, got 0"),
        ({"limit_batches": -1}, ValueError, r"limit_batches must be .* >= 1 or a share in \(0, 1\], got -1"),
        ({"limit_batches": 0}, ValueError, "got 0"),
        ({"limit_batches": 1.5}, ValueError, "got 1.5"),
        ({"limit_batches": "all"}, TypeError, "limit_batches must be an int, a float or None, got 'all'"),
        ({"merges": "smaa"}, ValueError, "unknown merge rule 'smaa'; did you mean 'sma'"),
        ({"merges": {}}, ValueError, "merges must name at least one merge, got an empty mapping"),
        ({"merges": {"a/b": "sma"}}, ValueError, "without a slash, got 'a/b'"),
        ({"merges": {"late": "lineal"}}, ValueError, "did you mean 'linear'"),
        ({"merges": 3}, TypeError, "a merge rule is a name or a function"),
        (
            {"merges": ["sma", "ema"]},
            TypeError,
            "several merges are a mapping of names to them, .* got \\['sma', 'ema'\\]",
        ),
        ({"merges": Ema}, TypeError, "merges takes objects, got the class Ema; make one"),
        ({"start": "Stable"}, TypeError, "start must be 'stable' or an int, .*, got 'Stable'"),
        (
            {"higher_is_better": True},
            TypeError,
            "higher_is_better must be a pattern of names or a list of them, got True",
        ),
        ({"higher_is_better": [5]}, TypeError, "higher_is_better must be .*, got \\[5\\]"),
        ({"start": -1}, ValueError, "start must be >= 0, got -1"),
        ({"dtype": "int8"}, ValueError, "dtype must be .* or its name, such as 'bfloat16', got 'int8'"),
        ({"dtype": torch.int64}, ValueError, "got torch.int64"),
        ({"storage": __file__ + "/snapshots"}, ValueError, "cannot be written: .* is not a writable directory"),
        ({"storage": "cuda:0"}, ValueError, "storage must be 'device' .* or a directory, got 'cuda:0'; .* './cuda:0'"),
        ({"storage": ""}, ValueError, "storage must be 'device'"),
        ({"storage": SnapshotDirectory("")}, ValueError, "storage must have a path"),
        ({"storage": "/proc/snapshots"}, ValueError, "cannot be written"),
        ({"storage": 3}, TypeError, "storage must be 'device', 'cpu', a directory or a SnapshotMemory, got 3"),
        ({"max_overhead": 0.0}, ValueError, r"max_overhead must be a share in \(0, 1\), got 0.0"),
        ({"max_overhead": "2%"}, TypeError, "max_overhead must be a float or None, got '2%'"),
        ({"name": ""}, ValueError, "name must be a non-empty string, got ''"),
    ],
)
def test_bad_arguments_are_refused_by_name_and_value(arguments, error, message):
    with pytest.raises(error, match=message):
        MergeCallback(**arguments)


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
    assert any("its patience has to cover those" in str(warning.message) for warning in told) == is_told
