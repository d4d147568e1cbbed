"""Every logger has the merged values at the steps of the live ones, under names it takes as they are."""

import json
import pickle
import struct
import sys

import pytest
import torch

from merge_callback import MergeCallback
from merge_callback.live.evaluate import LoggedValue
from merge_callback.validation.logged import LoggedName
from merge_callback.validation.wandb_charts import WandbChart
from tests.helpers.toys import BusyToy, Toy, assert_same_training, fit, lightning, make

# Names that not every logger would take as they are.
MERGES = {"sma": "sma", "1-sqrt": "1-sqrt", "wma (all)": "wma", "v0.2": "wma"}
NAMES = [
    "merged/val_loss",
    "merge_gain/val_loss",
    "merged_1-sqrt/val_loss",
    "merged_wma__all_/val_loss",
    "merge/spread",
]
STEPS = [3, 7, 11, 15, 19, 23]


def merging_fit(folder, logger):
    callback = MergeCallback(2, 5, merges=MERGES, calibration="prior", higher_is_better="*acc*")
    return fit(make(Toy), folder, callback, logger=logger)


def wandb_records(folder):
    """What an offline run has written, record by record: a log of blocks of 32 KiB, each with a header of its own."""
    from wandb.proto.wandb_internal_pb2 import Record  # noqa: PLC0415 (imported where its environment is set)

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        # Of parts, only the last one ends a record.
        if kind in (1, 4):
            (record := Record()).ParseFromString(parts)
            parts = b""
            yield record


@pytest.mark.slow
def test_weights_and_biases_has_them_and_knows_their_best(tmp_path):
    import wandb  # noqa: PLC0415

    logger = lightning(".loggers").WandbLogger(save_dir=tmp_path, offline=True, project="merges")
    run = merging_fit(tmp_path, logger)
    wandb.finish()
    wandb.teardown()
    records = list(wandb_records(tmp_path))
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    for name in ("val_loss", *NAMES):
        assert [row["trainer/global_step"] for row in rows if name in row] == STEPS, name
    *_, final = [row["merged/val_loss"] for row in rows if "merged/val_loss" in row]
    assert final == run.trainer.callback_metrics["merged/val_loss"].item()
    # One chart of all that is known of the first loss, at the end with every validation.
    path = "chart/val_loss_table.path"
    *_, last = [row[path] for row in rows if path in row]
    table = json.loads(next((tmp_path / "wandb").glob(f"offline-run-*/files/{last}")).read_text())
    assert table["columns"] == ["step", "lineKey", "lineVal"]
    drawn = {key: [(step, value) for step, line, value in table["data"] if line == key] for _, key, _ in table["data"]}
    assert [step for step, _ in drawn["live"]] == [step for step, _ in drawn["merged"]] == STEPS
    assert drawn["merged"][-1][1] == final
    assert "annealed (predicted)" in drawn
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    best = {metric.name: (metric.summary.min, metric.summary.max, metric.summary.last) for metric in metrics}
    assert best["merged/val_loss"] == best["merged_wma__all_/val_loss"] == (True, False, True)
    # A dot alone would be taken for the way into an entry.
    assert best[r"merged_v0\.2/val_loss"] == (True, False, True)
    assert best["merged/val_accuracy"] == best["merge_gain/val_loss"] == (False, True, True)
    assert {metric.step_metric for metric in metrics if metric.name in best and "merge" in metric.name} == {
        "trainer/global_step"
    }


def test_the_chart_of_a_resumed_run_has_the_points_of_before(monkeypatch):
    def value(number):
        return LoggedValue(torch.tensor(number))

    whole, stopped, resumed = WandbChart(""), WandbChart(""), WandbChart("")
    for step in (4, 8, 12):
        if step == 12:
            resumed.load_state_dict(pickle.loads(pickle.dumps(stopped.state_dict())))
        for chart in [whole, stopped if step < 12 else resumed]:
            chart.add({"val_loss": value(2.0 / step)}, {LoggedName("merged", "", "val_loss"): value(1.0 / step)}, step)
    assert resumed.state_dict() == whole.state_dict()
    assert len(whole.state_dict()["points"]["live"]) == 3
    # Where a run is resumed without that logger, its package need not be there.
    monkeypatch.setitem(sys.modules, "wandb", None)
    resumed.draw([])


@pytest.mark.slow
def test_training_with_the_chart_in_weights_and_biases_is_bit_identical_to_training_without_the_callback(tmp_path):
    import wandb  # noqa: PLC0415

    def run(name, *callbacks):
        loggers = lightning(".loggers")
        chart = loggers.WandbLogger(save_dir=tmp_path / name, offline=True, project="merges")
        done = fit(make(BusyToy), tmp_path / name, *callbacks, logger=[loggers.CSVLogger(tmp_path / name), chart])
        wandb.finish()
        return done

    (tmp_path / "bare").mkdir()
    (tmp_path / "watched").mkdir()
    bare, watched = run("bare"), run("watched", MergeCallback(2, 5, calibration="prior"))
    wandb.teardown()
    assert watched.logged("merged/val_loss")
    assert_same_training(bare, watched)


@pytest.mark.slow
def test_mlflow_has_them_at_the_steps_of_the_live_ones(tmp_path):
    artifacts = (tmp_path / "artifacts").as_uri()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    logger = lightning(".loggers").MLFlowLogger("merges", tracking_uri=uri, artifact_location=artifacts)
    run = merging_fit(tmp_path, logger)
    for name in ("val_loss", *NAMES):
        history = logger.experiment.get_metric_history(logger.run_id, name)
        assert [metric.step for metric in history] == STEPS, name
    history = logger.experiment.get_metric_history(logger.run_id, "merged/val_loss")
    assert history[-1].value == run.trainer.callback_metrics["merged/val_loss"].item()


@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
@pytest.mark.sample(1)
def test_files_have_them_at_the_steps_of_the_live_ones(tmp_path, kind):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    loggers = lightning(".loggers")
    run = merging_fit(
        tmp_path, [loggers.CSVLogger(tmp_path), getattr(loggers, kind)(tmp_path, name="own", version="v")]
    )
    if kind == "CSVLogger":
        steps = {name: [step for step, _ in run.logged(name)] for name in ("val_loss", *NAMES)}
    else:
        events = EventAccumulator(str(tmp_path / "own" / "v"))
        events.Reload()
        steps = {name: [event.step for event in events.Scalars(name)] for name in ("val_loss", *NAMES)}
    assert steps == dict.fromkeys(("val_loss", *NAMES), STEPS)


def test_a_logger_of_the_user_s_own_gets_them_with_the_live_ones_in_one_call(tmp_path):
    class Own(lightning(".loggers.logger").Logger):
        name = version = "own"

        def __init__(self):
            super().__init__()
            self.calls = []

        def log_hyperparams(self, *args, **kwargs):
            pass

        def log_metrics(self, metrics, step=None):
            self.calls.append((step, dict(metrics)))

    own = Own()
    merging_fit(tmp_path, [lightning(".loggers").CSVLogger(tmp_path), own])
    together = [(step, metrics) for step, metrics in own.calls if "val_loss" in metrics]
    assert [step for step, _ in together] == STEPS
    assert all({*NAMES} <= metrics.keys() for _, metrics in together)
