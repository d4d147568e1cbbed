"""Files of merges: never removed before their successor is there, ranked by their own step, on any file system."""

from pathlib import Path

import fsspec
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from merge_callback import Ema, MergeCallback, MergedCheckpoint, SnapshotDirectory
from merge_callback.checkpoints.write import read_provenance
from tests.helpers.toys import ResumableBatches, Toy, assert_same_training, batches, fit, lightning, make

QUIET = pytest.mark.filterwarnings("ignore:.*was not saved to", "ignore:MergedCheckpoint saves merges, which no run")


class InTheWay(Callback):
    """From step 14 on, no folder of a step can be made."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, *arguments):
        if trainer.global_step == 14:
            for step in range(15, 40):
                (self.folder / str(step)).write_text("a file")


class Falling(Toy):
    """Each validation is better than the one before."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]) - self.global_step)


def kept(folder):
    return sorted(int(path.parent.name) for path in folder.rglob("merge.ckpt"))


def in_folders_of_steps(callback, folder, **arguments):
    named = {"filename": "{step}/merge", "auto_insert_metric_name": False}
    return MergedCheckpoint(callback, dirpath=folder, **named, **arguments)


@QUIET
@pytest.mark.usefixtures("both_lightnings")
@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ({}, [12]),
        ({"monitor": "merged/val_loss"}, [12]),
        ({"monitor": "merged/val_loss", "save_top_k": 2}, [8, 12]),
        ({"every_n_train_steps": 3}, [12]),
        ({"save_top_k": -1, "every_n_train_steps": 3}, [3, 6, 9, 12]),
    ],
)
@pytest.mark.sample(2)
def test_a_merge_that_cannot_be_saved_takes_no_other_away(tmp_path, arguments, left):
    callback = MergeCallback(1, 3)
    merged = in_folders_of_steps(callback, tmp_path / "merged", **arguments)
    fit(make(Falling), tmp_path / "run", callback, merged, InTheWay(tmp_path / "merged"), enable_checkpointing=True)
    assert kept(tmp_path / "merged") == left
    assert merged.best_model_path == str(tmp_path / "merged" / "12" / "merge.ckpt")
    assert set(merged.best_k_models) == (
        {str(tmp_path / "merged" / f"{step}/merge.ckpt") for step in left} if "monitor" in arguments else set()
    )
    if "monitor" in arguments:
        assert merged.best_model_score == merged.best_k_models[merged.best_model_path]
        assert merged.kth_best_model_path == str(tmp_path / "merged" / f"{left[0]}/merge.ckpt")
    assert merged._last_global_step_saved == 12


