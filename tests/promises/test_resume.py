"""Interrupted equals uninterrupted, bit for bit."""

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from merge_callback import Ema, MergeCallback, PowerEma, SnapshotMemory, Window
from tests.helpers.toys import ResumableBatches, Toy, assert_same_training, fit, lightning, make, same
from tests.prediction.test_predictor import Decaying

# Lightning's advice; these runs leave callbacks out on purpose.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]
# What a validation takes in seconds is nobody's to repeat.
TIMES = {"merge/seconds"}


def merging(**arguments):
    merges = {"late": Window(span=0.4), "sma": "sma", "ema": Ema(half_life=0.2), "edm": PowerEma(0.1)}
    return MergeCallback(num_snapshots=4, merges=merges, evaluate_every_n_validations=2, **arguments)


def seeded(**arguments):
    module = make(Toy, **arguments)
    # Lightning's checkpoints hold no random states.
    module.dropout.p = 0.0
    return module


@pytest.mark.usefixtures("both_lightnings")
@pytest.mark.parametrize(
    ("every", "storage", "snapshot"),
    [
        (None, "device", "point"),
        pytest.param(3, "device", "point", marks=pytest.mark.slow),
        pytest.param(None, "cpu", "point", marks=pytest.mark.slow),
        pytest.param(3, "files", "point", marks=pytest.mark.slow),
        (4, "device", "mean"),
        pytest.param(None, "device", "mean", marks=pytest.mark.slow),
        pytest.param(5, "cpu", "mean", marks=pytest.mark.slow),
        pytest.param(4, "files", "mean", marks=pytest.mark.slow),
    ],
)
@pytest.mark.sample(1)
def test_a_run_resumed_from_any_of_its_checkpoints_equals_the_one_that_went_on(tmp_path, every, storage, snapshot):
    def place(name):
        return tmp_path / f"snapshots-{name}" if storage == "files" else storage

    whole = merging(every_n_train_steps=every, storage=place("whole"), snapshot=snapshot)
    checkpoints = lightning(".callbacks").ModelCheckpoint(
        tmp_path / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}", auto_insert_metric_name=False
    )
    validated = lightning(".callbacks").ModelCheckpoint(
        tmp_path / "checkpoints", save_top_k=-1, filename="{step}-validated"
    )
    uninterrupted = fit(
        seeded(warmup_steps=3),
        tmp_path / "whole",
        whole,
        checkpoints,
        validated,
        train=ResumableBatches(),
        enable_checkpointing=True,
    )
    for name, stop in [*((str(stop), stop) for stop in (1, 3, 6, 7, 12, 13)), ("step=12-validated", 12)]:
        second = merging(every_n_train_steps=every, storage=place(name), snapshot=snapshot)
        path = str(tmp_path / "checkpoints" / f"{name}.ckpt")
        resumed = fit(
            seeded(warmup_steps=3), tmp_path / f"from{name}", second, train=ResumableBatches(), ckpt_path=path
        )
        assert same(dict(resumed.module.state_dict()), dict(uninterrupted.module.state_dict()))
        assert second.snapshot_steps == whole.snapshot_steps
        for merge in ("late", "sma"):
            assert second.coefficients(merge) == whole.coefficients(merge)
        for merge in ("late", "sma", "ema", "edm"):
            assert same(second.merged_state_dict(merge), whole.merged_state_dict(merge))
        # Lightning passes over a validation that was due at the very step of the checkpoint.
        later = {row["step"]: row for row in resumed.rows if row.get("val_loss")}
        rows = {row["step"]: row for row in uninterrupted.rows if row.get("val_loss")}
        assert set(later) == {step for step in rows if int(step) + 1 > stop}
        for step, row in later.items():
            assert {k: v for k, v in row.items() if v and k not in TIMES} == {
                k: v for k, v in rows[step].items() if v and k not in TIMES
            }, (name, step)


