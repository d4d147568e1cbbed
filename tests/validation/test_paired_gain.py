"""With a limit of batches: the gain is that on the same batches, and the live model is not validated twice for it."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch.nn import functional as F

from merge_callback import MergeCallback
from merge_callback.live.batch_sums import BatchSums, standard_error
from tests.helpers.toys import Toy, assert_same_training, batches, fit, make

# Of each validation batch: step, loader, loss and size. Outside of the module, whose attributes are restored.
SEEN: list[tuple[int, int, float, int]] = []


class LossAlone(Toy):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss, batch_size=len(batch[0]))
        SEEN.append((self.global_step, dataloader_idx, float(loss), len(batch[0])))


class AndAccuracy(LossAlone):
    """A metric object has no values of single batches."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx, dataloader_idx)
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.accuracy)


def run(folder, module_class, *callbacks, sizes=(44,), **arguments):
    """Batches of eight, so that the last one may be smaller."""
    SEEN.clear()
    loaders = [batches(size, 8, shuffle=False, seed=seed) for seed, size in enumerate(sizes)]
    validation = loaders if len(loaders) > 1 else loaders[0]
    return fit(make(module_class), folder, *callbacks, validation=validation, num_sanity_val_steps=0, **arguments)


def by_hand(step, num_merged, num_live, num_skipped=0):
    """Gain and standard error, from the losses of the batches of both validations at a step."""
    seen = [(loss, size) for at, _, loss, size in SEEN if at == step]
    merged, live = seen[:num_merged], seen[num_skipped + num_merged :]
    assert len(live) == num_live
    gains = np.array([theirs - ours for (ours, _), (theirs, _) in zip(merged, live, strict=False)])
    weights = np.array([size for _, size in merged])
    gain = (weights * gains).sum() / weights.sum()
    squares = (weights**2 * (gains - gain) ** 2).sum() * len(gains) / (len(gains) - 1)
    return gain, squares**0.5 / weights.sum()


@pytest.mark.parametrize("limit", [3, 0.5])
@pytest.mark.sample(1)
def test_the_live_model_is_validated_once_and_the_gain_is_that_on_the_same_batches(tmp_path, limit):
    without = run(tmp_path / "without", LossAlone)
    limited = run(tmp_path / "limited", LossAlone, MergeCallback(2, 3, limit_batches=limit))
    assert_same_training(without, limited)
    assert [at for at, *_ in SEEN].count(24) == 3 + 6
    gains, errors = (dict(limited.logged(f"{name}/val_loss")) for name in ("merge_gain", "merge_gain_stderr"))
    for step in (4, 12, 24):
        gain, error = by_hand(step, 3, 6)
        assert gains[step - 1] == pytest.approx(gain, abs=1e-6)
        assert errors[step - 1] == pytest.approx(error, rel=1e-3)
    # To the bit the gain that a second live validation would give.
    twice = run(tmp_path / "twice", AndAccuracy, MergeCallback(2, 3, limit_batches=limit))
    assert [at for at, *_ in SEEN].count(24) == 3 + 3 + 6
    for name in ("merge_gain/val_loss", "merged/val_loss", "merge_gain_stderr/val_loss"):
        assert limited.logged(name) == twice.logged(name)
    assert twice.logged("merge_gain/val_accuracy")
    assert not twice.logged("merge_gain_stderr/val_accuracy")


def test_the_merged_value_is_the_live_one_of_the_whole_validation_less_the_gain(tmp_path):
    limited = run(tmp_path, AndAccuracy, MergeCallback(2, 3, limit_batches=0.4))
    for metrics in limited.epoch_metrics:
        assert metrics["merged/val_loss"] == metrics["val_loss"] - metrics["merge_gain/val_loss"]
        # What is no mean over batches is what it was on the batches of the merge: it could leave its range.
        assert 0 <= metrics["merged/val_accuracy"] <= 1