@QUIET
def test_an_average_that_restarts_takes_no_file_away(tmp_path):
    class NanFrom(Toy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.global_step >= 13 else loss

    callback = MergeCallback(merges=Ema(half_life_steps=2))
    merged = in_folders_of_steps(callback, tmp_path / "merged", save_last=True)
    with pytest.warns(UserWarning, match="holds NaN or inf and restarts"):
        fit(make(NanFrom), tmp_path / "run", callback, merged, enable_checkpointing=True)
    assert kept(tmp_path / "merged") == [12]
    assert merged.best_model_path == str(tmp_path / "merged" / "12" / "merge.ckpt")
    assert merged.last_model_path == str(tmp_path / "merged" / "merged-last.ckpt")
    assert read_provenance(merged.last_model_path)["steps"] == [12]


@QUIET
@pytest.mark.parametrize("arguments", [{}, {"monitor": "merged/val_loss"}])
def test_without_a_merge_no_file_is_named_as_the_best(tmp_path, arguments):
    callback = MergeCallback(1000)
    merged = MergedCheckpoint(callback, dirpath=tmp_path / "merged", save_last=True, **arguments)
    fit(make(Toy), tmp_path / "run", callback, merged, enable_checkpointing=True)
    assert not list((tmp_path / "merged").rglob("*")) if (tmp_path / "merged").exists() else True
    assert (merged.best_model_path, merged.last_model_path, merged.best_k_models) == ("", "", {})


@pytest.mark.usefixtures("both_lightnings")
@QUIET
@pytest.mark.parametrize("every", [{"every_n_train_steps": 5}, {"every_n_train_steps": 3}, {}])
@pytest.mark.sample(1)
def test_a_merge_is_ranked_by_the_value_of_its_own_step(tmp_path, every):
    callback = MergeCallback(1, 3, evaluate_every_n_validations=2)
    merged = in_folders_of_steps(
        callback, tmp_path / "merged", monitor="merged/val_loss", save_top_k=-1, save_last=True, **every
    )
    run = fit(make(Toy), tmp_path / "run", callback, merged, enable_checkpointing=True)
    evaluated = {step + 1: value for step, value in run.logged("merged/val_loss")}
    assert list(evaluated) == [8, 16, 24]
    assert kept(tmp_path / "merged") == [8, 16, 24]
    for path, score in merged.best_k_models.items():
        step = int(Path(path).parent.name)
        assert float(score) == pytest.approx(evaluated[step], rel=1e-6)
        module = make(Toy)
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        trainer = lightning().Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
        (found,) = trainer.validate(module, batches(24, 8, shuffle=False, seed=1), verbose=False)
        assert found["val_loss"] == pytest.approx(float(score), rel=1e-5)


@QUIET
def test_merges_are_saved_where_lightning_saves_checkpoints_also_on_other_file_systems(tmp_path):
    store = fsspec.filesystem("memory")
    callback = MergeCallback(1, 3)
    url = f"memory://{tmp_path.name}"
    merged = MergedCheckpoint(callback, dirpath=f"{url}/merged", monitor="merged/val_loss", filename="{step}")
    live = ModelCheckpoint(f"{url}/live", filename="{step}")
    before = sorted(Path.cwd().iterdir())
    fit(make(Toy), tmp_path / "run", callback, merged, live, enable_checkpointing=True)
    assert [Path(name).name for name in store.find(f"{url}/live")] == ["step=24.ckpt"]
    (name,) = store.find(f"{url}/merged")
    assert merged.best_model_path.endswith(name)
    with store.open(name) as file:
        content = torch.load(file, weights_only=True)
    make(Toy).load_state_dict(content["state_dict"])
    callback.save_merged(f"{url}/by_hand/merge.safetensors")
    assert [Path(name).name for name in store.find(f"{url}/by_hand")] == ["merge.safetensors"]
    assert sorted(Path.cwd().iterdir()) == before
    callback.save_merged(f"file://{tmp_path}/local/merge.ckpt")
    assert read_provenance(tmp_path / "local" / "merge.ckpt")["steps"] == [22, 23, 24]
    # Made from a URL, a path has lost a slash.
    with pytest.raises(ValueError, match="path was a URL and is one no more"):
        callback.save_merged(Path(f"{url}/merge.ckpt"))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [callback, MergedCheckpoint(callback)]
    trainer = lightning().Trainer(default_root_dir=f"{url}/root", max_steps=8, callbacks=callbacks, **quiet)
    trainer.fit(make(Toy), batches(), batches(24, 8, shuffle=False))
    assert [Path(name).name for name in store.find(f"{url}/root")] == ["merged-epoch=0-step=8.ckpt"]


@pytest.mark.parametrize(
    "make_it",
    [
        lambda url: MergeCallback(storage=url),
        lambda url: MergeCallback(storage=SnapshotDirectory(url)),
        lambda url: MergeCallback(calibration=url),
    ],
)
def test_what_has_to_lie_on_this_machine_is_refused_elsewhere(make_it):
    for location in ("s3://bucket/a", Path("s3://bucket/a")):
        with pytest.raises(ValueError, match=r"(storage|calibration) (must be a path on this machine|was a URL)"):
            make_it(location)


@QUIET
@pytest.mark.usefixtures("both_lightnings")
@pytest.mark.parametrize(
    ("save_last", "every", "validations", "steps"),
    [(True, 10, 10, [50, 60]), (None, 10, 10, [50, 60]), (True, 15, 20, [40, 60]), (True, 10, 20, [40, 60])],
)
@pytest.mark.sample(1)
def test_the_best_merges_are_kept_beside_the_last_one(tmp_path, save_last, every, validations, steps):
    callback = MergeCallback(1, 3)
    merged = in_folders_of_steps(
        callback, tmp_path / "merged", monitor="merged/val_loss", save_top_k=2, save_last=save_last,
        every_n_train_steps=every,
    )  # fmt: skip
    loaders = {"train": ResumableBatches(80), "val_check_interval": validations}
    fit(make(Falling), tmp_path / "run", callback, merged, enable_checkpointing=True, max_steps=60, **loaders)
    assert kept(tmp_path / "merged") == steps
    if save_last:
        assert read_provenance(merged.last_model_path)["steps"] == [58, 59, 60]


class TwoRates(Toy):
    """A constant rate for 12 steps, another one for 12 more, then a decay."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0 if step < 12 else 0.5 if step < 24 else 0.5 * (31 - step) / 8
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


@QUIET
@pytest.mark.usefixtures("both_lightnings")
def test_at_the_end_of_each_constant_rate_its_last_merge_is_saved_once(tmp_path):
    callback = MergeCallback(1, 3)
    saving = MergedCheckpoint(callback, at="stable_end", dirpath=tmp_path / "c")
    run = fit(make(TwoRates), tmp_path, callback, saving, enable_checkpointing=True, max_steps=32)
    files = sorted((tmp_path / "c").glob("*.ckpt"))
    assert [read_provenance(file)["steps"] for file in files] == [[10, 11, 12], [22, 23, 24]]
    assert [file.name for file in files] == [f"merged-stable-end-step={step}.ckpt" for step in (12, 24)]
    alone = fit(make(TwoRates), tmp_path / "alone", max_steps=32)
    assert_same_training(alone, run)


@QUIET
def test_a_run_that_ends_at_a_constant_rate_saves_its_last_merge(tmp_path):
    callback = MergeCallback(1, 3)
    saving = MergedCheckpoint(callback, at="stable_end", dirpath=tmp_path / "c")
    fit(make(Toy), tmp_path, callback, saving, enable_checkpointing=True, max_steps=12)
    (file,) = (tmp_path / "c").iterdir()
    assert read_provenance(file)["steps"] == [10, 11, 12]


@QUIET
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("cut", [9, 14, 28])
@pytest.mark.sample(1)
def test_a_resumed_run_saves_no_end_twice_and_none_too_few(tmp_path, cut):
    def run(max_steps, **resumed):
        callback = MergeCallback(1, 3)
        saving = MergedCheckpoint(callback, at="stable_end", dirpath=tmp_path / "c")
        options = {"enable_checkpointing": True, "train": ResumableBatches(), "max_steps": max_steps}
        ended = fit(make(TwoRates), tmp_path / "run", callback, saving, **options, **resumed)
        ended.trainer.save_checkpoint(tmp_path / f"at-{max_steps}.ckpt")
        return sorted(read_provenance(file)["steps"] for file in (tmp_path / "c").glob("*.ckpt"))

    # A run that ends at a constant rate saves its merge, and the end of that rate is still to come when it goes on.
    of_cut = {9: [[7, 8, 9]], 14: [[13, 14]], 28: []}[cut]
    ends = [[10, 11, 12], [22, 23, 24]]
    assert run(cut) == sorted([*of_cut, *(steps for steps in ends if steps[-1] < cut)])
    assert run(32, ckpt_path=str(tmp_path / f"at-{cut}.ckpt")) == sorted([*of_cut, *ends])


def test_what_is_saved_at_an_end_is_not_ranked():
    callback = MergeCallback()
    with pytest.raises(ValueError, match="at must be 'stable_end' or None, got 'end'"):
        MergedCheckpoint(callback, at="end")
    with pytest.raises(ValueError, match="at='stable_end' saves one merge, whatever it is worth"):
        MergedCheckpoint(callback, at="stable_end", monitor="merged/val_loss")


@QUIET
def test_a_fast_dev_run_leaves_no_file(tmp_path):
    callback = MergeCallback(1, 3)
    saving = MergedCheckpoint(callback, at="stable_end", dirpath=tmp_path / "c")
    options = {"max_steps": -1, "val_check_interval": None, "fast_dev_run": 4, "enable_checkpointing": True}
    fit(make(Toy), tmp_path, callback, saving, **options)
    assert callback.snapshot_steps
    assert not list(tmp_path.rglob("*.ckpt"))


@QUIET
def test_a_monitor_that_no_validation_logs_is_told_of_once_with_those_there_are(tmp_path):
    callback = MergeCallback(1, 3)
    saving = MergedCheckpoint(callback, dirpath=tmp_path / "c", monitor="merged/val_los")
    with pytest.warns(
        UserWarning, match="'merged/val_los' is not among the metrics .* at step 4.*merged/val_l"
    ) as said:
        fit(make(Toy), tmp_path, callback, saving, enable_checkpointing=True)
    assert sum("is not among" in str(warning.message) for warning in said) == 1


@QUIET
@pytest.mark.parametrize("monitor", ["merged/val_accuracy", "merge_gain/val_loss", "merged_late/val_accuracy"])
def test_a_mode_that_would_keep_the_worst_merge_is_told_of(tmp_path, monitor):
    callback = MergeCallback(1, 3, merges={"sma": "sma", "late": "wma"})
    saving = MergedCheckpoint(callback, dirpath=tmp_path / "c", monitor=monitor)
    with pytest.warns(UserWarning, match=r"has mode='min', but more of it is better"):
        fit(make(Toy), tmp_path, callback, saving, enable_checkpointing=True)


def test_the_merge_to_save_is_not_called_name():
    with pytest.raises(TypeError, match=r"MergedCheckpoint takes no name=; .* write merge="):
        MergedCheckpoint(MergeCallback(), name="sma")