def test_a_checkpoint_loads_without_the_callback_and_gives_live_weights(tmp_path):
    stopped = fit(seeded(), tmp_path / "with", merging(), train=ResumableBatches(), max_steps=12)
    stopped.trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same(dict(content["state_dict"]), dict(stopped.module.state_dict()))
    path = str(tmp_path / "last.ckpt")
    without = fit(seeded(), tmp_path / "without", train=ResumableBatches(), ckpt_path=path, max_steps=20)
    with_it = fit(seeded(), tmp_path / "again", merging(), train=ResumableBatches(), ckpt_path=path, max_steps=20)
    assert_same_training(without, with_it)


# Checkpoints of other settings


def checkpoint_of(tmp_path, callback, toy_class=Toy, max_steps=12):
    module = make(toy_class)
    stopped = fit(module, tmp_path / "stopped", *([callback] if callback else []), max_steps=max_steps)
    stopped.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    return stopped, str(tmp_path / "stopped.ckpt")


def resumed_with(tmp_path, path, callback, toy_class=Toy, max_steps=13):
    return fit(
        make(toy_class), tmp_path / "resumed", callback, train=ResumableBatches(), ckpt_path=path, max_steps=max_steps
    )


def merge_warnings(warned):
    return [str(warning.message) for warning in warned if "MergeCallback(" in str(warning.message)]


@pytest.mark.parametrize(
    ("arguments", "steps", "said"),
    [
        ({"num_snapshots": 2}, [10, 12], "the oldest 2 of 4 snapshots were dropped"),
        ({"num_snapshots": 9}, [6, 8, 10, 12], None),
        ({"every_n_train_steps": 1}, [8, 10, 12, 13], "the interval is now 1 instead of 2"),
        ({"every_n_train_steps": 7}, [6, 8, 10, 12], "the interval is now 7 instead of 2"),
        ({"every_n_train_steps": None}, [8, 10, 12, 13], "the interval is now one that doubles instead of 2"),
        ({"merges": "wma"}, [6, 8, 10, 12], None),
        ({"dtype": "bfloat16"}, [6, 8, 10, 12], "snapshots in torch.float32 are now in torch.bfloat16"),
        ({"storage": SnapshotMemory(in_checkpoints=False)}, [6, 8, 10, 12], None),
    ],
)
@pytest.mark.sample(4)
def test_a_checkpoint_of_other_settings_resumes_with_what_fits_and_says_what_changed(
    tmp_path, recwarn, arguments, steps, said
):
    settings = {"every_n_train_steps": 2, "num_snapshots": 4, "merges": "sma"}
    before = MergeCallback(**settings)
    _, path = checkpoint_of(tmp_path, before)
    callback = MergeCallback(**(settings | arguments))
    recwarn.clear()
    warnings.simplefilter("always")
    resumed_with(tmp_path, path, callback)
    assert callback.snapshot_steps == steps
    assert merge_warnings(recwarn) == ([f"MergeCallback('merge'): resumed, but {said}"] if said else [])
    if "every_n_train_steps" not in arguments:
        oldest = dict.fromkeys(callback.snapshot_steps, 0.0) | {steps[0]: 1.0}
        kept = dict.fromkeys(before.snapshot_steps, 0.0) | {steps[0]: 1.0}
        ours = callback.session.capture.ring.combine(list(oldest.values()))[0]
        theirs = before.session.capture.ring.combine(list(kept.values()))[0]
        assert torch.equal(ours, theirs.to(callback.dtype or theirs.dtype).to(theirs.dtype))


def test_without_saved_snapshots_the_window_starts_empty_and_says_so_once(tmp_path, recwarn):
    before = MergeCallback(2, 4, storage=SnapshotMemory(in_checkpoints=False))
    _, path = checkpoint_of(tmp_path, before)
    content = torch.load(path, weights_only=True)["callbacks"][before.state_key]
    assert content["tensors"] == {}
    assert content["capture"]["buffers"] == {}
    callback = MergeCallback(2, 4, storage=SnapshotMemory(in_checkpoints=False))
    recwarn.clear()
    resumed = resumed_with(tmp_path, path, callback, max_steps=20)
    expected = "MergeCallback('merge'): resumed, but the 4 snapshots of the window were not saved: it starts empty"
    assert merge_warnings(recwarn) == [expected]
    assert callback.snapshot_steps == [14, 16, 18, 20]
    assert len(resumed.logged("merged/val_loss")) == 2


