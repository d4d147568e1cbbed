"""What loggers and the terminal show: the same steps as the live metric, in every logger; read back from its files."""

import copy
import re
import sys

import numpy as np
import pytest
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from merge_callback import Ema, LiveAndMergedBar, MergeCallback
from merge_callback.validation.dashboards import scalar_layout
from merge_callback.validation.figures import pixels, plot_merge
from tests.helpers.toys import BusyToy, ResumableBatches, Toy, assert_same_training, batches, fit, lightning, make
from tests.prediction.test_forecasts import SHORT, Valley

SEVERAL = {"sma": "sma", "late (x)": "wma", "ema": Ema(half_life=0.1)}
LAYOUT_TAG = "custom_scalars__config__"


def with_tensorboard(folder):
    """Loggers of a run: the CSV file that runs are compared by, and TensorBoard's files in a folder."""
    loggers = lightning(".loggers")
    return [loggers.CSVLogger(folder / "csv"), loggers.TensorBoardLogger(folder, name="", version="tb")]


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder, tag):
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def layout(folder):
    """Category -> titles of its charts."""
    (event,) = events(folder).Tensors(LAYOUT_TAG)
    content = Layout.FromString(event.tensor_proto.string_val[0])
    return {category.title: {chart.title: chart for chart in category.chart} for category in content.category}


@pytest.mark.usefixtures("both_lightnings")
@pytest.mark.slow
def test_merged_and_annealed_values_are_runs_of_their_own_under_the_live_metric_s_name(tmp_path):
    callback = MergeCallback(1, 10, merges=SEVERAL, calibration="prior", higher_is_better="*acc*")
    run = fit(make(Toy), tmp_path, callback, max_steps=40, logger=with_tensorboard(tmp_path), val_check_interval=2)
    live = scalars(tmp_path / "tb", "val_loss")
    assert len(live) == 20
    for name, tag in (
        ("merged", "merged/val_loss"),
        ("annealed", "annealed/val_loss"),
        ("merged_ema", "merged_ema/val_loss"),
    ):
        again = scalars(tmp_path / "tb" / name, "val_loss")
        assert again == scalars(tmp_path / "tb", tag)
        assert {step for step, _ in again} <= {step for step, _ in live}
        assert len(again) >= 10
    assert {run.name for run in (tmp_path / "tb").iterdir() if run.is_dir()} == {
        "merged",
        "merged_late__x_",
        "merged_ema",
        "annealed",
    }
    # A prediction is of a loss; the accuracy has none.
    assert events(tmp_path / "tb" / "annealed").Tags()["scalars"] == ["val_loss"]
    assert run.trainer.callback_metrics["merged_late__x_/val_loss"].isfinite()