def test_a_smaller_last_batch_and_several_loaders_keep_their_weights(tmp_path):
    limited = run(tmp_path, LossAlone, MergeCallback(2, 3, limit_batches=2), sizes=(12, 40))
    metrics = limited.epoch_metrics[-1]
    for loader, num_live in ((0, 2), (1, 5)):
        of_loader = [each for each in SEEN if each[1] == loader and each[0] == 24]
        merged, live = of_loader[:2], of_loader[2:]
        assert len(live) == num_live
        weights = [size for *_, size in merged]
        gains = [theirs[2] - ours[2] for ours, theirs in zip(merged, live, strict=False)]
        expected = np.average(gains, weights=weights)
        assert float(metrics[f"merge_gain/val_loss/dataloader_idx_{loader}"]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("form", ["sometimes", "at the end", "largest", "one batch"])
@pytest.mark.sample(1)
def test_what_has_no_values_of_single_batches_has_a_gain_all_the_same(tmp_path, form):
    class Other(LossAlone):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if form == "sometimes" and batch_idx % 2:
                self.log("other", SEEN[-1][2], batch_size=1)
            if form == "largest":
                self.log("other", SEEN[-1][2], reduce_fx="max")

        def on_validation_epoch_end(self):
            if form == "at the end":
                self.log("other", self.out.bias.sum())

    limit = 1 if form == "one batch" else 4
    limited = run(tmp_path, Other, MergeCallback(2, 3, limit_batches=limit))
    is_twice = form in ("at the end", "largest")
    assert [at for at, *_ in SEEN].count(24) == limit * (1 + is_twice) + 6
    if form == "one batch":
        assert limited.logged("merge_gain/val_loss")
        assert not limited.logged("merge_gain_stderr/val_loss")
        return
    live, merged = SEEN[-6:], SEEN[-6 - limit * (1 + is_twice) :][:limit]
    gains = [theirs[2] - ours[2] for ours, theirs in zip(merged, live, strict=False)]
    gain = float(limited.epoch_metrics[-1]["merge_gain/other"])
    if form == "sometimes":
        assert gain == pytest.approx(np.mean(gains[1::2]), abs=1e-6)
        assert len(limited.logged("merge_gain_stderr/other")) == 6
    if form == "largest":
        assert gain == pytest.approx(max(each[2] for each in live[:4]) - max(each[2] for each in merged), abs=1e-6)


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size", "sequential"])
@pytest.mark.sample(1)
def test_several_loaders_at_once_are_compared_on_the_same_batches(tmp_path, mode):
    class Both(Toy):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pairs = [batch] if mode == "sequential" else [each for each in batch if each is not None]
            loss = torch.stack([F.cross_entropy(self(x), y) for x, y in pairs]).mean()
            self.log("val_loss", loss, batch_size=8, add_dataloader_idx=mode == "sequential")
            SEEN.append((self.global_step, dataloader_idx, float(loss), 8))

    loaders = CombinedLoader([batches(24, 8, shuffle=False), batches(64, 8, shuffle=False, seed=2)], mode)
    SEEN.clear()
    limited = fit(
        make(Both), tmp_path, MergeCallback(2, 3, limit_batches=4), validation=loaders, num_sanity_val_steps=0
    )
    at_end = [each for each in SEEN if each[0] == 24]
    metrics = limited.epoch_metrics[-1]
    if mode == "sequential":
        # Three and four batches of the merge, three and eight of the live model.
        merged, live, name = at_end[3:7], at_end[10:14], "val_loss/dataloader_idx_1"
    else:
        num = 3 if mode == "min_size" else 4
        merged, live, name = at_end[:num], at_end[num : 2 * num], "val_loss"
    gain = np.mean([theirs[2] - ours[2] for ours, theirs in zip(merged, live, strict=True)])
    assert float(metrics[f"merge_gain/{name}"]) == pytest.approx(gain, abs=1e-6)


def test_batches_without_a_single_number_do_not_spoil_the_error(tmp_path):
    class Empty(LossAlone):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), batch_size=0 if batch_idx == 1 else 8)

    limited = run(tmp_path, Empty, MergeCallback(2, 3, limit_batches=4))
    errors = [value for _, value in limited.logged("merge_gain_stderr/val_loss")]
    assert len(errors) == 6
    assert np.isfinite(errors).all()