def test_a_state_of_another_format_is_not_read_and_the_run_goes_on_with_an_empty_window(tmp_path, recwarn):
    before = MergeCallback(2, 4)
    _, path = checkpoint_of(tmp_path, before)
    checkpoint = torch.load(path, weights_only=True)
    # Version 0.1.0 wrote no format.
    del checkpoint["callbacks"][before.state_key]["format"]
    torch.save(checkpoint, path)
    callback = MergeCallback(2, 4)
    recwarn.clear()
    resumed_with(tmp_path, path, callback)
    (warning,) = merge_warnings(recwarn)
    assert (
        "the checkpoint's state has format 1, and this version reads format 6. Nothing of it is used: window, averages,"
        in warning
    )
    assert callback.snapshot_steps == []


def test_what_is_saved_before_the_training_goes_on_holds_the_state_that_was_loaded(tmp_path):
    _, path = checkpoint_of(tmp_path, MergeCallback(2, 4))

    class SavesEarly(Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    run = fit(make(Toy), tmp_path, MergeCallback(2, 4), SavesEarly(), train=ResumableBatches(), ckpt_path=path)
    assert run.trainer.global_step == 24
    early, before = (torch.load(each, weights_only=True)["callbacks"] for each in (tmp_path / "early.ckpt", path))
    key = MergeCallback().state_key
    assert same(early[key], before[key])
    assert early[key]["capture"]["steps"] == [6, 8, 10, 12]


def test_a_checkpoint_without_the_callback_starts_an_empty_window_with_one_warning(tmp_path, recwarn):
    _, path = checkpoint_of(tmp_path, None)
    callback = MergeCallback(2, 4)
    recwarn.clear()
    resumed_with(tmp_path, path, callback, max_steps=16)
    expected = "MergeCallback('merge'): the checkpoint holds no state of it, so the window starts empty"
    assert merge_warnings(recwarn) == [expected]
    assert callback.snapshot_steps == [14, 16]


def test_a_checkpoint_with_other_trainable_parameters_drops_the_window_and_names_one(tmp_path, recwarn):
    class Plain(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    class Frozen(Plain):
        def __init__(self):
            super().__init__()
            self.out.requires_grad_(False)

    _, path = checkpoint_of(tmp_path, MergeCallback(2, 4), Plain)
    callback = MergeCallback(2, 4)
    recwarn.clear()
    resumed_with(tmp_path, path, callback, Frozen, max_steps=16)
    expected = (
        "MergeCallback('merge'): resumed, but its window of 4 snapshots was dropped:"
        " out.weight is in the snapshots, and not merged now"
    )
    assert merge_warnings(recwarn) == [expected]
    assert callback.snapshot_steps == [14, 16]


def test_a_checkpoint_grows_by_the_snapshots_that_there_are_and_little_more(tmp_path):
    class Large(Toy):
        def __init__(self):
            super().__init__()
            self.large = torch.nn.Linear(6, 30_000, bias=False)

        def forward(self, x):
            return super().forward(x) + self.large(x)[:, :1]

    sizes = {}
    for label, arguments in {
        "without": None,
        "full": {},
        "half": {"dtype": "bfloat16"},
        "none": {"storage": SnapshotMemory(in_checkpoints=False)},
    }.items():
        callback = None if arguments is None else MergeCallback(2, 5, **arguments)
        _, path = checkpoint_of(tmp_path, callback, Large, max_steps=6)
        sizes[label] = Path(path).stat().st_size
    # At steps 2, 4 and 6.
    taken = 3 * 4 * 6 * 30_000
    assert sizes["full"] - sizes["without"] == pytest.approx(taken, abs=30_000)
    assert sizes["half"] - sizes["without"] == pytest.approx(taken / 2, abs=30_000)
    assert sizes["none"] - sizes["without"] < 10_000


def test_a_checkpoint_saved_by_a_callback_earlier_in_the_list_resumes_with_the_snapshot_of_its_step(tmp_path):
    class SaveAt(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 12:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    def run(folder, *callbacks, **arguments):
        merging = MergeCallback(2, 3)
        fit(make(Toy), tmp_path / folder, *callbacks, merging, train=ResumableBatches(), max_steps=16, **arguments)
        return merging

    whole = run("whole", SaveAt())
    resumed = run("resumed", ckpt_path=str(tmp_path / "early.ckpt"))
    assert resumed.snapshot_steps == whole.snapshot_steps == [12, 14, 16]
    assert resumed.state_dict()["capture"]["window"]["schedule"] == whole.state_dict()["capture"]["window"]["schedule"]


def test_another_interval_counts_from_the_newest_snapshot(tmp_path, recwarn):
    _, path = checkpoint_of(tmp_path, MergeCallback(2, 4))
    callback = MergeCallback(7, 4)
    resumed_with(tmp_path, path, callback, max_steps=20)
    assert callback.snapshot_steps == [8, 10, 12, 19]
    assert len(merge_warnings(recwarn)) == 1


@pytest.mark.usefixtures("both_lightnings")
def test_the_merge_of_a_finished_run_is_got_from_its_checkpoint(tmp_path):
    merges = {"sma": "sma", "ema": Ema(half_life_steps=3)}
    callback = MergeCallback(2, 3, merges=merges)
    _, path = checkpoint_of(tmp_path, callback, Toy, max_steps=8)
    again = MergeCallback(2, 3, merges=merges)
    run = fit(make(Toy), tmp_path / "again", again, max_steps=8, ckpt_path=path)
    assert run.trainer.global_step == 8
    assert again.snapshot_steps == [4, 6, 8]
    for name in merges:
        assert same(again.merged_state_dict(name), callback.merged_state_dict(name))
    again.save_merged(tmp_path / "merged.safetensors")


def test_what_no_merge_needs_any_more_is_told_of_as_that(tmp_path):
    _, path = checkpoint_of(tmp_path, MergeCallback(2, 3), Toy, max_steps=8)
    with pytest.warns(UserWarning, match="the 3 snapshots of the window are left out: no merge needs them"):
        fit(make(Toy), tmp_path / "again", MergeCallback(merges=Ema(half_life_steps=3)), max_steps=12, ckpt_path=path)
    before = MergeCallback(2, 3, merges={"sma": "sma", "ema": Ema(half_life_steps=3)})
    _, path = checkpoint_of(tmp_path / "both", before, Toy, max_steps=8)
    with pytest.warns(UserWarning, match="the average 'ema' of the checkpoint is left out: no merge needs it"):
        fit(make(Toy), tmp_path / "alone", MergeCallback(2, 3), max_steps=12, ckpt_path=path)


def test_a_checkpoint_of_another_run_begins_a_new_window_also_for_the_same_callback_and_module(tmp_path):
    """Its weights are not those that the snapshots of the earlier fit come from."""
    _, path = checkpoint_of(tmp_path, None, max_steps=12)
    callback, module = MergeCallback(2, 4), make(Toy)
    fit(module, tmp_path / "own", callback, max_steps=8)
    assert callback.snapshot_steps == [2, 4, 6, 8]
    with pytest.warns(UserWarning, match="the checkpoint holds no state of it, so the window starts empty"):
        fit(module, tmp_path / "foreign", callback, max_steps=16, train=ResumableBatches(), ckpt_path=path)
    assert callback.snapshot_steps == [14, 16]


@pytest.mark.parametrize("average", [Ema(half_life=0.1), PowerEma(0.1)])
def test_what_is_logged_of_an_average_in_a_decay_is_the_same_after_a_resume(tmp_path, average):
    def run(folder, **resumed):
        callback = MergeCallback(2, 4, merges=average)
        ended = fit(make(Decaying), tmp_path / folder, callback, train=ResumableBatches(), **resumed)
        ended.trainer.save_checkpoint(tmp_path / f"{folder}.ckpt")
        return dict(ended.logged("merge/span_steps"))

    whole = run("whole")
    run("stopped", max_steps=19)
    resumed = run("resumed", ckpt_path=str(tmp_path / "stopped.ckpt"))
    assert resumed == {step: whole[step] for step in resumed}
    # The average ends with the constant rate, so it reaches back no further as steps go by.
    assert whole[23] == whole[19]
