"""The sign of a gain: by pattern, by the logged object, by what monitors the metric, or by its name."""

import pytest
import torch
from torch.nn import functional as F

from merge_callback import MergeCallback
from merge_callback.live.evaluate import LoggedValue
from merge_callback.validation.directions import monitored, more_is_better
from merge_callback.validation.logged import Names
from tests.helpers.toys import Toy, fit, lightning, make


@pytest.mark.parametrize(
    "name",
    [
        "val_acc",
        "acc",
        "val/top5_accuracy",
        "f1",
        "macro-F1",
        "AUROC",
        "bleu4",
        "rougeL",
        "mIoU",
        "box_mAP",
        "r2",
        "ndcg@10",
    ],
)
def test_more_of_these_is_better(name):
    assert more_is_better(name) is True


@pytest.mark.parametrize(
    "name",
    ["val_loss", "loss", "valLoss", "ppl", "val/perplexity", "MSE", "rmse", "wer", "accuracy_loss", "top1_error"],
)
def test_less_of_these_is_better(name):
    assert more_is_better(name) is False


@pytest.mark.parametrize("name", ["diversity", "gain", "accelerator", "mapping", "scorer", "lr"])
def test_of_these_the_name_tells_nothing(name):
    assert more_is_better(name) is None


def test_the_first_that_tells_counts():
    names = Names("merge", "sma", ("odd*",), {"val_acc": False, "diversity": True})

    def more(name, told=None):
        return names.direction(name, LoggedValue(torch.zeros(()), higher_is_better=told))

    assert more("odd_loss", False) is True
    assert more("val_acc", True) is True
    assert more("val_acc") is False
    assert more("diversity") is True
    assert more("accuracy") is True
    assert more("other") is None


class Monitoring:
    def __init__(self, monitor, mode):
        self.monitor, self.mode = monitor, mode


def test_what_lightning_adds_to_a_name_tells_nothing_else():
    names = Names("merge", "sma", monitored=monitored([Monitoring("merged/quality/dataloader_idx_0", "max")]))
    value = LoggedValue(torch.tensor(1.0))
    for name in ("quality", "quality_epoch", "quality/dataloader_idx_0", "quality/dataloader_idx_1"):
        assert names.direction(name, value) is True
        assert f"more of {name} is better" in Names("merge", "sma").unknown({name: value})


def test_what_monitors_a_merged_value_tells_of_the_live_one():
    callbacks = [
        Monitoring("merged_late/diversity", "max"),
        Monitoring("val_x", "min"),
        Monitoring(None, "min"),
        object(),
    ]
    assert monitored(callbacks) == {"diversity": True, "val_x": False}


class Plain(Toy):
    """Logs numbers, of which nothing but their names tells which are better."""

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        values = {
            "val_loss": F.cross_entropy(logits, batch[1]),
            "val_acc": (logits.argmax(1) == batch[1]).float().mean(),
            "diversity": logits.std(),
            "step_size": torch.tensor(0.5),
        }
        self.log_dict(values)


@pytest.mark.usefixtures("both_lightnings")
def test_gains_of_plain_numbers_have_their_sign_and_what_is_unknown_is_said_once(tmp_path, caplog):
    run = fit(make(Plain), tmp_path, MergeCallback(2, 3))
    for metrics in run.epoch_metrics:
        for name, sign in {"val_loss": 1, "val_acc": -1, "diversity": 1}.items():
            assert metrics[f"merge_gain/{name}"] == sign * (metrics[name] - metrics[f"merged/{name}"])
    said = [record.message for record in caplog.records if "nothing tells whether" in record.message]
    assert len(said) == 1
    assert "more of diversity is better; taken for losses unless higher_is_better= names them" in said[0]


@pytest.mark.usefixtures("both_lightnings")
def test_a_callback_that_monitors_a_metric_tells_its_direction(tmp_path, caplog):
    stopping = lightning(".callbacks").EarlyStopping("merged/diversity", mode="max", patience=100, strict=False)
    run = fit(make(Plain), tmp_path, MergeCallback(2, 3), stopping)
    metrics = run.epoch_metrics[-1]
    assert metrics["merge_gain/diversity"] == metrics["merged/diversity"] - metrics["diversity"]
    assert "nothing tells whether" not in caplog.text
