"""What a pickle of a callback holds: arguments, and nothing of the run, as where modules keep callbacks."""

import pickle

import pytest
import torch
from lightning.pytorch import Callback

from merge_callback import AnnealBranch, MergeCallback, MergedCheckpoint, SpikeRecovery, Window
from tests.callbacks.test_anneal_branch import Stopper
from tests.helpers.toys import ResumableBatches, Toy, fit, make, same


class Keeping(Toy):
    """Keeps the callbacks of its trainer among its hyper-parameters, as modules of some packages do."""

    def __init__(self, **trainer_arguments):
        super().__init__()
        self.save_hyperparameters()
        self.trainer_arguments = trainer_arguments


class PickledAt(Callback):
    """Pickles a callback in the middle of a run."""

    def __init__(self, callback):
        self.callback, self.pickles = callback, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.pickles.append(pickle.dumps(self.callback))


def test_neither_merges_nor_checkpoints_hold_the_weights_by_way_of_a_callback(tmp_path):
    callback = MergeCallback(1, 4, merges={"late": Window(span=0.1)})
    callbacks = [callback, SpikeRecovery(callback)]
    module = make(Keeping, callbacks=callbacks, settings={"callbacks": callbacks, "width": 3}, own=callback)
    run = fit(module, tmp_path / "run", *callbacks, max_steps=8)
    callback.save_merged(tmp_path / "merge.ckpt")
    content = torch.load(tmp_path / "merge.ckpt", weights_only=True)
    assert content["hyper_parameters"] == {"callbacks": [], "settings": {"callbacks": [], "width": 3}}
    type(module).load_from_checkpoint(tmp_path / "merge.ckpt")
    # Lightning's own checkpoints hold what pickling makes of them.
    run.trainer.save_checkpoint(tmp_path / "live.ckpt")
    content = torch.load(tmp_path / "live.ckpt", weights_only=False)
    kept = content["hyper_parameters"]["own"]
    assert kept.snapshot_steps == []
    assert kept.session.module is None


@pytest.mark.filterwarnings("ignore:MergedCheckpoint saves merges", "ignore:.*the learning rate was not constant")
@pytest.mark.parametrize("make_one", [lambda merge: merge, SpikeRecovery, MergedCheckpoint, lambda _: AnnealBranch(12)])
def test_a_pickle_holds_the_arguments_and_nothing_of_the_run(tmp_path, make_one):
    merge = MergeCallback(2, 3, merges="1-sqrt", name="other")
    one = make_one(merge)
    before = pickle.dumps(one)
    pickling = PickledAt(one)
    callbacks = dict.fromkeys([merge, one, pickling])
    fit(make(Toy), tmp_path / "run", *callbacks, max_steps=12, enable_checkpointing=one not in (merge, pickling))
    for pickled in pickling.pickles:
        # Of a spike detector's losses there are a few.
        assert len(pickled) < len(before) + 3000
    copied = pickle.loads(pickling.pickles[-1])
    assert type(copied) is type(one)
    held = getattr(copied, "merge_callback", copied)
    if isinstance(held, MergeCallback):
        assert (held.every_n_train_steps, held.num_snapshots, list(held.merges), held.name) == (
            2,
            3,
            ["1-sqrt"],
            "other",
        )
        assert held.session.module is None
        assert held.snapshot_steps == []


def test_a_callback_from_a_pickle_trains_as_the_one_that_was_pickled(tmp_path):
    callback = MergeCallback(2, 3)
    fit(make(Toy), tmp_path / "first", callback, max_steps=8)
    copied = pickle.loads(pickle.dumps(callback))
    for name, each in (("second", callback), ("third", copied)):
        fit(make(Toy), tmp_path / name, each)
    assert same(callback.merged_state_dict(), copied.merged_state_dict())


class SaveBefore(Callback):
    """Saves the run after a checkpoint was loaded and before training begins."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_start(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / "early.ckpt")


def recovering():
    merge = MergeCallback(2, 3)
    return [merge, SpikeRecovery(merge)]


@pytest.mark.filterwarnings("ignore:AnnealBranch. the run ended")
@pytest.mark.parametrize("callbacks", [lambda: [MergeCallback(2, 3)], recovering, lambda: [AnnealBranch(20)]])
def test_the_state_that_was_loaded_is_the_state_until_training_begins(tmp_path, callbacks):
    path = str(tmp_path / "first.ckpt")
    before = callbacks()
    fit(make(Toy), tmp_path / "run", *before, Stopper(path, 12), train=ResumableBatches())
    resumed = [SaveBefore(tmp_path), *callbacks()]
    fit(make(Toy), tmp_path / "resumed", *resumed, train=ResumableBatches(), ckpt_path=path)
    first, early = (
        torch.load(each, weights_only=True)["callbacks"][before[-1].state_key]
        for each in (path, tmp_path / "early.ckpt")
    )
    assert same(first, early)