def test_what_a_validation_found_does_not_keep_the_strategy_alive(tmp_path):
    callback = MergeCallback(2, 3, limit_batches=2)
    run(tmp_path, LossAlone, callback)
    evaluation = callback.session.validation._evaluation
    assert evaluation is not None
    assert all(value.sums is None for value in evaluation.values["sma"].values())


def test_nor_does_a_copy_of_the_callback_within_the_fit(tmp_path):
    class Copies(Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                copied.append(pickle.dumps(copy.deepcopy(callback.session.validation._latest)))

    copied, callback = [], MergeCallback(2, 3, limit_batches=2)
    run(tmp_path, LossAlone, callback, Copies())
    assert copied
    assert not any(b"Strategy" in each for each in copied)


@pytest.mark.parametrize("name", ["stderr", "stderr_x"])
def test_names_that_are_taken_by_errors_of_gains_are_refused(name):
    with pytest.raises(ValueError, match=f"must not begin with 'stderr', .* got {name!r}"):
        MergeCallback(name=name)
    with pytest.raises(ValueError, match=f"names of merges must not begin with 'stderr', .* got {name!r}"):
        MergeCallback(merges={"sma": "sma", name: "wma"})


def test_without_a_limit_or_with_a_large_one_nothing_changes(tmp_path):
    whole = run(tmp_path / "whole", LossAlone, MergeCallback(2, 3))
    large = run(tmp_path / "large", LossAlone, MergeCallback(2, 3, limit_batches=6))
    for name in ("merge_gain/val_loss", "merged/val_loss"):
        assert whole.logged(name) == large.logged(name)
    assert not large.logged("merge_gain_stderr/val_loss")


@pytest.mark.slow
def test_two_callbacks_with_other_limits_each_have_their_own_batches(tmp_path):
    both = run(tmp_path / "both", LossAlone, *(MergeCallback(2, 3, limit_batches=n, name=f"n{n}") for n in (2, 4)))
    for limit in (2, 4):
        alone = run(tmp_path / str(limit), LossAlone, MergeCallback(2, 3, limit_batches=limit))
        assert both.logged(f"merge_gain_n{limit}/val_loss") == alone.logged("merge_gain/val_loss")


def sums(values, sizes, batches=None):
    totals = torch.cumsum(torch.tensor(values) * torch.tensor(sizes), 0)
    running = torch.cumsum(torch.tensor(sizes), 0)
    return BatchSums(batches or range(len(values)), list(totals), list(running), len(values), torch.clone, True)


def test_the_error_of_several_ranks_is_that_of_all_their_batches():
    values, sizes = [0.1, 0.3, 0.2, 0.5], [8.0, 8.0, 8.0, 4.0]
    told: list[list[torch.Tensor]] = [[], []]
    barrier = threading.Barrier(2)

    def error_on(rank):
        def add_up(own):
            told[rank].append(own)
            place = len(told[rank]) - 1
            barrier.wait()
            return told[0][place] + told[1][place]

        here = slice(2 * rank, 2 * rank + 2)
        return standard_error(sums(values[here], sizes[here]), sums([0.0, 0.0], sizes[here]), add_up)

    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(error_on, range(2))
    assert first == second == pytest.approx(standard_error(sums(values, sizes), sums([0.0] * 4, sizes)))


def test_a_single_batch_and_other_batches_have_no_error():
    assert standard_error(sums([0.5], [8.0]), sums([0.1], [8.0])) is None
    assert standard_error(sums([0.5, 0.4], [8.0, 8.0]), sums([0.1, 0.2], [8.0, 4.0])) is None
    assert standard_error(sums([0.5, 0.4], [8.0, 8.0], [0, 2]), sums([0.1, 0.2], [8.0, 8.0], [0, 1])) is None
    assert standard_error(sums([0.5, 0.4], [8.0, 8.0]), sums([0.1, 0.2], [8.0, 8.0])) == pytest.approx(0.1)