@pytest.mark.slow
def test_the_layout_is_written_once_and_predictions_bring_their_own_part(tmp_path):
    class Users(Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.loggers[1].experiment.add_custom_scalars({"Mine": {"loss": ["Multiline", ["train_loss"]]}})

    callback = MergeCallback(1, 10, merges=SEVERAL, calibration="prior")
    fit(make(Toy), tmp_path, Users(), callback, max_steps=40, logger=with_tensorboard(tmp_path), val_check_interval=2)
    assert list(layout(tmp_path / "tb")) == ["Mine"]
    merged = layout(tmp_path / "tb" / "merged")
    assert list(merged) == ["Live, merged, annealed", "Gain of the merge", "Merge"]
    assert list(merged["Live, merged, annealed"]) == ["val_loss", "val_accuracy"]
    assert list(merged["Merge"]) == ["num_snapshots", "span_steps", "spread", "seconds", "num_skipped"]
    (gains,) = merged["Gain of the merge"]["val_loss"].multiline.tag
    (predicted,) = layout(tmp_path / "tb" / "annealed").values()
    (series,) = predicted["val_loss"].margin.series
    ends = (series.value, series.lower, series.upper)
    assert ends == ("annealed/val_loss", "annealed/val_loss/low", "annealed/val_loss/high")
    # Each names tags that are there.
    tags = events(tmp_path / "tb").Tags()["scalars"]
    assert set(ends) <= set(tags)
    labels = ("", "_late__x_", "_ema")
    assert [tag for tag in tags if re.match(gains, tag)] == [f"merge_gain{label}/val_loss" for label in labels]


def test_patterns_of_names_with_dots_match_nothing_else():
    layout = scalar_layout(["a.b/c"])
    assert layout["Live, merged, annealed"] == {"a.b/c": ["Multiline", [r"^a\.b/c$"]]}
    ((_, (pattern,)),) = layout["Gain of the merge"].values()
    assert re.match(pattern, "merge_gain_late/a.b/c")
    assert not re.match(pattern, "merge_gain/axb/c")
    assert not re.match(pattern, "merge_gain/other/a.b/c")


@pytest.mark.slow
def test_a_merge_that_is_there_later_is_in_the_layout_too(tmp_path):
    callback = MergeCallback(20, 2, merges={"sma": "sma", "ema": Ema(half_life=0.1)})
    fit(make(Toy), tmp_path, callback, max_steps=40, logger=with_tensorboard(tmp_path))
    (gains,) = layout(tmp_path / "tb" / "merged_ema")["Gain of the merge"]["val_loss"].multiline.tag
    assert re.match(gains, "merge_gain/val_loss")


@pytest.mark.slow
def test_metrics_that_end_like_a_bound_are_shown_and_what_the_user_keeps_from_loggers_is_not(tmp_path):
    class Odd(Toy):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("pitch/high", 1.0 + batch_idx)
            self.log("secret", 1.0, logger=False)

    fit(make(Odd), tmp_path, MergeCallback(2, 5, calibration="prior"), logger=with_tensorboard(tmp_path))
    shown = events(tmp_path / "tb" / "merged").Tags()["scalars"]
    assert "pitch/high" in shown
    assert "secret" not in shown
    assert not [tag for tag in events(tmp_path / "tb").Tags()["scalars"] if "secret" in tag]


@pytest.mark.slow
def test_figures_of_the_merge_become_rarer_as_the_run_goes_on(tmp_path):
    callback = MergeCallback(2, 5)
    fit(make(Toy), tmp_path, callback, max_steps=40, logger=with_tensorboard(tmp_path), val_check_interval=4)
    drawn = events(tmp_path / "tb").Images("merge/coefficients")
    assert [event.step for event in drawn] == [3, 7, 15, 31]


def test_the_figure_shows_coefficients_and_the_decay_they_stand_for():
    figure = plot_merge({100: 0.5, 200: 0.25, 400: 0.25})
    upper, lower = figure.axes
    assert [(bar.get_center()[0], bar.get_height()) for bar in upper.patches] == [(100, 0.5), (200, 0.25), (400, 0.25)]
    (line,) = lower.lines
    assert line.get_xydata().tolist() == [[100, 1.0], [200, 0.5], [400, 0.25]]
    drawn = pixels(figure)
    assert drawn.shape == (400, 600, 3)
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 3


@pytest.mark.slow
def test_without_matplotlib_there_is_no_figure_and_it_is_said_once(tmp_path, monkeypatch, caplog):
    for name in list(sys.modules):
        if name.partition(".")[0] == "matplotlib" or name == "merge_callback.validation.figures":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level("INFO"):
        fit(make(Toy), tmp_path, MergeCallback(2, 5), logger=with_tensorboard(tmp_path))
    assert caplog.text.count("no figure of the merge in TensorBoard, since matplotlib") == 1
    assert events(tmp_path / "tb").Tags()["images"] == []
    assert scalars(tmp_path / "tb" / "merged", "val_loss")


@pytest.mark.slow
def test_training_with_dashboards_is_bit_identical_to_training_without_the_callback(tmp_path):
    callback = MergeCallback(2, 5, merges=SEVERAL, calibration="prior")
    bare = fit(make(BusyToy), tmp_path / "bare", logger=with_tensorboard(tmp_path / "bare"))
    watched = fit(make(BusyToy), tmp_path / "watched", callback, logger=with_tensorboard(tmp_path / "watched"))
    assert_same_training(bare, watched)


@pytest.mark.slow
def test_a_callback_that_has_shown_something_can_be_copied_and_fitted_again(tmp_path):
    callback = MergeCallback(2, 5)
    fit(make(Toy), tmp_path, callback, logger=with_tensorboard(tmp_path))
    other = copy.deepcopy(callback)
    fit(make(Toy), tmp_path / "again", other, logger=with_tensorboard(tmp_path / "again"))
    for folder in (tmp_path, tmp_path / "again"):
        assert len(scalars(folder / "tb" / "merged", "val_loss")) == 6
        assert list(layout(folder / "tb" / "merged")) == ["Live, merged, annealed", "Gain of the merge", "Merge"]


@pytest.mark.slow
def test_two_callbacks_have_charts_of_their_own(tmp_path):
    callbacks = [MergeCallback(2, 5), MergeCallback(4, 2, name="short")]
    fit(make(Toy), tmp_path, *callbacks, logger=with_tensorboard(tmp_path))
    assert len(scalars(tmp_path / "tb" / "merged_short", "val_loss")) == 6
    assert "Gain of the merge_short" in layout(tmp_path / "tb" / "merged_short")
    assert "merge_short/coefficients" in events(tmp_path / "tb").Tags()["images"]


def test_a_run_without_merges_after_one_with_them_shows_no_table_of_the_other(tmp_path, caplog):
    callback = MergeCallback(2, 5)
    with caplog.at_level("INFO"):
        fit(make(Toy), tmp_path, callback)
        assert caplog.text.count("merges took") == 1
        fit(make(Toy), tmp_path, callback, limit_val_batches=0)
    assert caplog.text.count("merges took") == 1


def test_an_interrupted_run_shows_what_there_is(tmp_path, caplog):
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 10:
                raise ZeroDivisionError

    with caplog.at_level("INFO"), pytest.raises(ZeroDivisionError):
        fit(make(Toy), tmp_path, MergeCallback(2, 5), Interrupt())
    assert "at step 8" in caplog.text


def test_two_values_of_one_name_are_refused(tmp_path):
    callbacks = [MergeCallback(2, 5, merges={"sma": "sma", "late": "wma"}), MergeCallback(2, 5, name="late")]
    both = r"MergeCallback\(name='merge'\) and MergeCallback\(name='late'\) would both log merged_late/"
    module = make(Toy)
    with pytest.raises(ValueError, match=both):
        fit(module, tmp_path, *callbacks)
    # Before anything was trained.
    assert module.trainer.global_step == 0


@pytest.mark.parametrize("name", ["merge", "pma"])
@pytest.mark.sample(1)
def test_the_line_of_the_progress_bar_fits_80_columns(tmp_path, name):
    """Of the bar that shows live and merged values and nothing else; with Lightning's own there is more beside them."""
    bar = LiveAndMergedBar("val_loss")
    logger = lightning(".loggers").CSVLogger(tmp_path)
    callbacks = [MergeCallback(2, 5, name=name), bar]
    run = fit(make(Toy), tmp_path, *callbacks, enable_progress_bar=True, max_steps=16, logger=logger)
    shown = bar.get_metrics(run.trainer, run.module)
    assert list(shown) == ["live", "merged"]
    fields = ", ".join(f"{name}={float(value):.3f}" for name, value in shown.items())
    assert len(f"Epoch 9: 100%|█| 9999/9999 [9:59:59<00:00, 99.99it/s, {fields}]") <= 80


def test_the_progress_bar_of_a_resumed_run_shows_where_it_stands_and_how_fast_it_is(tmp_path):
    class Saving(lightning().Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "8.ckpt")

    class Watched(LiveAndMergedBar):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            bar = self.train_progress_bar
            seen.setdefault(trainer.global_step, (bar.n, bar.initial, bar.total))

    for options in ({}, {"ckpt_path": tmp_path / "8.ckpt"}):
        seen = {}
        callbacks = [Saving(), Watched("val_loss")]
        options |= {"train": ResumableBatches(), "max_steps": 16, "enable_progress_bar": True}
        fit(make(Toy), tmp_path, *callbacks, **options)
        assert seen[15] == (15, min(seen), 16)
        assert seen[8] == (8, min(seen), 16)


@pytest.mark.parametrize(
    ("options", "totals"),
    [
        ({"max_steps": 13}, [5, 5, 3]),
        ({"max_steps": 4, "accumulate_grad_batches": 2}, [5, 2]),
        ({"max_epochs": 2, "max_steps": -1}, [5, 5]),
    ],
)
def test_the_progress_bar_s_last_epoch_is_as_long_as_it_will_be(tmp_path, options, totals):
    class Watched(LiveAndMergedBar):
        def on_train_epoch_start(self, *arguments):
            super().on_train_epoch_start(*arguments)
            seen.append(self.train_progress_bar.total)

    seen = []
    fit(make(Toy), tmp_path, Watched("val_loss"), train=batches(40), enable_progress_bar=True, **options)
    assert seen == totals


@pytest.mark.slow
def test_forecasts_have_a_line_a_chart_and_a_field(tmp_path):
    bar = LiveAndMergedBar("val_loss", forecast=True)
    callbacks = [MergeCallback(10, 10, forecast=0.1, higher_is_better=["accuracy"]), bar]
    options = {"max_steps": 400, "train": ResumableBatches(20), "logger": with_tensorboard(tmp_path), **SHORT}
    run = fit(make(Valley), tmp_path, *callbacks, enable_progress_bar=True, **options)
    assert scalars(tmp_path / "tb" / "forecast", "val_loss") == scalars(tmp_path / "tb", "forecast/val_loss")
    ((_, charts),) = layout(tmp_path / "tb" / "forecast").items()
    (series,) = charts["val_loss"].margin.series
    assert series.lower == "forecast/val_loss/low"
    assert set(charts) == {"val_loss"}
    shown = bar.get_metrics(run.trainer, run.module)
    assert shown["forecast"] == float(run.epoch_metrics[-1]["forecast/val_loss"])


def test_nothing_is_shown_by_a_run_that_captured_nothing(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(make(Toy), tmp_path, MergeCallback(2, 5, start=1000), logger=with_tensorboard(tmp_path))
    assert "merges took" not in caplog.text
    assert not (tmp_path / "tb" / "merged").exists()


def test_merges_whose_names_are_the_same_in_logs_are_refused():
    with pytest.raises(ValueError, match=r"merges must have different names in logs.*'a b'.*both 'a_b'"):
        MergeCallback(merges={"sma": "sma", "a b": "wma", "a(b": "ema"})
