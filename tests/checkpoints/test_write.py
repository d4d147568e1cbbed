"""What leaves the run: files of the merge, taken by whatever takes a checkpoint, written whole or not at all."""

import json
import resource
import signal
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf

from merge_callback import Ema, MergeCallback, MergedCheckpoint, Window
from merge_callback.checkpoints.write import read_provenance
from tests.helpers.processes import call
from tests.helpers.toys import Toy, assert_same_training, batches, fit, lightning, loading, make, same


class Saved(Toy):
    """A toy with hyperparameters and something of its own in its checkpoints."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.note = "as made"

    def on_save_checkpoint(self, checkpoint):
        checkpoint["note"] = "from the checkpoint"

    def on_load_checkpoint(self, checkpoint):
        self.note = checkpoint["note"]


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


def beside(tmp_path):
    return ModelCheckpoint(tmp_path / "live")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    callback = MergeCallback(2, 4, merges={"sqrt": "1-sqrt", "late": Window(span_steps=3)})
    fitted = fit(make(Saved, width=5), folder, callback)
    return fitted, callback


@pytest.mark.parametrize("name", [None, "late"])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_file_holds_the_merge_to_the_bit_and_where_it_comes_from(run, tmp_path, suffix, name):
    _, callback = run
    path = tmp_path / "new" / "folders" / f"merge.{suffix}"
    callback.save_merged(path, name)
    loaded = safetensors.torch.load_file(path) if suffix == "safetensors" else torch.load(path)["state_dict"]
    assert same(dict(loaded), callback.merged_state_dict(name))
    make(Toy).load_state_dict(loaded, strict=True)
    origin = read_provenance(path)
    assert origin["steps"] == [18, 20, 22, 24]
    assert dict(zip(origin["steps"], origin["coefficients"], strict=True)) == callback.coefficients(name)
    assert origin["implied_decay"] == [multiplier for _, multiplier in callback.implied_decay(name)]
    assert origin["rule"] == ("Window(rule='sma', span_steps=3, span=None)" if name else "1-sqrt")
    assert origin["version"]
    assert names_in(path.parent) == [path.name]


def test_a_checkpoint_is_taken_by_load_from_checkpoint_with_hyperparameters_and_hooks(run, tmp_path):
    fitted, callback = run
    callback.save_merged(tmp_path / "merge.ckpt")
    loaded = type(fitted.module).load_from_checkpoint(tmp_path / "merge.ckpt", weights_only=True)
    assert same(dict(loaded.state_dict()), callback.merged_state_dict())
    assert loaded.hparams["width"] == 5
    assert loaded.note == "from the checkpoint"


@pytest.mark.usefixtures("both_lightnings")
@pytest.mark.slow
def test_a_fit_from_a_merged_checkpoint_is_a_fit_from_these_weights(tmp_path):
    callback = MergeCallback(2, 4)
    fit(make(Saved), tmp_path / "first", callback)
    callback.save_merged(tmp_path / "merge.ckpt")
    from_file = fit(make(Saved), tmp_path / "file", MergeCallback(2, 4), ckpt_path=str(tmp_path / "merge.ckpt"))
    module = make(Saved)
    module.load_state_dict(callback.merged_state_dict())
    from_weights = fit(module, tmp_path / "weights", MergeCallback(2, 4))
    assert_same_training(from_file, from_weights)
    assert from_file.trainer.global_step == 24


def test_a_fit_takes_a_merged_checkpoint_with_weights_only(run, tmp_path):
    _, callback = run
    callback.save_merged(tmp_path / "merge.ckpt")

    class First(Callback):
        def on_train_start(self, trainer, pl_module):
            self.weights = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    first = First()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning().Trainer(max_steps=2, accelerator="cpu", callbacks=[first], **quiet)
    loader = batches(24, shuffle=False)
    merged = str(tmp_path / "merge.ckpt")
    trainer.fit(make(Saved), batches(), loader, ckpt_path=merged, **loading(trainer, weights_only=True))
    assert same(first.weights, callback.merged_state_dict())
    assert trainer.global_step == 2


def test_a_merged_file_loads_without_unpickling_foreign_code(run, tmp_path):
    _, callback = run
    callback.save_merged(tmp_path / "merge.ckpt")
    assert torch.load(tmp_path / "merge.ckpt", weights_only=True)["merge_callback"]["steps"]


def test_another_ending_is_refused(run, tmp_path):
    _, callback = run
    with pytest.raises(ValueError, match=r"saved as .ckpt or .safetensors, got 'merge.pt'"):
        callback.save_merged(tmp_path / "merge.pt")
    assert not names_in(tmp_path)


def test_a_file_without_a_merge_is_recognised(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("other.ckpt", "other.safetensors"):
        with pytest.raises(ValueError, match=f"{name} holds no merge"):
            read_provenance(tmp_path / name)


def save_on_a_full_disk(folder, name):
    """What is said when there is no room for a merge whose file is there already, which has to stay."""
    callback = MergeCallback(2, 3)
    fit(make(Toy), folder / "run", callback)
    path = folder / name
    callback.save_merged(path)
    before = path.read_bytes()
    # The file system takes no file larger than this any more, as a full disk would.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(OSError, match="not saved") as refused:
        callback.save_merged(path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in folder.iterdir()) == sorted(["run", path.name])
    return str(refused.value)


@pytest.mark.parametrize("name", ["merge.ckpt", "merge.safetensors"])
def test_a_link_stays_one_and_what_it_points_to_is_replaced(run, tmp_path, name):
    _, callback = run
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / name).write_text("an older one")
    (tmp_path / name).symlink_to(tmp_path / "there" / name)
    callback.save_merged(tmp_path / name)
    assert (tmp_path / name).is_symlink()
    assert [file.name for file in (tmp_path / "there").iterdir()] == [name]
    assert read_provenance(tmp_path / "there" / name)["steps"] == callback.snapshot_steps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merge.ckpt", "merge.safetensors"])
def test_a_full_disk_leaves_no_half_file_and_the_older_one_stays(tmp_path, name):
    said = call(save_on_a_full_disk, tmp_path, name)
    assert said.startswith(f"the merge of steps [20, 22, 24] was not saved to {tmp_path / name}")


@pytest.mark.usefixtures("both_lightnings")
def test_merged_checkpoints_keep_the_best_merges_and_live_checkpoints_live_weights(tmp_path):
    class Watching(Callback):
        def __init__(self, callback):
            self.callback, self.merged, self.live = callback, {}, {}

        def on_validation_end(self, trainer, pl_module):
            if self.callback.snapshot_steps:
                self.merged[trainer.global_step] = self.callback.merged_state_dict()
                self.live[trainer.global_step] = {k: v.clone() for k, v in pl_module.state_dict().items()}

    callback = MergeCallback(2, 3)
    arguments = {"monitor": "merged/val_loss", "filename": "{step}", "auto_insert_metric_name": False}
    merged = MergedCheckpoint(callback, dirpath=tmp_path / "merged", save_top_k=2, **arguments)
    live = lightning(".callbacks").ModelCheckpoint(tmp_path / "live", save_top_k=-1, filename="{step}")
    watching = Watching(callback)
    run = fit(make(Toy, warmup_steps=5), tmp_path / "run", callback, watching, merged, live, enable_checkpointing=True)
    losses = {step + 1: value for step, value in run.logged("merged/val_loss")}
    best = sorted(losses, key=losses.get)[:2]
    assert names_in(tmp_path / "merged") == sorted(f"{step}.ckpt" for step in best)
    assert merged.best_model_path == str(tmp_path / "merged" / f"{best[0]}.ckpt")
    for step in best:
        content = torch.load(tmp_path / "merged" / f"{step}.ckpt", weights_only=True)
        assert same(dict(content["state_dict"]), watching.merged[step])
        assert content["merge_callback"]["steps"][-1] == step
        kept = torch.load(tmp_path / "live" / f"step={step}.ckpt", weights_only=True)
        assert same(dict(kept["state_dict"]), watching.live[step])
        assert not same(dict(kept["state_dict"]), dict(content["state_dict"]))


def test_saving_merges_changes_nothing_of_the_training(tmp_path):
    without = fit(make(Toy), tmp_path / "without")
    callback = MergeCallback(2, 3)
    merged = MergedCheckpoint(callback, dirpath=tmp_path / "merged", monitor="merged/val_loss")
    run = fit(make(Toy), tmp_path / "with", callback, merged, beside(tmp_path), enable_checkpointing=True)
    assert merged.best_model_path
    assert_same_training(without, run)


def test_a_folder_that_vanished_is_made_anew_and_one_that_cannot_be_is_named_while_training_goes_on(tmp_path):
    class Vandal(Callback):
        def on_validation_start(self, trainer, pl_module):
            folder = tmp_path / "merged"
            if trainer.global_step == 8:
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
            if trainer.global_step == 16:
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
                folder.write_text("in the way")

    callback = MergeCallback(2, 3)
    merged = MergedCheckpoint(callback, dirpath=tmp_path / "merged", save_top_k=-1, monitor="merged/val_loss")
    with pytest.warns(UserWarning, match="was not saved to .*merged.*Training goes on"):
        run = fit(make(Toy), tmp_path / "run", callback, Vandal(), merged, beside(tmp_path), enable_checkpointing=True)
    assert run.trainer.global_step == 24
    assert [step for step, _ in run.logged("merged/val_loss")] == [3, 7, 11, 15, 19, 23]


def test_a_missing_extra_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    _, callback = run
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'merge-callback\[export\]'"):
        callback.save_merged(tmp_path / "merge.safetensors")


def test_the_metadata_of_a_safetensors_file_is_readable_by_any_program(run, tmp_path):
    _, callback = run
    callback.save_merged(tmp_path / "merge.safetensors")
    with safetensors.safe_open(tmp_path / "merge.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["steps"]) == [18, 20, 22, 24]
    # What loaders of pre-trained models ask for.
    assert metadata["format"] == "pt"


def test_a_checkpoint_says_at_which_step_it_was_made_and_begins_at_epoch_zero(run, tmp_path):
    _, callback = run
    callback.save_merged(tmp_path / "merge.ckpt")
    content = torch.load(tmp_path / "merge.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (0, 24)


def test_provenance_is_read_without_loading_foreign_code(tmp_path):
    torch.save({"merge_callback": Path("anything")}, tmp_path / "merge.ckpt")
    with pytest.raises(ValueError, match="holds no merge"):
        read_provenance(tmp_path / "merge.ckpt")


def test_a_merged_checkpoint_of_another_merge_holds_that_one_and_is_saved_once_a_step(tmp_path):
    callback = MergeCallback(2, 3, merges={"sma": "sma", "newest": Window(span_steps=1)})
    merged = MergedCheckpoint(callback, "newest", dirpath=tmp_path / "merged", monitor="merged_newest/val_loss")
    plain = MergedCheckpoint(callback, dirpath=tmp_path / "plain", monitor="merged/val_loss", every_n_train_steps=4)
    assert len({merged.state_key, plain.state_key}) == 2
    fit(make(Toy), tmp_path / "run", callback, merged, plain, beside(tmp_path), enable_checkpointing=True)
    assert read_provenance(merged.best_model_path)["coefficients"] == [0.0, 0.0, 1.0]
    assert read_provenance(plain.best_model_path)["coefficients"] == [1 / 3] * 3
    assert len(names_in(tmp_path / "plain")) == len(names_in(tmp_path / "merged")) == 1
    assert merged._last_global_step_saved % 4 == 0
    assert merged._last_checkpoint_saved == merged.best_model_path


@pytest.mark.slow
def test_hyperparameters_that_are_one_object_load_as_lightning_loads_them(tmp_path):
    class Configured(Toy):
        def __init__(self, config):
            super().__init__()
            self.save_hyperparameters(config)
            self.config = config

    callback = MergeCallback(2, 3)
    for config in ({"width": 3}, OmegaConf.create({"width": 3})):
        run = fit(make(Configured, config=config), tmp_path / "run", callback)
        callback.save_merged(tmp_path / "merge.ckpt")
        run.trainer.save_checkpoint(tmp_path / "live.ckpt")
        for name in ("live.ckpt", "merge.ckpt"):
            loaded = type(run.module).load_from_checkpoint(tmp_path / name, weights_only=False)
            assert loaded.config["width"] == 3
            assert type(loaded.hparams) is type(run.module.hparams)


def test_what_is_no_tensor_is_named_where_the_format_takes_none(tmp_path):
    class Extra(Toy):
        def get_extra_state(self):
            return {"note": "kept"}

        def set_extra_state(self, state):
            pass

    callback = MergeCallback(2, 3)
    fit(make(Extra), tmp_path / "run", callback)
    callback.save_merged(tmp_path / "merge.ckpt")
    with pytest.raises(ValueError, match="takes tensors only, and _extra_state is not one; save the merge as"):
        callback.save_merged(tmp_path / "merge.safetensors")


def test_the_last_checkpoint_of_a_run_is_never_a_merge(tmp_path):
    callback = MergeCallback(2, 3)
    merged = MergedCheckpoint(callback, dirpath=tmp_path / "both", monitor="merged/val_loss", save_last=True)
    live = ModelCheckpoint(tmp_path / "both", save_last=True)
    run = fit(make(Toy), tmp_path / "run", callback, merged, live, enable_checkpointing=True)
    assert "merged-last.ckpt" in names_in(tmp_path / "both")
    assert run.trainer._checkpoint_connector._select_ckpt_path(
        run.trainer.state.fn, "last", model_provided=True, model_connected=True
    ) == str(tmp_path / "both" / "last.ckpt")
    assert "merge_callback" not in torch.load(tmp_path / "both" / "last.ckpt", weights_only=True)
    assert all(
        name.startswith("merged-") for name in names_in(tmp_path / "both") if "last" not in name and "-v" in name
    )


def test_alone_it_says_that_nothing_can_be_resumed(tmp_path):
    callback = MergeCallback(2, 3)
    merged = MergedCheckpoint(callback, dirpath=tmp_path / "merged")
    with pytest.warns(UserWarning, match=r"which no run can be resumed from; add a ModelCheckpoint\(\)"):
        fit(make(Toy), tmp_path / "run", callback, merged, enable_checkpointing=True)


def test_only_merges_that_were_evaluated_in_this_validation_are_kept_by_their_value(tmp_path):
    callback = MergeCallback(2, 3, evaluate_every_n_validations=2)
    arguments = {"monitor": "merged/val_loss", "save_top_k": -1, "filename": "{step}", "auto_insert_metric_name": False}
    merged = MergedCheckpoint(callback, dirpath=tmp_path / "merged", **arguments)
    fit(make(Toy), tmp_path / "run", callback, merged, beside(tmp_path), enable_checkpointing=True)
    assert names_in(tmp_path / "merged") == ["16.ckpt", "24.ckpt", "8.ckpt"]


def test_a_merge_that_is_not_there_is_refused_at_once():
    with pytest.raises(ValueError, match="no merge called 'latest'; there are: sma"):
        MergedCheckpoint(MergeCallback(), "latest")


def test_what_a_merged_checkpoint_is_given_has_to_be_a_callback_of_the_trainer(tmp_path):
    with pytest.raises(TypeError, match="merge_callback must be a MergeCallback, got 'merge'"):
        MergedCheckpoint("merge")
    merged = MergedCheckpoint(MergeCallback(), monitor="merged/val_loss")
    with pytest.raises(ValueError, match="must be in the Trainer's callbacks"):
        fit(make(Toy), tmp_path, MergeCallback(), merged, beside(tmp_path), enable_checkpointing=True)


def test_averages_over_every_step_are_kept_too(tmp_path):
    callback = MergeCallback(merges=Ema(half_life_steps=3))
    merged = MergedCheckpoint(callback, dirpath=tmp_path / "merged", monitor="merged/val_loss")
    fit(make(Toy), tmp_path, callback, merged, beside(tmp_path), enable_checkpointing=True)
    (path,) = (tmp_path / "merged").iterdir()
    assert read_provenance(path)["rule"].startswith("Ema(")
